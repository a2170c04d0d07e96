"""A federation's own certificate authority: one key, which signs certificates that are good for one thing each.

It knows no sites and keeps no list; what it signs, the registry has admitted before.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import MALFORMED, new_key, private_key
from common.errors import ConfigError, NotAuthenticated
from common.identity import Role, Subject
from common.identity_folder import AUTHORITY_FILE
from common.moments import DAY_SECONDS

AUTHORITY_SECONDS = 3650 * DAY_SECONDS
BACKDATED_SECONDS = 600.0  # a site whose clock is late must not find its certificate "not yet valid"
CERTIFICATE_FILE = AUTHORITY_FILE
KEY_FILE = "ca.key"
_MAX_COMMON_NAME = 64


@dataclass(frozen=True)
class Authority:
    """The key that everybody's certificate goes back to."""

    certificate: bytes  # PEM
    key: bytes  # PEM
    now: Callable[[], float]  # unix seconds

    def issue(
        self, subject: Subject, key: ec.EllipticCurvePublicKey, seconds: float, names: Sequence[str] = ()
    ) -> bytes:
        """A certificate for that key, PEM; `names` are the coordinator's host names. Raises ConfigError for a bad one.

        The coordinator's serves and does nothing else, everybody else's calls and does nothing else.
        """
        authority = x509.load_pem_x509_certificate(self.certificate)
        is_server = subject.role is Role.COORDINATOR
        now = self.now()
        ends_at = min(now + seconds, authority.not_valid_after_utc.timestamp())
        use = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
        uri = x509.UniformResourceIdentifier(subject.uri)
        signer = private_key(self.key)
        builder = (
            _builder(subject.name, now, ends_at)
            .issuer_name(authority.subject)
            .public_key(key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(x509.SubjectAlternativeName([uri, *map(_host_name, names)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_authority(federation: str, now: Callable[[], float]) -> Authority:
    """A fresh one, in memory.

    It carries no name constraints: those for URIs speak of host names, and a subject's URI has none, so a verifier
    would have to refuse it. What a certificate may be used for stands in its role and its extended key usage.
    """
    pem = new_key()
    key = private_key(pem)
    name = f"raflora authority of {federation}"[:_MAX_COMMON_NAME]
    builder = (
        _builder(name, now(), now() + AUTHORITY_SECONDS)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), pem, now)


def load_authority(folder: Path, now: Callable[[], float]) -> Authority:
    """The authority that `raflora init` wrote. Raises ConfigError that says what is missing or wrong."""
    try:
        certificate, key = (folder / CERTIFICATE_FILE).read_bytes(), (folder / KEY_FILE).read_bytes()
        found = x509.load_pem_x509_certificate(certificate).public_key()
        fits = found == private_key(key).public_key()
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no authority; `raflora init FOLDER` makes FOLDER/authority") from None
    except OSError as error:
        raise ConfigError(f"{folder}: the authority cannot be read: {error.strerror}") from None
    except (*MALFORMED, NotAuthenticated):
        fits = False
    if not fits:
        raise ConfigError(f"{folder}: {CERTIFICATE_FILE} and {KEY_FILE} are damaged or do not belong together")
    return Authority(certificate, key, now)


def _builder(name: str, starts_at: float, ends_at: float) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_COMMON_NAME])])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(starts_at - BACKDATED_SECONDS), UTC))
        .not_valid_after(datetime.fromtimestamp(int(ends_at), UTC))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not name or not name.isascii() or any(character.isspace() or character in "/:" for character in name):
        raise ConfigError(f"server.identity.names: {name!r} is no host name and no address (and no port belongs here)")
    return x509.DNSName(name)
