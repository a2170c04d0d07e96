"""common/certificates.py and the authority: what stands in a certificate, and what cannot be one."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from identities import certificate_with

from common.certificates import (
    Certificate,
    check_pair,
    digest_of_key,
    key_of_request,
    new_key,
    private_key,
    read_certificate,
    signing_request,
)
from common.errors import ConfigError, InvalidRequest, NotAuthenticated
from common.identity import Role, Subject
from coordinator.identity.authority import (
    AUTHORITY_SECONDS,
    BACKDATED_SECONDS,
    CERTIFICATE_FILE,
    KEY_FILE,
    Authority,
    load_authority,
    new_authority,
)

NOW = 1_800_000_000.0
ADA = Subject(Role.WORKER, "clinic-a.gpu1", "clinic-a")
COORDINATOR = Subject(Role.COORDINATOR, "coordinator", "coordinator")


def new_one() -> Authority:
    return new_authority("tests", lambda: NOW)


def issued(subject: Subject = ADA, names: tuple[str, ...] = (), seconds: float = 3000.0) -> x509.Certificate:
    pem = new_one().issue(subject, private_key(new_key()).public_key(), seconds, names)
    return x509.load_pem_x509_certificate(pem)


# ---------------------------------------------------------------- reading


def test_a_certificate_says_who_when_and_which_key() -> None:
    authority, key = new_one(), new_key()
    found = read_certificate(authority.issue(ADA, private_key(key).public_key(), 3000.0))
    expected = Certificate(
        ADA,
        digest_of_key(key_of_request(signing_request(key, ADA))),
        NOW - BACKDATED_SECONDS,
        NOW + 3000.0,
        found.serial,
    )
    assert found == expected


def test_every_certificate_of_a_key_has_the_same_digest_and_another_serial() -> None:
    authority, key = new_one(), private_key(new_key()).public_key()
    one, two = (read_certificate(authority.issue(ADA, key, 3000.0)) for _ in range(2))
    assert one.key_digest == two.key_digest
    assert one.serial != two.serial


@pytest.mark.parametrize(("life_left", "is_due"), [(0.34, False), (0.33, True), (-1.0, True)])
def test_a_certificate_is_due_when_a_third_of_its_life_is_left(life_left: float, is_due: bool) -> None:
    certificate = Certificate(ADA, "", not_before=1000.0, not_after=2000.0, serial=1)
    assert certificate.is_due(2000.0 - life_left * 1000.0) is is_due


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("https://example.org",),
        (ADA.uri, "raflora:operator:eve:eve"),
        (ADA.uri, ADA.uri),
        ("raflora:admin:eve:eve",),
        ("raflora:worker:eve",),
        ("raflora:worker:eve:eve:eve",),
        ("raflora:worker:../eve:eve",),
        ("raflora:worker::eve",),
        ("RAFLORA:worker:eve:eve",),
    ],
)
def test_a_certificate_names_exactly_one_subject(uris: tuple[str, ...]) -> None:
    with pytest.raises(NotAuthenticated):
        read_certificate(certificate_with(uris, private_key(new_key()), new_one()))


def test_a_certificate_without_any_names_names_nobody() -> None:
    with pytest.raises(NotAuthenticated, match="names 0 subjects"):
        read_certificate(new_one().certificate)


@pytest.mark.parametrize("pem", [b"", b"\xff" * 50, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_no_request_and_no_key_says_so(pem: bytes) -> None:
    with pytest.raises(NotAuthenticated, match="cannot be read"):
        read_certificate(pem)
    with pytest.raises(InvalidRequest, match="not a PEM"):
        digest_of_key(key_of_request(pem))
    with pytest.raises(NotAuthenticated, match="not an unencrypted PEM key"):
        private_key(pem)


def test_a_certificate_and_a_key_belong_together_or_not() -> None:
    authority, key = new_one(), new_key()
    certificate = authority.issue(ADA, private_key(key).public_key(), 3000.0)
    check_pair(certificate, key)
    with pytest.raises(NotAuthenticated, match="not of this key"):
        check_pair(certificate, new_key())
    with pytest.raises(NotAuthenticated, match="cannot be read"):
        check_pair(certificate, b"nothing")


# ---------------------------------------------------------------- issuing


def test_the_authority_signs_certificates_and_no_further_authority() -> None:
    certificate = x509.load_pem_x509_certificate(new_one().certificate)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
    assert certificate.not_valid_after_utc.timestamp() == NOW + AUTHORITY_SECONDS


@pytest.mark.parametrize(
    ("subject", "use"), [(ADA, ExtendedKeyUsageOID.CLIENT_AUTH), (COORDINATOR, ExtendedKeyUsageOID.SERVER_AUTH)]
)
def test_a_certificate_is_good_for_one_thing(subject: Subject, use: x509.ObjectIdentifier) -> None:
    certificate = issued(subject)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert not constraints.ca
    assert (uses.critical, list(uses.value)) == (True, [use])


def test_host_names_and_addresses_stand_in_the_coordinators_certificate() -> None:
    certificate = issued(COORDINATOR, names=("fl.example.org", "10.0.0.7", "::1"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]


@pytest.mark.parametrize("name", ["", "a b", "host:7070", "https://host", "bücher.example"])
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no host name"):
        issued(COORDINATOR, names=(name,))


def test_no_certificate_outlives_its_authority() -> None:
    certificate = issued(seconds=20 * AUTHORITY_SECONDS)
    assert certificate.not_valid_after_utc.timestamp() == NOW + AUTHORITY_SECONDS


def test_an_authority_is_loaded_as_it_was_written(tmp_path: Path) -> None:
    authority = new_one()
    (tmp_path / KEY_FILE).write_bytes(authority.key)
    (tmp_path / CERTIFICATE_FILE).write_bytes(authority.certificate)
    assert load_authority(tmp_path, authority.now) == authority
    (tmp_path / KEY_FILE).write_bytes(new_key())
    with pytest.raises(ConfigError, match="do not belong together"):
        load_authority(tmp_path, authority.now)
    (tmp_path / KEY_FILE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="damaged"):
        load_authority(tmp_path, authority.now)
    (tmp_path / KEY_FILE).unlink()
    with pytest.raises(ConfigError, match="raflora init"):
        load_authority(tmp_path, authority.now)
