"""The rounds that are measured are whole rounds: benchmarks/rounds and benchmarks/load/growth in small. Linux only."""

import sys
from pathlib import Path

import pytest

from benchmarks.load.growth_cases import Case
from benchmarks.load.growth_rounds import measure
from benchmarks.programs import Program, ProgramFailed
from benchmarks.rounds.ours import our_rounds

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")


def test_an_empty_round_ends_with_the_next_task_and_costs_both_processes_something(tmp_path: Path) -> None:
    with our_rounds(tmp_path / "federation", num_workers=2, num_modules=0) as ours:
        turns = [ours.turn() for _ in range(5)]
        assert not ours.workers.has_ended
    assert all(turn.wall_seconds > 0 for turn in turns)
    assert sum(turn.cpu_seconds for turn in turns) > 0
    assert ours.workers.has_ended


async def test_growth_counts_time_memory_and_bytes_of_whole_rounds(tmp_path: Path) -> None:
    row = await measure(tmp_path, Case(clients=3, global_rank=4, modules=1), num_rounds=2)
    assert 0 < row.merge_seconds < row.seconds
    assert row.coordinator_cpu_seconds > 0
    assert row.peak_mib >= row.idle_mib > 0


def test_a_program_that_ends_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such layer')")
    with Program(command, tmp_path / "log") as program, pytest.raises(ProgramFailed, match="no such layer"):
        program.hear(seconds=30)
