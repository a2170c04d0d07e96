"""The verbs of observers and operators against a real gRPC server that says canned things."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from canned_coordinator import Canned, client, serving, summary, training
from raflora.v1 import admin_pb2

from cli.main import main
from common.errors import NotFinite, RafloraError, StaleRound, UnknownClient
from worker.identity import touch_alive

NOBODY = "127.0.0.1:1"  # a port that nobody listens on


def test_status_is_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned()) as address:
        assert main(["status", "--coordinator", address]) == 0
    shown = capsys.readouterr()
    assert "round 2/20  training  1 of 2 updates, quorum 2, deadline in 42 s" in shown.out
    assert "90.0 %" in shown.out
    assert shown.err == ""


def test_status_as_json_is_json_with_the_names_of_the_wire_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(Canned()) as address:
        assert main(["status", "--format", "json", "--coordinator", address]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phase"] == "PHASE_TRAINING"
    assert found["last_round"]["effective_rank"] == 3.25
    assert found["warnings"] == ["bob is late"]
    assert found["paused"] is False  # present although it is the default
    assert found["bytes_sent"] == str(3 << 20)  # 64 bits do not fit every JSON reader's numbers


def test_the_environment_names_the_coordinator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Canned()) as address:
        monkeypatch.setenv("RAFLORA_COORDINATOR", address)
        assert main(["status"]) == 0
    assert "digits" in capsys.readouterr().out


def test_rounds_of_many_pages_are_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    canned = Canned(rounds=[summary(number) for number in range(1, 251)])
    with serving(canned) as address:
        assert main(["rounds", "--format", "json", "--coordinator", address]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["round"] for r in found["rounds"]] == list(range(1, 251))
    assert found["more"] is False
    assert len(canned.asked) == 3


def test_rounds_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(rounds=[summary(1)])) as address:
        assert main(["rounds", "--coordinator", address]) == 0
    assert "1-2:2 3-4:2" in capsys.readouterr().out


def test_clients_are_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    canned = Canned(clients=[client(f"site-{number:03}", 2) for number in range(120)])
    with serving(canned) as address:
        assert main(["clients", "--coordinator", address]) == 0
        assert capsys.readouterr().out.count("site-") == 120
        assert main(["clients", "--format", "json", "--coordinator", address]) == 0
    assert len(json.loads(capsys.readouterr().out)["clients"]) == 120


@pytest.mark.parametrize(
    ("verb", "request_"),
    [
        (["pause"], admin_pb2.PauseRequest()),
        (["resume"], admin_pb2.ResumeRequest()),
        (["close-round", "3"], admin_pb2.CloseRoundRequest(round=3)),
        (["abort-round", "3"], admin_pb2.AbortRoundRequest(round=3)),
        (["evict", "bob", "--reason", "broken"], admin_pb2.EvictClientRequest(client_id="bob", reason="broken")),
        (["set-rank", "bob", "8"], admin_pb2.SetClientRankRequest(client_id="bob", lora_rank=8)),
    ],
)
def test_an_operators_verb_is_one_call(verb: list[str], request_: object, capsys: pytest.CaptureFixture[str]) -> None:
    canned = Canned()
    with serving(canned) as address:
        assert main([*verb, "--coordinator", address]) == 0
    assert canned.asked == [request_]
    assert capsys.readouterr().out == "noted\n"


@pytest.mark.parametrize(
    "error",
    [StaleRound("round 3 is not open; 4 is"), UnknownClient("bob never joined"), NotFinite("lora_A holds nan")],
)
def test_a_refusal_is_one_line_and_exit_code_3(error: RafloraError, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(error=error)) as address:
        assert main(["close-round", "3", "--coordinator", address]) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith(str(error))
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_coordinator_that_is_not_there_is_one_line_and_exit_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--coordinator", NOBODY]) == 4
    shown = capsys.readouterr()
    assert shown.err.startswith(f"coordinator {NOBODY} cannot be reached: connection refused; is the coordinator")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "--wach"], "Unknown option: --wach. Did you mean --watch?"),
        (["stats"], 'Unknown command "stats"'),
        (["status", "--format", "xml"], 'Invalid value "xml"'),
        (["close-round"], "raflora close-round: ROUND is required"),
        (["access", "add", "eve", "folder"], "raflora access add: --role with a value is required"),
        (["close-round", "-1"], ""),
        (["set-rank", "bob", "many"], 'unable to convert "many"'),
        (["status", "--timeout", "0"], "Must be > 0"),
        (["status", "--coordinator", "nowhere"], "expected HOST:PORT"),
        (["status", "--coordinator", "hub:1", "--ca-file", "/no/such/file"], "/no/such/file cannot be read"),
        (["worker", "--config", "/no/such.toml"], "/no/such.toml: there is no such file"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""


def test_what_a_server_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(error=StaleRound("\x1b[2Jgone"))) as address:
        assert main(["pause", "--coordinator", address]) == 3
    assert "\x1b" not in capsys.readouterr().err


def test_a_coordinator_that_serves_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned()) as address:
        assert main(["health", "--coordinator", address]) == 0
    assert capsys.readouterr().out == "serving\n"


def test_a_coordinator_that_does_not_serve_or_answer_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(serving=False)) as address:
        assert main(["health", "--coordinator", address]) == 1
        assert f"coordinator {address} says NOT_SERVING" in capsys.readouterr().err
    assert main(["health", "--coordinator", NOBODY]) == 1


def test_a_worker_is_alive_as_long_as_it_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--worker", str(tmp_path)]) == 1
    touch_alive(tmp_path, now=0)
    assert main(["health", "--worker", str(tmp_path)]) == 1
    touch_alive(tmp_path, now=os.stat(tmp_path).st_mtime)
    assert main(["health", "--worker", str(tmp_path), "--max-age", "3600"]) == 0
    assert capsys.readouterr().out == "alive\n"


def test_the_help_lists_every_verb_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, sentence in [
        ("status", "Shows where the federation stands"),
        ("set-rank", "Grants a client another rank"),
        ("worker", "Trains this site's data"),
        ("config", "Prints every setting of a role"),
    ]:
        (line,) = [line for line in text.splitlines() if f" {verb} " in line and sentence[:20] in line]
        assert sentence[:20] in line


def test_version_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.count(".") >= 1


def test_the_settings_of_a_worker_are_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "worker"]) == 0
    assert "| `rank` | integer, >= 0, <= 4096 | `0` |" in capsys.readouterr().out


def test_a_terminal_that_cannot_draw_a_bar_gets_question_marks() -> None:
    with serving(Canned(status=training())) as address:
        ended = subprocess.run(
            [sys.executable, "-m", "cli.main", "status", "--coordinator", address],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stderr
    assert b"1-2  ????" in ended.stdout
