"""What the coordinator shows to callers: certificates that change while it runs, without a restart."""

import threading
from collections.abc import Callable, Sequence

import structlog

from common.certificates import Certificate, check_pair, new_key, private_key, read_certificate
from common.channel import Pem, Tls
from common.errors import ConfigError, NotAuthenticated
from common.file_mark import Mark, mark_of
from common.identity import Role, Subject
from coordinator.identity.authority import Authority

log = structlog.get_logger()
Papers = Callable[[], Pem]
_COORDINATOR = Subject(Role.COORDINATOR, "coordinator", "coordinator")


class IssuedPapers:
    """A certificate that the coordinator issues to itself, and again when a third of its life is left.

    Its key is never on disk and changes with each certificate. Called for every new connection, from gRPC's threads.
    """

    def __init__(self, authority: Authority, names: Sequence[str], seconds: float) -> None:
        """Issues the first. Raises ConfigError for a name that is none."""
        self._authority = authority
        self._names = tuple(names)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._pem, self._certificate = self._issue()

    def __call__(self) -> Pem:
        """What to show now."""
        with self._lock:
            if self._certificate.is_due(self._authority.now()):
                self._pem, self._certificate = self._issue()
                log.info("server certificate renewed")
            return self._pem

    def _issue(self) -> tuple[Pem, Certificate]:
        key = new_key()
        public = private_key(key).public_key()
        certificate = self._authority.issue(_COORDINATOR, public, self._seconds, self._names)
        return Pem(self._authority.certificate, certificate, key), read_certificate(certificate)


class WatchedPapers:
    """The files of [server.tls]: read again when they change; while they are broken the last good ones stay."""

    def __init__(self, tls: Tls) -> None:
        """Reads them. Raises ConfigError if they cannot be used."""
        self._tls = tls
        self._lock = threading.Lock()
        self._mark, self._pem = self._marks(), _checked(tls)

    def __call__(self) -> Pem:
        """What to show now."""
        with self._lock:
            mark = self._marks()
            if mark != self._mark:
                self._mark = mark
                try:
                    self._pem = _checked(self._tls)
                    log.info("server certificate replaced", file=str(self._tls.certificate_file))
                except ConfigError as error:
                    log.error("new certificate files are not used", why=str(error))
            return self._pem

    def _marks(self) -> tuple[Mark, ...]:
        return tuple(mark_of(path) for path in (self._tls.ca_file, self._tls.certificate_file, self._tls.key_file))


def _checked(tls: Tls) -> Pem:
    pem = tls.read()
    if pem.certificate is None or pem.key is None:
        raise ConfigError("server.tls: the coordinator needs certificate_file and key_file")
    try:
        check_pair(pem.certificate, pem.key)
    except NotAuthenticated as error:
        raise ConfigError(f"server.tls: {tls.certificate_file} and {tls.key_file}: {error}") from None
    return pem
