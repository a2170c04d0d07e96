"""The verbs that let people and workers in. They print what a script can use, and overwrite nothing."""

import json
import tomllib
from pathlib import Path

import pytest

from cli.main import main
from common.certificates import new_key, read_certificate
from common.identity import Role
from common.join_token import parse_join_token
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from coordinator.identity.registry import Registry
from coordinator.identity.security import security_of


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "fed"
    assert main(["init", str(path), "--name", "fl.example.org", "--federation", "intents"]) == 0
    capsys.readouterr()
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_init_makes_settings_that_work_as_they_stand(folder: Path) -> None:
    config = load_settings(CoordinatorConfig, folder / "federation.toml", environ={})
    assert config.name == "intents"
    assert config.server.identity is not None
    assert config.server.identity.names == ("fl.example.org", "localhost", "127.0.0.1")
    assert security_of(config.server).sentence.startswith("mutual TLS")
    assert tomllib.loads((folder / "federation.toml").read_text())["server"]["listen"] == "0.0.0.0:7070"


def test_init_says_what_to_do_next_in_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "init", tmp_path / "fed")
    assert status == 0
    assert [line.split(":  ")[-1].split("then: ")[-1].split()[1] for line in out.splitlines()] == [
        "coordinator",
        "site",
        "status",
    ]


def test_init_overwrites_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = (folder / "authority/ca.key").read_bytes()
    status, out, err = run(capsys, "init", folder)
    assert (status, out) == (2, "")
    assert "nothing is overwritten" in err
    assert run(capsys, "init", folder, "--if-missing") == (0, "", "")
    assert (folder / "authority/ca.key").read_bytes() == key


def test_init_goes_on_where_a_crash_ended_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = {path.name: path.read_bytes() for path in (folder / "authority").iterdir() if path.is_file()}
    (folder / "federation.toml").unlink()
    (folder / "operator").rename(folder / "operator.part")  # its last step is the one that gives it its name
    assert run(capsys, "init", folder)[0] == 2
    assert run(capsys, "init", folder, "--if-missing")[0] == 0
    assert not (folder / "operator.part").exists()
    assert {path.name: path.read_bytes() for path in (folder / "authority").iterdir() if path.is_file()} == authority
    digest = read_certificate((folder / "operator/certificate.pem").read_bytes()).key_digest
    person = Registry(folder / "authority").person("operator")
    assert person is not None
    assert person.key_digest == digest
    assert (folder / "federation.toml").exists()


def test_init_makes_no_second_operator_for_one_that_was_taken_away(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "operator").rename(tmp_path / "safe")
    before = Registry(folder / "authority").person("operator")
    (folder / "federation.toml").unlink()
    assert run(capsys, "init", folder, "--if-missing")[0] == 0
    assert not (folder / "operator").exists()
    assert Registry(folder / "authority").person("operator") == before


def test_private_things_are_private(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "site", "add", "clinic-a", "--folder", folder, "--out", folder / "token")
    run(capsys, "access", "add", "eve", folder / "eve", "--role", "observer", "--folder", folder)
    private = [folder / part for part in ("authority", "operator", "eve")]
    files = [path for part in private for path in part.rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*private, *files, folder / "token"])


def test_site_add_prints_the_token_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "site", "add", "clinic-a", "--folder", folder)
    token = parse_join_token(out)
    assert (status, token.site, token.address) == (0, "clinic-a", "fl.example.org:7070")
    assert out.count("\n") == 1
    assert "good for 1 worker(s) of clinic-a until" in err
    subject = read_certificate(token.certificate.encode()).subject
    assert (subject.role, subject.name) == (Role.JOIN, "clinic-a")


def test_site_add_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--workers", "3", "--days", "1", "--coordinator", "10.0.0.7:7070", "--format", "json")
    status, out, err = run(capsys, "site", "add", "clinic-b", "--folder", folder, *flags)
    said = json.loads(out)
    assert (status, err) == (0, "")
    assert (said["site"], said["token_workers"], said["token_used"]) == ("clinic-b", 3, 0)
    assert parse_join_token(said["join_token"]).address == said["coordinator"] == "10.0.0.7:7070"


def test_a_site_is_listed_and_revoked_and_added_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add = ("site", "add", "clinic-a", "--folder", folder)
    assert "no sites yet" in run(capsys, "site", "list", "--folder", folder)[1]
    assert run(capsys, *add)[0] == 0
    assert run(capsys, *add)[0] == 2
    assert run(capsys, *add, "--again")[0] == 0
    assert run(capsys, "site", "revoke", "clinic-a", "--folder", folder)[1].startswith("site clinic-a is shut out")
    assert "revoked" in run(capsys, "site", "list", "--folder", folder)[1]
    assert run(capsys, *add)[0] == 0
    listed = json.loads(run(capsys, "site", "list", "--folder", folder, "--format", "json")[1])
    assert [(site["site"], site["is_revoked"]) for site in listed["sites"]] == [("clinic-a", False)]


def test_a_script_may_ask_for_a_site_every_time_it_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = folder / "token"
    add = ("site", "add", "demo", "--workers", "9", "--folder", folder, "--out", token, "--if-missing")
    assert run(capsys, *add)[:2] == (0, f"{token}\n")
    first = token.read_text()
    assert run(capsys, *add)[:2] == (0, "")
    assert token.read_text() == first
    token.unlink()
    assert run(capsys, *add)[0] == 0
    assert parse_join_token(token.read_text()).site == "demo"


def test_people_get_folders_and_lose_their_access(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add = ("access", "add", "eve", folder / "eve", "--role", "observer", "--folder", folder)
    assert run(capsys, *add)[:2] == (0, f"{folder / 'eve'}\n")
    before = (folder / "eve/certificate.pem").read_bytes()
    assert run(capsys, *add)[0] == 2
    assert (folder / "eve/certificate.pem").read_bytes() == before
    assert run(capsys, *add, "--again")[0] == 0
    assert run(capsys, "access", "revoke", "eve", "--folder", folder)[1] == "observer eve is shut out\n"
    listed = json.loads(run(capsys, "access", "list", "--folder", folder, "--format", "json")[1])["people"]
    assert [(p["name"], p["role"], p["is_revoked"]) for p in listed] == [
        ("eve", "observer", True),
        ("operator", "operator", False),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("site", "add", "a.b"),
        ("site", "add", "../a"),
        ("site", "revoke", "nobody"),
        ("access", "revoke", "nobody"),
        ("access", "add", "e ve", "out", "--role", "observer"),
        ("access", "add", "eve", "out", "--role", "worker"),
        ("site", "add", "a", "--workers", "0"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    folder: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err
    assert not (folder / "out").exists()


# ---------------------------------------------------------------- keys that lie where an identity shall be made


def test_a_key_that_somebody_put_there_gets_no_certificate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "eve"
    out.mkdir(mode=0o700)
    planted = new_key()
    (out / "key.pem").write_bytes(planted)
    (out / "key.pem").chmod(0o600)
    add = ("access", "add", "eve", out, "--role", "observer", "--folder", folder)
    status, _, err = run(capsys, *add)
    assert (status, "key.pem is there, and is not the key that eve was given" in err.replace("\n", " ")) == (2, True)
    assert json.loads(run(capsys, "access", "list", "--folder", folder, "--format", "json")[1])["people"] == [
        person
        for person in json.loads(run(capsys, "access", "list", "--folder", folder, "--format", "json")[1])["people"]
        if person["name"] != "eve"
    ]
    assert (out / "key.pem").read_bytes() == planted
