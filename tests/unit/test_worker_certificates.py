"""A worker's papers on disk: made once, kept whole, never another's, and refused in words."""

import json
import stat
import time
from pathlib import Path

import pytest
from identities import Identities, request_of

from common.certificates import new_key, read_certificate
from common.channel import Tls
from common.errors import BadJoinToken, ConfigError, NotAuthenticated
from common.identity import Role, Subject
from common.identity_folder import IdentityFolder
from common.moments import moment
from worker.certificates import (
    Issued,
    certificate_in,
    check_files,
    describe,
    expired,
    identity_in,
    join_token_of,
    keep,
    key_in,
)
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.probe import host_and_port


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@pytest.fixture
def folder(tmp_path: Path) -> IdentityFolder:
    return identity_in(tmp_path / "state")


def issued_to(identities: Identities, key: bytes) -> Issued:
    token = identities.joining("clinic-a")
    assert token.certificate is not None
    certificate, _ = identities.issuer.enrol(read_certificate(token.certificate), request_of(key), "")
    return Issued(certificate, identities.authority.certificate)


def test_the_key_is_made_once_and_is_for_its_owner_alone(folder: IdentityFolder) -> None:
    key = key_in(folder)
    assert key_in(folder) == key
    assert stat.S_IMODE((folder.path / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert not folder.is_complete


def test_a_file_that_is_no_key_is_named_and_never_replaced(folder: IdentityFolder) -> None:
    folder.write("key.pem", b"half a k")
    with pytest.raises(
        ConfigError, match=r"key\.pem: the private key is not .*; delete .*identity and start with a new"
    ):
        key_in(folder)
    assert (folder.path / "key.pem").read_bytes() == b"half a k"


def test_a_certificate_for_this_key_is_kept_whole(identities: Identities, folder: IdentityFolder) -> None:
    key = key_in(folder)
    kept = keep(folder, issued_to(identities, key), key, identities.authority.certificate)
    assert kept.subject == Subject(Role.WORKER, "clinic-a", "clinic-a")
    assert certificate_in(folder) == kept
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()} == {0o600}


def test_a_certificate_for_another_key_is_not_kept(identities: Identities, folder: IdentityFolder) -> None:
    with pytest.raises(NotAuthenticated, match="for another key than this worker's"):
        keep(folder, issued_to(identities, new_key()), key_in(folder), identities.authority.certificate)
    assert not folder.is_complete


def test_a_certificate_for_another_role_is_not_kept(identities: Identities, folder: IdentityFolder) -> None:
    pem = identities.person("eve", Role.OPERATOR)
    assert pem.certificate is not None
    assert pem.key is not None
    folder.write("key.pem", pem.key)
    with pytest.raises(NotAuthenticated, match="for operator eve, not for a worker"):
        keep(folder, Issued(pem.certificate, pem.authority or b""), pem.key, identities.authority.certificate)


def test_the_authority_that_was_spoken_to_is_not_exchanged(
    identities: Identities, folder: IdentityFolder, tmp_path: Path
) -> None:
    stranger, key = Identities(tmp_path / "stranger"), key_in(folder)
    answer = Issued(issued_to(identities, key).certificate, stranger.authority.certificate)
    with pytest.raises(NotAuthenticated, match="another authority"):
        keep(folder, answer, key, identities.authority.certificate)
    assert not (folder.path / "ca.pem").exists()


def test_a_certificate_that_does_not_fit_its_key_is_not_shown(identities: Identities, folder: IdentityFolder) -> None:
    key = key_in(folder)
    keep(folder, issued_to(identities, key), key, identities.authority.certificate)
    folder.write("key.pem", new_key())
    with pytest.raises(ConfigError, match="do not belong together"):
        certificate_in(folder)


@pytest.mark.parametrize("damaged", ["ca.pem", "certificate.pem", "key.pem"])
def test_a_damaged_file_is_named(identities: Identities, folder: IdentityFolder, damaged: str) -> None:
    key = key_in(folder)
    keep(folder, issued_to(identities, key), key, identities.authority.certificate)
    (folder.path / damaged).write_bytes(b"-----BEGIN NONSENSE-----")
    with pytest.raises(ConfigError, match=damaged):
        certificate_in(folder)


def test_a_folder_without_a_file_says_which(identities: Identities, folder: IdentityFolder) -> None:
    key = key_in(folder)
    keep(folder, issued_to(identities, key), key, identities.authority.certificate)
    (folder.path / "ca.pem").unlink()
    with pytest.raises(ConfigError, match=r"it lacks ca\.pem"):
        certificate_in(folder)


def test_an_encrypted_key_is_refused_and_asks_nobody_for_a_password(identities: Identities, tmp_path: Path) -> None:
    pem = identities.worker("clinic-a")
    (tmp_path / "certificate.pem").write_bytes(pem.certificate or b"")
    (tmp_path / "key.pem").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(ConfigError, match="cannot be used"):
        check_files(Tls(None, tmp_path / "certificate.pem", tmp_path / "key.pem"))


def test_a_token_may_stand_in_a_file_with_its_lines_broken(identities: Identities, tmp_path: Path) -> None:
    token = identities.invite("clinic-a")
    file = tmp_path / "token"
    file.write_text("\n".join(token.text[i : i + 76] for i in range(0, len(token.text), 76)) + "\n")
    assert join_token_of(CoordinatorAddress(join_token_file=file)) == token
    assert join_token_of(CoordinatorAddress(join_token=token.text)) == token
    assert join_token_of(CoordinatorAddress()) is None


@pytest.mark.parametrize("content", [b"", b"raflora-join-1.abc", b"\xff\xfe", b"raflora-join-1." + b"A" * 100_000])
def test_a_token_file_with_something_else_is_named_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(BadJoinToken, match=r"join_token_file: .*token") as caught:
        join_token_of(CoordinatorAddress(join_token_file=tmp_path / "token"))
    assert len(str(caught.value)) < 400


def test_two_tokens_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        join_token_of(CoordinatorAddress(join_token="raflora-join-1.x", join_token_file=tmp_path / "token"))  # noqa: S106 - no secret


def test_a_token_is_in_no_log_and_does_not_reach_the_trainer() -> None:
    config = WorkerConfig(
        rank=4,
        coordinator=CoordinatorAddress(join_token="raflora-join-1.secret"),  # noqa: S106 - no real one
        model=ModelConfig(path="m"),
        data=DataConfig(train="d"),
    )
    assert "secret" not in repr(config)
    assert "secret" not in config.model_dump_json()
    assert "join_token" not in json.loads(config.model_dump_json())["coordinator"]


def test_an_expired_certificate_says_what_the_operator_types(identities: Identities, folder: IdentityFolder) -> None:
    key = key_in(folder)
    certificate = keep(folder, issued_to(identities, key), key, identities.authority.certificate)
    said = str(expired(certificate, folder, certificate.not_after + 1))
    assert "`raflora site add clinic-a --again --folder FOLDER`" in said
    assert moment(certificate.not_after) in said


def test_any_certificate_can_be_described(identities: Identities) -> None:
    described = describe(identities.authority.certificate)
    assert described.issuer == "raflora authority of tests"
    assert described.names == ()
    assert described.not_before < time.time() < described.not_after
    with pytest.raises(ConfigError, match="no certificate"):
        describe(b"\x30\x03")


def test_a_moment_beyond_the_calendar_is_still_a_sentence() -> None:
    assert moment(0) == "1970-01-01 00:00 UTC"
    assert moment(1e300) == "a time beyond all calendars"


@pytest.mark.parametrize(
    ("address", "expected"),
    [("a.example:7070", ("a.example", 7070)), ("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:7070", ("::1", 7070))],
)
def test_an_address_is_a_host_and_a_port(address: str, expected: tuple[str, int]) -> None:
    assert host_and_port(address) == expected


@pytest.mark.parametrize("address", ["", "host", "host:", ":7070", "host:0", "host:70700", "::1:7070", "http://h:80"])
def test_another_form_of_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"HOST:PORT|\[::1\]:7070"):
        host_and_port(address)
