"""How a coordinator knows its callers, from its settings: in the clear, by an authority of its own, or by another's."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from common.channel import Tls, is_loopback
from common.errors import ConfigError
from common.moments import DAY_SECONDS
from coordinator.config import IdentityConfig, ServerConfig, TlsConfig
from coordinator.identity.authority import load_authority
from coordinator.identity.gate import Gate
from coordinator.identity.issuer import Issuer
from coordinator.identity.papers import IssuedPapers, Papers, WatchedPapers
from coordinator.identity.registry import Registry

_PRIVATE_FOLDER = 0o077  # rights that nobody but the owner may have


@dataclass(frozen=True)
class Security:
    """Who may connect and how."""

    sentence: str  # for the status
    papers: Papers | None = None  # None: in the clear
    gate: Gate | None = None  # None: every caller has every role
    issuer: Issuer | None = None  # None: certificates come from elsewhere
    asks_for_certificates: bool = False

    def organisation_of(self, client_id: str) -> str:
        """Whose client this is; without certificates every client is its own organisation."""
        return self.gate.organisation_of(client_id) if self.gate else client_id


def security_of(server: ServerConfig, now: Callable[[], float] = time.time) -> Security:
    """What [server] says. Raises ConfigError if that would let strangers in without saying so."""
    if server.identity is not None and server.tls is not None:
        raise ConfigError("[server.identity] and [server.tls] exclude each other: whose authority counts?")
    if server.identity is not None:
        if server.insecure:
            raise ConfigError("server.insecure contradicts [server.identity]; leave one of the two out")
        return _own_authority(server.identity, now)
    if server.tls is not None and server.tls.ca_file is not None:
        if server.insecure:
            raise ConfigError("server.insecure contradicts server.tls.ca_file; leave one of the two out")
        return _other_authority(server.tls, now)
    return _nobody_is_known(server)


def _own_authority(identity: IdentityConfig, now: Callable[[], float]) -> Security:
    authority = load_authority(identity.folder, now)
    if identity.folder.stat().st_mode & _PRIVATE_FOLDER:
        raise ConfigError(
            f"server.identity.folder: others on this machine can look into {identity.folder}; "
            f"it holds the authority's key: chmod 700 {identity.folder}"
        )
    registry, seconds = Registry(identity.folder), identity.certificate_days * DAY_SECONDS
    return Security(
        "mutual TLS: every caller shows a certificate of this federation's own authority",
        IssuedPapers(authority, identity.names, seconds),
        Gate(registry, now),
        Issuer(authority, registry, seconds),
        asks_for_certificates=True,
    )


def _other_authority(tls: TlsConfig, now: Callable[[], float]) -> Security:
    return Security(
        f"mutual TLS: every caller shows a certificate of the authority in {tls.ca_file}",
        WatchedPapers(Tls(tls.ca_file, tls.certificate_file, tls.key_file)),
        Gate(None, now),
        asks_for_certificates=True,
    )


def _nobody_is_known(server: ServerConfig) -> Security:
    is_local = is_loopback(server.listen)
    if not is_local and not server.insecure:
        found = "has no ca_file, so it asks nobody for a certificate" if server.tls else "is not set"
        raise ConfigError(
            f"server.listen: {server.listen} can be reached from other machines, but [server.tls] {found}. "
            "`raflora init FOLDER` makes an authority and settings with certificates for everybody; or set "
            "server.insecure = true if a private network or a tunnel protects it"
        )
    warning = "" if is_local else "INSECURE: "
    whom = "everybody on this machine" if is_local else "EVERYBODY WHO REACHES THIS ADDRESS"
    if server.tls is None:
        return Security(f"{warning}in the clear: {whom} may do everything")
    papers = WatchedPapers(Tls(None, server.tls.certificate_file, server.tls.key_file))
    return Security(f"{warning}TLS that asks nobody for a certificate: {whom} may do everything", papers)
