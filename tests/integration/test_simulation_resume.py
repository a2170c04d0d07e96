"""A simulated run that is killed goes on where it was: the same bytes and rows as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy_site
import pytest
from numpy_site import NumpyWork, material_on, run_plan

from coordinator.stores.journal import SqlJournal
from simulation.results import read_results
from simulation.run import play_on


def kill_in_the_middle(folder: Path, method: str, at_training: int) -> None:
    """Plays the run as a process of its own and kills it, -9, while a client trains."""
    command = [sys.executable, numpy_site.__file__, str(folder), method, str(at_training)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert any(line == "asleep\n" for line in process.stdout), "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)


def kinds_in(folder: Path) -> list[tuple[int, str]]:
    journal = SqlJournal(f"sqlite:///{folder / 'journal.sqlite'}")
    try:
        return [(entry.sequence, entry.kind) for entry in journal.read("points")]
    finally:
        journal.close()


@pytest.mark.parametrize(("method", "at_training"), [("raflora", 20), ("fedex-lora", 9), ("flexlora", 2)])
def test_a_killed_run_ends_as_an_undisturbed_one(method: str, at_training: int, tmp_path: Path) -> None:
    plan, whole, killed = run_plan(method={"method": method}), tmp_path / "whole", tmp_path / "killed"
    play_on(plan, material_on(NumpyWork()), whole)
    kill_in_the_middle(killed, method, at_training)
    assert not (killed / "finished").exists()

    work = NumpyWork()
    play_on(plan, material_on(work), killed)

    assert len(work.trained) == 24 - at_training // 6 * 6, "only the round that was cut short is trained again"
    one, other = read_results(whole), read_results(killed)
    assert (one.rounds, one.partitions, one.accuracy) == (other.rounds, other.partitions, other.accuracy)
    assert kinds_in(killed) == kinds_in(whole)
    blobs = [{path.name for path in (folder / "blobs").glob("??/*")} for folder in (whole, killed)]
    assert blobs[0] == blobs[1]
