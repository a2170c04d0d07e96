"""`raflora doctor` names the cause: each one produced for real, none of them mended by it."""

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from canned_coordinator import Canned
from canned_coordinator import serving as canned_serving
from coordinators import settings_of
from doctors_cases import identity, listening
from identities import Identities, serving

from cli.checks import Check, Verdict, as_json, ok, warning, worst
from cli.checks_network import Target, check_way, clock
from cli.main import main
from common.channel import Pem, Tls
from common.identity import Role, Subject
from common.moments import DAY_SECONDS
from coordinator.config import CoordinatorConfig

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
        assert (name, "it speaks TLS, but this side speaks in the clear" in found) == ("gRPC", True)


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
        (tmp_path / "token").chmod(0o644)
        code, found = await run("--config", str(worker_settings(tmp_path, f'join_token_file = "{tmp_path}/token"')))
    assert (code, found["verdict"] in {"ok", "warning"}) == (0, True), found
    names = [check["name"] for check in found["checks"]]
    assert names[:5] == ["settings", "versions", "training libraries", "join token", "identity"]
    assert [(check["verdict"], check["advice"]) for check in found["checks"] if check["name"] == "join token"] == [
        ("warning", "whether it is used up shows only at the start"),
        ("warning", f"chmod 600 {tmp_path}/token"),
    ]
    assert names[-4:] == ["state_dir", "model", "data.train", "device"]
    assert not (tmp_path / "state").exists()  # nothing was changed


def test_what_failed_is_a_line_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = worker_settings(tmp_path, 'address = "127.0.0.1:1"')
    assert main(["doctor", "--config", str(settings), "--set", "launch.shard_base=true"]) == 1
    shown = capsys.readouterr().out
    assert "failed  TCP" in shown
    assert "-> is the coordinator running there" in shown
    assert "failed  launch" in shown


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
