"""`raflora status --watch`: follows, survives a restart, ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO

import pytest
from canned_coordinator import Canned, finished, serving, training
from rich.console import Console

from cli.connection import Connection
from cli.main import main
from cli.status import LiveView, watch_status

SECONDS = 60


@contextmanager
def watching(address: str) -> Iterator["subprocess.Popen[str]"]:
    """The command in a process of its own; its standard output is a pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "status", "--watch", "--coordinator", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def test_a_watcher_without_a_terminal_gets_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    same, later = training(), training()
    same.explanation = "1 of 2 updates, quorum 2, deadline in 41 s"  # only the clock went on
    later.round = 3
    with serving(Canned(watched=[training(), same, later, finished()])) as address:
        assert main(["status", "--watch", "--coordinator", address]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "accuracy" not in line]
    assert [line.split("  ")[:2] for line in lines] == [
        ["round 2/20", "training"],
        ["! bob is late"],  # a warning once, when it comes
        ["round 3/20", "training"],
        ["round 20/20", "finished"],
    ]


def test_a_watcher_in_json_gets_a_line_for_each_message(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(watched=[training(), finished()])) as address:
        assert main(["status", "--watch", "--format", "json", "--coordinator", address]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [status["phase"] for status in found] == ["PHASE_TRAINING", "PHASE_FINISHED"]


def test_a_coordinator_that_was_never_there_ends_the_watch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", "--coordinator", "127.0.0.1:1"]) == 4
    assert "cannot be reached: connection refused" in capsys.readouterr().err


def test_a_watcher_survives_a_restart_of_the_coordinator() -> None:
    canned = Canned(watched=[training()])
    with serving(canned) as address, watching(address) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.stdout.readline().startswith("round 2/20  training")
        assert process.stdout.readline() == "! bob is late\n"
        assert "reconnecting in" in process.stdout.readline()
        canned.watched = [finished()]
        rest, complaints = process.communicate(timeout=SECONDS)
    assert "round 20/20  finished" in rest
    assert complaints == ""
    assert process.returncode == 0


def test_a_watcher_survives_a_time_in_which_nobody_listens() -> None:
    with ExitStack() as first_life:
        address = first_life.enter_context(serving(Canned(watched=[training()])))
        with watching(address) as process:
            assert process.stdout is not None
            process.stdout.readline()
            first_life.close()
            while "connection refused" not in process.stdout.readline():
                assert process.poll() is None
            with serving(Canned(watched=[finished()]), port=int(address.rpartition(":")[2])):
                rest, complaints = process.communicate(timeout=SECONDS)
    assert "round 20/20  finished" in rest
    assert complaints == ""  # gRPC's core would write its notices over the screen
    assert process.returncode == 0


async def test_a_terminal_keeps_the_last_screen_while_it_reconnects() -> None:
    screen = StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=140, height=50))
    view.show(training())
    view.lost("coordinator cannot be reached; reconnecting in 1.0 s")
    with serving(Canned(watched=[finished()])) as address:
        await watch_status(Connection(coordinator=address), view)
    frames = screen.getvalue().split("reconnecting in 1.0 s")
    assert "10/40" in frames[0]
    assert "10/40" in frames[1]  # under the notice
    assert "finished" in frames[-1]
