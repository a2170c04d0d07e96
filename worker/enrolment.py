"""How a worker comes in, and stays in: its first certificate from a join token, the next ones by itself.

Whatever is asked twice gives the same answer: the key is durable before the first question.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog

from common.certificates import Certificate, read_certificate
from common.channel import Tls
from common.errors import (
    BadJoinToken,
    ConfigError,
    NotAllowed,
    NotAuthenticated,
    ProtocolTooOld,
    RafloraError,
    Revoked,
    StorageFailed,
)
from common.file_mark import Mark, mark_of
from common.identity_folder import IdentityFolder
from common.join_token import JoinToken
from common.moments import moment
from common.version import software_version
from worker import certificates
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, TlsConfig, WorkerConfig
from worker.contact import Clock, Contact, pause_seconds
from worker.identity import client_id_of

LONGEST_SLEEP_SECONDS = 3600.0  # a machine that was suspended must notice how late it is
WATCH_SECONDS = 30.0  # between two looks at certificate files of the site's own
_SPREAD = 0.1  # of a third of the life: a thousand workers that joined together renew one after the other
# What no further attempt mends; after a failed fsync least of all.
_FINAL = (Revoked, NotAuthenticated, NotAllowed, BadJoinToken, StorageFailed)

log = structlog.get_logger()


@dataclass(frozen=True)
class Admission:
    """Where this worker's coordinator is, and who it is there."""

    where: CoordinatorAddress
    client_id: str
    identity: IdentityFolder | None = None  # None: in the clear, or with certificates of the site's own


class Keeper(Protocol):
    """Keeps a connection's certificates good while the worker works."""

    async def keep(self) -> None:
        """Goes on for ever. Raises Revoked or NotAuthenticated when there is nothing left to keep."""


async def admit(config: WorkerConfig, contact: Contact, clock: Clock, *, anew: bool = False) -> Admission:
    """Who this worker is; with a join token and no certificate it comes in first, however long that takes.

    A certificate that is there is used and the token left alone, unless it has expired or, with `anew`, was refused.
    Raises ConfigError for settings that contradict each other, BadJoinToken, Revoked, NotAuthenticated.
    """
    where = config.coordinator
    has_token = bool(where.join_token) or where.join_token_file is not None
    if where.tls is not None or where.insecure:
        if has_token:
            other = "[coordinator.tls]" if where.tls is not None else "insecure = true"
            raise ConfigError(f"coordinator: a join token and {other} contradict each other; leave one out")
        return Admission(where, client_id_of(config.name))
    folder = certificates.identity_in(config.state_dir)
    folder.sweep()
    if not folder.is_complete:
        if not has_token:
            return Admission(where, client_id_of(config.name))
        return await _come_in(config, folder, contact, clock)
    certificate = certificates.certificate_in(folder)
    _check_same_authority(where, folder)
    now = clock.wall_time()
    if anew or now >= certificate.not_after:
        if not has_token:
            raise certificates.expired(certificate, folder, now)
        return await _come_in(config, folder, contact, clock)
    if now < certificate.not_before:
        log.warning(
            "this certificate is not valid yet: is this machine's clock right?",
            valid_from=moment(certificate.not_before),
            clock=moment(now),
        )
    return _admission(config, folder, certificate)


def keeper_of(admission: Admission, client: CoordinatorClient, contact: Contact, clock: Clock) -> Keeper | None:
    """What runs beside the worker; None if there is nothing to keep."""
    if admission.identity is not None:
        return Renewal(admission.identity, client, contact, clock)
    tls = admission.where.tls
    if tls is not None and (tls.ca_file or tls.certificate_file):
        return Watch(Tls(tls.ca_file, tls.certificate_file, tls.key_file), client, clock)
    return None


class Renewal:
    """Renews a certificate of the federation's own authority when a third of its life is left."""

    def __init__(self, folder: IdentityFolder, client: CoordinatorClient, contact: Contact, clock: Clock) -> None:
        self._folder = folder
        self._client = client
        self._contact = contact
        self._clock = clock

    async def keep(self) -> None:
        """See Keeper."""
        certificate = certificates.certificate_in(self._folder)
        failures, spread = 0, _SPREAD * self._clock.chance()
        while True:
            due_seconds = _due_at(certificate, spread) - self._clock.wall_time()
            if due_seconds > 0:
                await self._clock.sleep(min(due_seconds, LONGEST_SLEEP_SECONDS))
                continue
            renewed = await self._renewed(certificate)
            if renewed is None or _due_at(renewed, spread) <= self._clock.wall_time():
                # No answer, or a certificate that is due already: either way not at once again.
                failures += 1
                await self._clock.sleep(pause_seconds(failures, self._clock.chance()))
            else:
                failures, spread = 0, _SPREAD * self._clock.chance()
            certificate = renewed or certificate

    async def _renewed(self, certificate: Certificate) -> Certificate | None:
        """The next certificate, in use from now on; None if it has to be asked for again."""
        try:
            key = await asyncio.to_thread(certificates.key_in, self._folder)
            issued = await self._client.renew(certificates.request_for(key, certificate.subject.name))
            trusted = self._folder.tls.read().authority or b""
            renewed = await asyncio.to_thread(certificates.keep, self._folder, issued, key, trusted)
            await self._client.reconnect()
        except _FINAL:
            raise
        except RafloraError as error:
            now = self._clock.wall_time()
            if now >= certificate.not_after:
                raise certificates.expired(certificate, self._folder, now) from None
            log.warning(
                "the certificate is not renewed yet; trying again",
                why=str(error),
                expires=moment(certificate.not_after),
            )
            return None
        self._contact.made()
        log.info("certificate renewed", expires=moment(renewed.not_after))
        return renewed


class Watch:
    """Notices when certificate files of the site's own change, and connects anew with them."""

    def __init__(self, tls: Tls, client: CoordinatorClient, clock: Clock) -> None:
        self._tls = tls
        self._client = client
        self._clock = clock
        self._seen = _marks(tls)

    async def keep(self) -> None:
        """See Keeper."""
        while True:
            await self._clock.sleep(WATCH_SECONDS)
            found = _marks(self._tls)
            if found == self._seen:
                continue
            try:
                await asyncio.to_thread(certificates.check_files, self._tls)
                await self._client.reconnect()
            except ConfigError as error:
                # One file may be written before the other: what was read before goes on, and the next look tells.
                log.warning("the certificate files have changed, and are not used", why=str(error))
            else:
                self._seen = found
                log.info("certificate files read again")


async def _come_in(config: WorkerConfig, folder: IdentityFolder, contact: Contact, clock: Clock) -> Admission:
    token = certificates.join_token_of(config.coordinator)
    if token is None:
        raise ConfigError("coordinator: a join token is needed to come in")
    _check_token(token, clock.wall_time())
    address = _address_of(config.coordinator, token.address)
    key = await asyncio.to_thread(certificates.key_in, folder)
    name = client_id_of(config.name)
    request = certificates.request_for(key, name)
    client = CoordinatorClient(
        config.coordinator.model_copy(update={"address": address}),
        Credentials(name, "", software_version()),
        join_token=certificates.pem_of(token),
    )
    try:
        try:
            issued = await contact.insist(lambda: client.enrol(request, name))
        except Revoked:
            # A key that went with its site does not return, and the token may be of a site that was let in again.
            key = await asyncio.to_thread(certificates.another_key_in, folder)
            another = certificates.request_for(key, name)
            issued = await contact.insist(lambda: client.enrol(another, name))
    except ProtocolTooOld:
        raise BadJoinToken(f"{address} issues no certificates: is it the coordinator that the token is for?") from None
    finally:
        await client.close()
    trusted = token.authority.encode()
    await asyncio.to_thread(certificates.keep_address, folder, address)
    certificate = await asyncio.to_thread(certificates.keep, folder, issued, key, trusted)
    log.info("came in", who=str(certificate.subject), expires=moment(certificate.not_after))
    return _admission(config, folder, certificate)


def _admission(config: WorkerConfig, folder: IdentityFolder, certificate: Certificate) -> Admission:
    files = TlsConfig(
        ca_file=folder.tls.ca_file, certificate_file=folder.tls.certificate_file, key_file=folder.tls.key_file
    )
    address = _address_of(config.coordinator, folder.address)
    where = config.coordinator.model_copy(update={"address": address, "tls": files})
    return Admission(where, certificate.subject.name, folder)


def _address_of(where: CoordinatorAddress, known: str) -> str:
    """The settings' if they name one, else what the token or the folder knows."""
    return where.address if "address" in where.model_fields_set or not known else known


def _check_token(token: JoinToken, now: float) -> None:
    try:
        certificate = read_certificate(token.certificate.encode())
    except NotAuthenticated as error:
        raise BadJoinToken(f"the join token of site {token.site}: {error}") from None
    if now >= certificate.not_after:
        raise BadJoinToken(
            f"the join token of site {token.site} expired on {moment(certificate.not_after)} (this "
            f"machine's clock: {moment(now)}); the operator can make a new one: "
            f"raflora site add {token.site} --again --folder FOLDER"
        )


def _check_same_authority(where: CoordinatorAddress, folder: IdentityFolder) -> None:
    """Raises ConfigError if a token that can be read is of another federation than the identity that is there."""
    try:
        token = certificates.join_token_of(where)
    except (ConfigError, BadJoinToken) as error:
        # It has done its work; a file that was taken away, as it should be, is no reason to stop.
        log.debug("the join token is not looked at", why=str(error))
        return
    if token is None:
        return
    mine = folder.tls.read().authority or b""
    if certificates.authority_of(token.authority.encode()) != certificates.authority_of(mine):
        raise ConfigError(
            f"{folder.path} holds an identity of another federation than the join token's; give this worker a "
            f"state_dir of its own for the new federation, or delete {folder.path} if the old one is over"
        )


def _due_at(certificate: Certificate, spread: float) -> float:
    third_seconds = (certificate.not_after - certificate.not_before) / 3
    return certificate.not_after - third_seconds * (1 - spread)


def _marks(tls: Tls) -> tuple[Mark, ...]:
    return tuple(mark_of(path) for path in (tls.ca_file, tls.certificate_file, tls.key_file) if path is not None)
