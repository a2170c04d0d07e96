"""The gate: from the certificate that TLS has accepted to a caller who may make this call, or a typed refusal."""

from collections.abc import Callable
from functools import lru_cache

from common.certificates import Certificate, read_certificate
from common.errors import BadJoinToken, NotAuthenticated
from common.identity import Role
from coordinator.identity.access import authorise
from coordinator.identity.caller import Caller, set_shown_subject
from coordinator.identity.registry import Registry, organisation_of

_MAX_REMEMBERED = 4096
_read = lru_cache(_MAX_REMEMBERED)(read_certificate)


class Gate:
    """Lets calls in. Without a registry (an authority of the operator's own) the certificate is all that counts."""

    def __init__(self, registry: Registry | None, now: Callable[[], float]) -> None:
        self._registry = registry
        self._now = now
        self._organisations: dict[str, str] = {}  # by client id, of those who called

    def admit(self, pem: bytes, method: str) -> Caller:
        """Who calls. Raises NotAuthenticated, NotAllowed, Revoked or BadJoinToken, each naming the subject."""
        certificate = _read(pem)
        set_shown_subject(str(certificate.subject))
        self.check(certificate)
        authorise(certificate.subject, method)
        if self._registry is None and certificate.subject.role is Role.WORKER:
            self._remember(certificate)
        return Caller(certificate, self._registry is not None)

    def check(self, certificate: Certificate) -> None:
        """Whether it is still good: TLS looks at the dates only when a connection begins, and never at the registry."""
        now, subject = self._now(), certificate.subject
        if now >= certificate.not_after:
            refusal = BadJoinToken if subject.role is Role.JOIN else NotAuthenticated
            raise refusal(f"{subject}: the certificate has expired; renew it, or ask the operator for a join token")
        if now < certificate.not_before:
            raise NotAuthenticated(f"{subject}: the certificate is not valid yet; is this clock right?")
        if self._registry is not None:
            self._registry.check(certificate)

    def knows(self, client_id: str) -> bool:
        """Whether the operator has not taken this client's identity back. Raises CorruptStore or TooBusy."""
        return self._registry is None or self._registry.knows(client_id)

    def organisation_of(self, client_id: str) -> str:
        """Whose client this is, for quotas; its own where nobody said."""
        if self._registry is not None:
            return organisation_of(client_id)
        return self._organisations.get(client_id, client_id)

    def _remember(self, certificate: Certificate) -> None:
        while len(self._organisations) >= _MAX_REMEMBERED and certificate.subject.name not in self._organisations:
            del self._organisations[next(iter(self._organisations))]
        self._organisations[certificate.subject.name] = certificate.subject.organisation
