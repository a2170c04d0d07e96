"""This worker's identity: the join token that brings it in, and the certificate in state_dir/identity that keeps it.

The key is made here and never leaves. Nothing here opens a connection; worker/enrolment.py does.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from common.certificates import Certificate, digest_of_key, new_key, private_key, read_certificate, signing_request
from common.channel import Pem, Tls
from common.errors import BadJoinToken, ConfigError, NotAuthenticated
from common.failpoints import reach
from common.identity import Role, Subject
from common.identity_folder import ADDRESS_FILE, AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, IdentityFolder
from common.join_token import JoinToken, parse_join_token
from common.moments import moment
from worker.config import CoordinatorAddress
from worker.messages import printable

_MAX_TOKEN_BYTES = 65_536
_LONGEST_NAME = 100  # of a stranger's certificate, in a sentence


@dataclass(frozen=True)
class Issued:
    """What an authority has answered."""

    certificate: bytes  # PEM
    authority: bytes  # PEM


@dataclass(frozen=True)
class Description:
    """Any certificate, also one that is not of ours."""

    names: tuple[str, ...]  # DNS names and addresses that it is for
    issuer: str
    not_before: float  # unix seconds
    not_after: float

    def validity(self, now: float) -> str:
        """When it is good, beside the clock of this machine."""
        return f"good from {moment(self.not_before)} to {moment(self.not_after)}; this machine's clock: {moment(now)}"


def identity_in(state_dir: Path) -> IdentityFolder:
    """Where a worker keeps who it is."""
    return IdentityFolder(state_dir / "identity")


def join_token_of(where: CoordinatorAddress) -> JoinToken | None:
    """The configured token; None if there is none. Raises ConfigError, BadJoinToken."""
    if where.join_token_file is None:
        return parse_join_token(where.join_token) if where.join_token else None
    if where.join_token:
        raise ConfigError("coordinator.join_token and coordinator.join_token_file say the same; leave one out")
    path = where.join_token_file
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TOKEN_BYTES).decode("ascii")
    except OSError as error:
        raise ConfigError(f"coordinator.join_token_file: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadJoinToken(f"coordinator.join_token_file: {path} holds no join token") from None
    try:
        return parse_join_token(text)
    except BadJoinToken as error:
        raise BadJoinToken(f"coordinator.join_token_file: {path}: {error}") from None


def pem_of(token: JoinToken) -> Pem:
    """What the token shows, for one thing only: the first certificate."""
    return Pem(token.authority.encode(), token.certificate.encode(), token.key.encode())


def key_in(folder: IdentityFolder) -> bytes:
    """This worker's key, PEM; made and made durable at the first call. Raises ConfigError for a file that is none."""
    path = folder.path / KEY_FILE
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        # Durable before anybody signs it: after a lost answer the same key asks again, and the token is not used twice.
        reach("identity.making_key")
        key = new_key()
        folder.write(KEY_FILE, key)
        reach("identity.key_made")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        private_key(key)
    except NotAuthenticated as error:
        raise ConfigError(f"{path}: {error}; delete {folder.path} and start with a new join token") from None
    return key


def another_key_in(folder: IdentityFolder) -> bytes:
    """A new key in place of one that will be let in no more, durable; the certificate of the old one goes first."""
    (folder.path / CERTIFICATE_FILE).unlink(missing_ok=True)
    key = new_key()
    folder.write(KEY_FILE, key)
    return key


def request_for(key: bytes, name: str) -> bytes:
    """A signing request, PEM; the coordinator decides on the subject."""
    return signing_request(key, Subject(Role.WORKER, name, name))


def keep(folder: IdentityFolder, issued: Issued, key: bytes, trusted: bytes) -> Certificate:
    """Makes a new certificate durable, once it is known to be ours; `trusted` is the authority that was spoken to.

    Raises NotAuthenticated for a certificate of another key, another role or another authority.
    """
    certificate = read_certificate(issued.certificate)
    if certificate.key_digest != digest_of_key(private_key(key).public_key()):
        raise NotAuthenticated("the coordinator issued a certificate for another key than this worker's")
    if certificate.subject.role is not Role.WORKER:
        raise NotAuthenticated(f"the coordinator issued a certificate for {certificate.subject}, not for a worker")
    if authority_of(issued.authority) != authority_of(trusted):
        raise NotAuthenticated("the coordinator answered with another authority than the one that it proved to be of")
    folder.write(AUTHORITY_FILE, issued.authority)
    reach("identity.certificate_writing")
    folder.write(CERTIFICATE_FILE, issued.certificate)  # the last: with it the identity is complete
    reach("identity.certificate_written")
    return certificate


def keep_address(folder: IdentityFolder, address: str) -> None:
    """So that a later start needs no token."""
    folder.write(ADDRESS_FILE, f"{address}\n".encode())


def certificate_in(folder: IdentityFolder) -> Certificate:
    """The certificate that is there. Raises ConfigError for what cannot be read, or does not fit its key."""
    path = folder.path / CERTIFICATE_FILE
    folder.check()
    check_files(folder.tls)
    try:
        return read_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except NotAuthenticated as error:
        raise ConfigError(f"{path}: {error}") from None


def check_files(tls: Tls) -> None:
    """Raises ConfigError unless certificate and key can be read and belong together, and the authority is one."""
    tls.read()
    context = ssl.create_default_context()
    try:
        if tls.ca_file is not None:
            context.load_verify_locations(tls.ca_file)
    except (ssl.SSLError, OSError):
        raise ConfigError(f"tls: {tls.ca_file} holds no certificate in PEM form") from None
    if tls.certificate_file is None:
        return
    try:
        context.load_cert_chain(tls.certificate_file, tls.key_file, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", "") or "not in PEM form"
        said = "do not belong together" if "MISMATCH" in reason else f"cannot be used ({reason})"
        raise ConfigError(f"tls: {tls.certificate_file} and {tls.key_file} {said}") from None


def authority_of(pem: bytes) -> str:
    """The digest of an authority's key: the same for every certificate of that authority. Raises ConfigError."""
    try:
        return digest_of_key(x509.load_pem_x509_certificate(pem).public_key())
    except ValueError:
        raise ConfigError("this is no authority's certificate in PEM form") from None


def describe(der: bytes) -> Description:
    """What stands in a certificate, DER or PEM. Raises ConfigError if it is none."""
    try:
        load = x509.load_pem_x509_certificate if der.startswith(b"-----") else x509.load_der_x509_certificate
        certificate = load(der)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = (
            *found.get_values_for_type(x509.DNSName),
            *(str(address) for address in found.get_values_for_type(x509.IPAddress)),
        )
    except x509.ExtensionNotFound:
        names = ()
    except ValueError:
        raise ConfigError("this is no certificate") from None
    issuer = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Description(
        names=tuple(printable(name, _LONGEST_NAME) for name in names),
        issuer=printable(str(issuer[0].value) if issuer else certificate.issuer.rfc4514_string(), _LONGEST_NAME),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def expired(certificate: Certificate, folder: IdentityFolder, now: float) -> NotAuthenticated:
    """What to say when it is too late to renew."""
    site = certificate.subject.organisation
    return NotAuthenticated(
        f"the certificate of {certificate.subject} expired on {moment(certificate.not_after)} (this machine's clock: "
        f"{moment(now)}), and only a valid one can be renewed. Ask the operator for a new join token "
        f"(`raflora site add {site} --again --folder FOLDER`), put it into coordinator.join_token_file and start "
        f"again; {folder.path} may stay as it is"
    )
