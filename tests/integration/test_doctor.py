"""`raflora doctor` names the cause: each one produced for real, none of them mended by it."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from canned_coordinator import Canned
from canned_coordinator import serving as canned_serving
from coordinators import settings_of
from identities import Identities, serving

from cli.checks import Check, Verdict, as_json, ok, warning, worst
from cli.checks_coordinator import check_coordinator
from cli.checks_machine import check_data, check_device, check_disk, check_model, check_private
from cli.checks_network import Target, check_certificate_files, check_identity, check_join_token, check_way, clock
from cli.main import main
from common.channel import Pem, Tls
from common.identity import Role, Subject
from common.identity_folder import IdentityFolder
from coordinator.config import CoordinatorConfig
from coordinator.identity.authority import DAY_SECONDS
from coordinator.stores.lock import lock_state_folder
from worker.config import DataConfig, ModelConfig

SECONDS = 1.0  # of patience with the silent ones


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@asynccontextmanager
async def federation(folder: Path, identities: Identities, **identity: Any) -> AsyncIterator[str]:
    settings = settings_of(folder / "federation", server__identity=identities.settings(**identity))
    async with serving(CoordinatorConfig.model_validate(settings)) as address:
        yield address


async def way(address: str, tls: Tls | Pem | None, **how: Any) -> dict[str, Check]:
    return {check.name: check async for check in check_way(Target(address, tls, how.pop("seconds", 10.0), **how))}


def only_failure(checks: dict[str, Check]) -> tuple[str, str]:
    failures = [check for check in checks.values() if check.verdict is Verdict.FAILED]
    assert len(failures) == 1, checks
    assert failures[0].advice
    return failures[0].name, failures[0].found


# --- the way to the coordinator


async def test_a_worker_that_may_come_in_sees_only_ok(identities: Identities, tmp_path: Path) -> None:
    async with federation(tmp_path, identities) as address:
        checks = await way(address, identities.worker("clinic-a"))
    assert {check.verdict for check in checks.values()} == {Verdict.OK}
    assert list(checks) == ["address", "DNS", "TCP", "TLS", "gRPC", "federation", "clock"]
    assert checks["federation"].found.startswith("digits, base model tiny; protocol 1")


async def test_an_operator_and_a_token_get_as_far_as_they_may(identities: Identities, tmp_path: Path) -> None:
    async with federation(tmp_path, identities) as address:
        for pem, is_token in (
            (identities.person("eve", Role.OPERATOR), False),
            (identities.joining("clinic-a"), True),
        ):
            checks = await way(address, pem, is_join_token=is_token)
            assert worst(checks.values()) is Verdict.OK
            assert checks["federation"].found.startswith("serving")
    assert not identities.registry.site("clinic-a").token.keys  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("address", "name", "cause"),
    [
        ("http://coordinator:7070", "address", "HOST:PORT alone"),
        ("coordinator", "address", "expected HOST:PORT"),
        ("no-such-host.invalid:7070", "DNS", "the name no-such-host.invalid cannot be resolved"),
        ("127.0.0.1:1", "TCP", "nothing listens on this port"),
    ],
)
async def test_before_anybody_answers(address: str, name: str, cause: str) -> None:
    found = only_failure(await way(address, None))
    assert found[0] == name
    assert cause in found[1]


@contextmanager
def listening(answer: bytes | None, *, reads: bool = True, backlog: int = 8) -> Iterator[str]:
    """A program that is no coordinator: says this to everybody, None: nothing at all; closes the connection then."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield "127.0.0.1:{}".format(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in held:
            connection.close()


HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "name", "cause"),
    [
        (HTTP, "gRPC", "a web server answers (HTTP/1)"),
        (b"220 mail.example ESMTP\r\n", "gRPC", "no gRPC server"),
        (b"", "gRPC", "closed the connection"),
        (None, "gRPC", "nothing answers"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "gRPC", "it speaks TLS, but this side speaks in the clear"),
    ],
)
async def test_in_the_clear_other_programs_are_recognised(answer: bytes | None, name: str, cause: str) -> None:
    with listening(answer) as address:
        found = only_failure(await way(address, None, seconds=SECONDS))
    assert found[0] == name
    assert cause in found[1]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (HTTP, "it does not speak TLS"),
        (b"", "closed during the TLS handshake"),
        (None, "no TLS answer within 1 s"),
    ],
)
async def test_with_tls_too(identities: Identities, answer: bytes | None, cause: str) -> None:
    with listening(answer) as address:
        name, found = only_failure(await way(address, identities.nobody(), seconds=SECONDS))
    assert name == "TLS"
    assert cause in found


async def test_a_machine_that_drops_every_packet() -> None:
    # A full queue of connections that nobody accepts: the kernel drops the next greeting, as a firewall does.
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        name, found = only_failure(await way(f"127.0.0.1:{address[1]}", None, seconds=SECONDS))
        for one in waiting:
            one.close()
    assert name == "TCP"
    assert "does not answer within 1 s: a firewall" in found


async def test_whose_certificate_is_wrong_and_how(identities: Identities, tmp_path: Path) -> None:
    good, stranger = identities.worker("clinic-a"), Identities(tmp_path / "stranger")
    worker = Subject(Role.WORKER, "clinic-a", "clinic-a")
    cases = {
        "another authority than the one that this side trusts": Pem(
            stranger.authority.certificate, good.certificate, good.key
        ),
        "this side shows none": identities.nobody(),
        "this side's certificate has expired": identities.issued_at(time.time() - 9 * DAY_SECONDS, worker),
        "this side's certificate is not valid yet": identities.issued_at(time.time() + 9 * DAY_SECONDS, worker),
        "does not accept this side's certificate": identities.of_a_stranger(worker),
    }
    async with federation(tmp_path, identities) as address:
        for cause, pem in cases.items():
            name, found = only_failure(await way(address, pem))
            assert name == "TLS"
            assert cause in found
        name, found = only_failure(await way(address, None))
        assert (name, "speaks TLS" in found or "closed" in found) == ("gRPC", True)


async def test_a_coordinator_under_another_name(identities: Identities, tmp_path: Path) -> None:
    async with federation(tmp_path, identities, names=["coordinator.example"]) as address:
        name, found = only_failure(await way(address, identities.worker("clinic-a")))
    assert name == "TLS"
    assert "is for coordinator.example, not for 127.0.0.1" in found


@pytest.mark.parametrize(
    ("days", "cause"), [(-40.0, "the coordinator's certificate has expired"), (40.0, "is not valid yet")]
)
async def test_a_coordinator_whose_clock_or_certificate_is_wrong(tmp_path: Path, days: float, cause: str) -> None:
    there = time.time() + days * DAY_SECONDS
    identities = Identities(tmp_path / "authority")
    settings = settings_of(tmp_path / "federation", server__identity=identities.settings())
    async with serving(CoordinatorConfig.model_validate(settings), lambda: there) as address:
        name, found = only_failure(await way(address, identities.worker("clinic-a")))
    assert name == "TLS"
    assert cause in found
    assert "this machine's clock: " in found


async def test_who_was_shut_out_is_told(identities: Identities, tmp_path: Path) -> None:
    pem = identities.worker("clinic-a")
    identities.registry.revoke_site("clinic-a")
    async with federation(tmp_path, identities) as address:
        name, found = only_failure(await way(address, pem))
    assert (name, "took this identity back" in found) == ("federation", True)


async def test_a_grpc_server_that_is_no_coordinator() -> None:
    with canned_serving(Canned()) as address:  # serves the status, not the federation
        name, found = only_failure(await way(address, None))
    assert name == "federation"
    assert "is a gRPC server, but no coordinator" in found


@pytest.mark.parametrize(("ahead", "words"), [(90.0, "1 min 30 s behind"), (-7200.0, "2 h 0 min ahead of")])
def test_clocks_that_differ_are_told_apart(ahead: float, words: str) -> None:
    assert clock(ahead).verdict is Verdict.WARNING
    assert words in clock(ahead).found
    assert clock(59.0).verdict is Verdict.OK


# --- papers


def identity(folder: Path, pem: Pem) -> IdentityFolder:
    kept = IdentityFolder(folder)
    for name, content in (("ca.pem", pem.authority), ("key.pem", pem.key), ("certificate.pem", pem.certificate)):
        kept.write(name, content or b"")
    return kept


def test_a_certificates_days_are_counted(identities: Identities, tmp_path: Path) -> None:
    folder, now = identity(tmp_path / "identity", identities.worker("clinic-a")), time.time()
    verdicts = [
        [check.verdict for check in check_identity(folder, now + days * DAY_SECONDS)] for days in (0, 25, 31, -1)
    ]
    assert verdicts == [[Verdict.OK], [Verdict.WARNING], [Verdict.FAILED], [Verdict.FAILED]]


def test_a_key_that_others_can_read_is_named(identities: Identities, tmp_path: Path) -> None:
    folder = identity(tmp_path / "identity", identities.worker("clinic-a"))
    (folder.path / "key.pem").chmod(0o644)
    found = list(check_identity(folder, time.time()))[-1]
    assert (found.verdict, "has mode 644" in found.found) == (Verdict.FAILED, True)
    assert found.advice == f"chmod 600 {folder.path / 'key.pem'}"


def test_a_token_is_read_without_being_used(identities: Identities) -> None:
    token = identities.invite("clinic-a")
    assert check_join_token(token, time.time()).verdict is Verdict.OK
    late = check_join_token(token, time.time() + 8 * DAY_SECONDS)
    assert (late.verdict, "raflora site add clinic-a --again" in late.advice) == (Verdict.FAILED, True)


def test_files_of_ones_own_authority_are_looked_at(identities: Identities, tmp_path: Path) -> None:
    folder, now = identity(tmp_path / "identity", identities.worker("clinic-a")), time.time()
    for days, verdict in ((0, Verdict.OK), (25, Verdict.WARNING), (31, Verdict.FAILED)):
        assert next(check_certificate_files(folder.tls, now + days * DAY_SECONDS)).verdict is verdict
    missing = Tls(tmp_path / "none.pem")
    assert "none.pem" in next(check_certificate_files(missing, now)).found


# --- the machine


def only(checks: Iterator[Check]) -> Check:
    (check,) = checks
    return check


def test_a_folder_that_keeps_what_it_is_given(tmp_path: Path) -> None:
    assert only(check_disk("state_dir", tmp_path)).verdict in {Verdict.OK, Verdict.WARNING}
    assert only(check_disk("state_dir", tmp_path / "not" / "there")).verdict in {Verdict.OK, Verdict.WARNING}
    assert list(tmp_path.iterdir()) == []


def test_a_network_file_system_is_warned_of(tmp_path: Path) -> None:
    mounts = f"22 1 0:20 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / {tmp_path} rw - nfs4 server:/export rw\n"
    found = only(check_disk("state_dir", tmp_path, mounts))
    assert (found.verdict, "on a network file system (nfs4)" in found.found) == (Verdict.WARNING, True)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    assert "is a file, not a folder" in only(check_disk("state_dir", tmp_path / "state" / "deeper")).found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(b"\0" * 100_000)
    found = only(check_disk("state_dir", small_disk))
    assert (found.verdict, found.found) == (Verdict.FAILED, f"{small_disk}: the disk is full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to by this user" in only(check_disk("state_dir", tmp_path / "state")).found


def test_a_model_folder_is_whole_or_says_what_is_missing(tmp_path: Path) -> None:
    assert "no such folder" in check_model(ModelConfig(path=str(tmp_path / "none"))).found
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors: No such file" in check_model(ModelConfig(path=str(tmp_path))).found
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert check_model(ModelConfig(path=str(tmp_path))).verdict is Verdict.FAILED
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "model-1.safetensors: No such file" in check_model(ModelConfig(path=str(tmp_path))).found
    (tmp_path / "model-1.safetensors").write_bytes(b"12345678")
    assert check_model(ModelConfig(path=str(tmp_path))).verdict is Verdict.OK
    assert "a hub id" in check_model(ModelConfig(path="distilbert/distilbert-base-uncased")).found


def test_data_is_there_or_is_named(tmp_path: Path) -> None:
    train, empty = tmp_path / "train.jsonl", tmp_path / "test.csv"
    train.write_text("{}\n")
    empty.touch()
    good, bad = check_data(DataConfig(train=str(train), test=str(empty)))
    assert (good.verdict, bad.verdict, bad.name) == (Verdict.OK, Verdict.FAILED, "data.test")
    assert "No such file" in only(check_data(DataConfig(train=str(tmp_path / "none.jsonl")))).found
    assert "is a folder" in only(check_data(DataConfig(train=str(tmp_path)))).found
    assert "a hub data set" in only(check_data(DataConfig(train="stanfordnlp/imdb"))).found


def python_that_says(folder: Path, words: str) -> str:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{words}\n")
    program.chmod(0o755)
    return str(program)


def test_the_device_is_asked_for_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert check_device(ModelConfig(path="m", device="cpu")).verdict is Verdict.OK
    broken = check_device(ModelConfig(path="m"), python_that_says(tmp_path, "exit 1"))
    assert (broken.verdict, broken.found) == (Verdict.FAILED, "torch cannot be imported")
    two = python_that_says(tmp_path, "echo 2.13.0+cu130 True 2")
    assert check_device(ModelConfig(path="m"), two).verdict is Verdict.OK
    assert check_device(ModelConfig(path="m", device="cuda:2"), two).verdict is Verdict.FAILED
    none = python_that_says(tmp_path, "echo 2.13.0+cpu False 0")
    assert check_device(ModelConfig(path="m", device="cuda"), none).verdict is Verdict.FAILED


def test_secrets_are_for_their_owner(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (found,) = check_private("authority", {"it": tmp_path, "what is not there": tmp_path / "none"}, warning)
    assert (found.verdict, found.advice) == (Verdict.WARNING, f"chmod 700 {tmp_path}")


# --- a coordinator's machine


def coordinator_checks(folder: Path, **changes: Any) -> dict[str, Check]:
    config = CoordinatorConfig.model_validate(settings_of(folder / "federation", **changes))
    return {check.name: check for check in check_coordinator(config, time.time())}


def test_a_coordinator_that_could_start(identities: Identities, tmp_path: Path) -> None:
    checks = coordinator_checks(tmp_path, server__identity=identities.settings())
    assert worst(checks.values()) in {Verdict.OK, Verdict.WARNING}
    assert checks["authority"].found.startswith("raflora authority of tests, until ")
    assert not (tmp_path / "federation" / "state").exists()


def test_a_port_that_is_taken_by_another_program(tmp_path: Path) -> None:
    with listening(b"") as address:
        found = coordinator_checks(tmp_path, server__listen=address)["port"]
        assert found.verdict is Verdict.FAILED
        with lock_state_folder(tmp_path / "federation" / "state"):
            checks = coordinator_checks(tmp_path, server__listen=address)
    assert checks["port"].found == f"{address} is taken, by the coordinator that runs"
    assert checks["lock"].found == f"a coordinator runs on this state_dir (process {os.getpid()})"


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    state = tmp_path / "federation" / "state"
    state.mkdir(parents=True)
    (state / "journal.sqlite").write_bytes(b"this is no database" * 100)
    assert coordinator_checks(tmp_path)["journal"].verdict is Verdict.FAILED


def test_an_authority_that_others_can_read_or_that_is_not_there(identities: Identities, tmp_path: Path) -> None:
    identities.folder.chmod(0o755)
    assert coordinator_checks(tmp_path, server__identity=identities.settings())["authority"].verdict is Verdict.FAILED
    missing = coordinator_checks(tmp_path, server__identity={"folder": str(tmp_path / "none")})
    assert "raflora init" in missing["security"].found


def test_an_open_door_is_told(tmp_path: Path) -> None:
    assert coordinator_checks(tmp_path, server__listen="0.0.0.0:0")["security"].verdict is Verdict.FAILED
    warned = coordinator_checks(tmp_path, server__listen="0.0.0.0:0", server__insecure=True)["security"]
    assert warned.verdict is Verdict.WARNING


# --- the verb


def worker_settings(folder: Path, coordinator: str) -> Path:
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    path = folder / "worker.toml"
    path.write_text(
        f'rank = 4\nstate_dir = "{folder}/state"\n[coordinator]\n{coordinator}\n'
        f'[model]\npath = "{folder}/model"\ndevice = "cpu"\n[data]\ntrain = "{folder}/train.jsonl"\n'
    )
    return path


async def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "doctor", "--format", "json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, json.loads(said or "{}") or {"said": complaint.decode()}


async def test_a_worker_with_a_token_before_its_first_start(identities: Identities, tmp_path: Path) -> None:
    async with federation(tmp_path, identities) as address:
        (tmp_path / "token").write_text(identities.issuer.invite(
            "clinic-a", workers=1, days=7, again=False, address=address
        )[1].text)  # fmt: skip
        code, found = await run("--config", str(worker_settings(tmp_path, f'join_token_file = "{tmp_path}/token"')))
    assert (code, found["verdict"] in {"ok", "warning"}) == (0, True), found
    names = [check["name"] for check in found["checks"]]
    assert names[:5] == ["settings", "versions", "training libraries", "join token", "identity"]
    assert names[-4:] == ["state_dir", "model", "data.train", "device"]
    assert not (tmp_path / "state").exists()  # nothing was changed


def test_what_failed_is_a_line_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = worker_settings(tmp_path, 'address = "127.0.0.1:1"')
    assert main(["doctor", "--config", str(settings)]) == 1
    shown = capsys.readouterr().out
    assert "failed   TCP" in shown
    assert "-> is the coordinator running there" in shown


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("rank = 4\nranks = 5\n[data]\ntrain = 'x'\n[model]\npath = 'x'\n", "there is no such key; did you mean rank?"),
        ("rank = \n", "not valid TOML"),
        ("name = 'x'\n", "neither clearly a worker's nor a coordinator's"),
    ],
)
def test_settings_that_are_wrong_are_the_first_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, cause: str
) -> None:
    (tmp_path / "some.toml").write_text(content)
    assert main(["doctor", "--config", str(tmp_path / "some.toml"), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in found] == ["settings"]
    assert cause in found[0]["found"]


def test_settings_and_connection_flags_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = worker_settings(tmp_path, 'address = "127.0.0.1:1"')
    assert main(["doctor", "--config", str(settings), "--coordinator", "a:1"]) == 2
    assert "the settings say how to connect" in capsys.readouterr().err


async def test_a_person_needs_nothing_but_the_identity(identities: Identities, tmp_path: Path) -> None:
    folder = identity(tmp_path / "operator", identities.person("eve", Role.OPERATOR))
    async with federation(tmp_path, identities) as address:
        folder.write("address", f"{address}\n".encode())
        code, found = await run("--identity", str(folder.path))
    assert (code, found["verdict"]) == (0, "ok"), found


def test_the_worst_is_the_verdict_on_the_whole() -> None:
    assert worst([]) is Verdict.OK
    assert as_json([ok("a", "b"), warning("c", "d", "e")]) == {
        "verdict": "warning",
        "checks": [
            {"name": "a", "verdict": "ok", "found": "b", "advice": ""},
            {"name": "c", "verdict": "warning", "found": "d", "advice": "e"},
        ],
    }
