"""Turns join tokens into certificates and old certificates into new ones. The registry decides, the authority signs."""

from dataclasses import dataclass

from common.certificates import Certificate, digest_of_key, key_of_request, new_key, private_key, read_certificate
from common.errors import NotAllowed
from common.identity import Role, Subject
from common.join_token import JoinToken
from common.moments import DAY_SECONDS
from coordinator.identity.authority import Authority
from coordinator.identity.registry import Person, Registry, Site, Token, check_name, check_site_name, serial_of


@dataclass(frozen=True)
class Issuer:
    """Both calls write files: run them in a thread."""

    authority: Authority
    registry: Registry
    certificate_seconds: float

    def enrol(self, token: Certificate, signing_request: bytes, worker: str) -> tuple[bytes, str]:
        """A worker's first certificate, PEM, and its client id; the token's place is used before it is signed.

        Raises InvalidRequest, BadJoinToken, Revoked or IdentityConflict.
        """
        key = key_of_request(signing_request)
        subject = self.registry.admit(token, digest_of_key(key), worker)
        return self.authority.issue(subject, key, self.certificate_seconds), subject.name

    def renew(self, caller: Certificate, signing_request: bytes) -> bytes:
        """The next certificate of the caller's own key, PEM. Raises InvalidRequest, NotAllowed or Revoked."""
        key = key_of_request(signing_request)
        if digest_of_key(key) != caller.key_digest:
            raise NotAllowed(f"{caller.subject} may renew the certificate of its own key only")
        self.registry.check(caller)
        return self.authority.issue(caller.subject, key, self.certificate_seconds)

    # ------------------------------------------------------------ for the operator, by the command line

    def invite(self, site: str, *, workers: int, days: float, again: bool, address: str) -> tuple[Site, JoinToken]:
        """A site with a new join token for so many workers. Raises ConfigError as Registry.add_site does."""
        check_site_name(site)
        key = new_key()
        seconds = days * DAY_SECONDS
        subject = Subject(Role.JOIN, site, site)
        pem = self.authority.issue(subject, private_key(key).public_key(), seconds)
        certificate = read_certificate(pem)
        known = self.registry.site(site)
        is_alone = workers == 1 and not (known and any(client_id != site for client_id in known.keys))
        token = Token(serial_of(certificate), workers, is_alone, certificate.not_after)
        added = self.registry.add_site(site, token, again=again)
        return added, JoinToken(address, site, self.authority.certificate.decode(), pem.decode(), key.decode())

    def give_access(self, name: str, role: Role, days: float, *, again: bool, key: bytes = b"") -> tuple[bytes, bytes]:
        """An observer's or operator's certificate and key, PEM; a new key unless one is given.

        Raises ConfigError as Registry.add_person does.
        """
        check_name(name)
        key = key or new_key()
        pem = self.authority.issue(Subject(role, name, name), private_key(key).public_key(), days * DAY_SECONDS)
        self.registry.add_person(Person(name, role, read_certificate(pem).key_digest), again=again)
        return pem, key
