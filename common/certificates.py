"""Keys, signing requests and what stands in a certificate. The only algorithm that we make is ECDSA on P-256.

Both sides use it; nothing here issues a certificate, opens a file or decides what somebody may do.
"""

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from common.errors import InvalidRequest, NotAuthenticated
from common.identity import Subject, subject_of

MAX_REQUEST_BYTES = 8_192
_MAX_COMMON_NAME = 64  # X.520's limit; the URI has the whole name
# What the library raises for bytes that are not what they claim to be; ValueError covers most of it.
MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True)
class Certificate:
    """What a certificate says; whether its authority is ours, TLS has checked."""

    subject: Subject
    key_digest: str  # SHA-256 of SubjectPublicKeyInfo, hex: the same for every certificate of one key
    not_before: float  # unix seconds
    not_after: float
    serial: int

    def is_due(self, now: float) -> bool:
        """Whether only a third of its life is left: time to renew it."""
        return now >= self.not_after - (self.not_after - self.not_before) / 3


def new_key() -> bytes:
    """A private key, PEM (PKCS8, not encrypted: the folder it goes to is the protection)."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key_pem: bytes, subject: Subject) -> bytes:
    """Asks for a certificate of this key, PEM; the subject is only a wish. Raises NotAuthenticated for a bad key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject.name[:_MAX_COMMON_NAME])])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(subject.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(names, critical=False)
    return builder.sign(private_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes) -> Certificate:
    """The first certificate in these bytes. Raises NotAuthenticated unless it names exactly one subject."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key_digest = digest_of_key(certificate.public_key())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except MALFORMED:
        raise NotAuthenticated("the certificate cannot be read") from None
    return Certificate(
        subject_of(uris),
        key_digest,
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
        certificate.serial_number,
    )


def key_of_request(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 public key that a signing request proves to hold. Raises InvalidRequest."""
    if len(pem) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"signing_request: {len(pem)} bytes, at most {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        # The curve first: other keys cost more to check, and nothing is issued for them.
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InvalidRequest("signing_request: its key is not ECDSA on the curve P-256")
        if not request.is_signature_valid:
            raise InvalidRequest("signing_request: its signature does not belong to its key")
    except (*MALFORMED, InvalidSignature):
        raise InvalidRequest("signing_request: not a PEM certificate signing request") from None
    return key


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Raises NotAuthenticated, without repeating a byte of it, unless it is a P-256 key."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except MALFORMED:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise NotAuthenticated("the private key is not an unencrypted PEM key of ECDSA on the curve P-256")
    return key


def check_pair(certificate_pem: bytes, key_pem: bytes) -> None:
    """Raises NotAuthenticated unless both can be read and belong together; any algorithm, of any authority."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
        fits = digest_of_key(certificate.public_key()) == digest_of_key(key.public_key())  # type: ignore[arg-type]
    except MALFORMED:
        raise NotAuthenticated("the certificate or its key cannot be read") from None
    if not fits:
        raise NotAuthenticated("the certificate is not of this key")


def digest_of_key(key: CertificatePublicKeyTypes) -> str:
    """SHA-256 of SubjectPublicKeyInfo, hex."""
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()
