"""Our round: a coordinator process, and the workers in a process of their own; every submission durable and merged."""

import asyncio
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.interleaved import Turn
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.programs import Program, tree_cpu_seconds
from benchmarks.rounds.shapes import RANK

_ROUND_SECONDS = 120.0
_START_SECONDS = 60.0


@dataclass
class OurRounds:
    """A federation that waits for the next order."""

    coordinator: CoordinatorProcess
    workers: Program
    played: int = 0

    def turn(self) -> Turn:
        """From the moment when every worker holds a task to the moment when every one holds the next."""
        self.played += 1
        self.workers.ask(f"prepare {self.played}", _ROUND_SECONDS)
        before = tree_cpu_seconds(self.coordinator.pid)
        played = self.workers.ask("round", _ROUND_SECONDS)
        coordinator_seconds = tree_cpu_seconds(self.coordinator.pid) - before
        return Turn(played["wall_seconds"], played["cpu_seconds"] + coordinator_seconds)


@contextmanager
def our_rounds(folder: Path, num_workers: int, num_modules: int) -> Generator[OurRounds]:
    """Both processes, in an empty folder."""
    with asyncio.Runner() as runner:
        coordinator = CoordinatorProcess(folder, settings_of(num_workers))
        try:
            runner.run(coordinator.start())
            command = (sys.executable, "-m", "benchmarks.rounds.workers")
            given = (coordinator.address, str(folder), str(num_workers), str(num_modules))
            with Program((*command, *given), folder / "workers.log") as workers:
                workers.hear(_START_SECONDS)
                yield OurRounds(coordinator, workers)
        finally:
            runner.run(coordinator.kill())


def settings_of(num_workers: int) -> dict[str, dict[str, object]]:
    """A federation that goes on from round to round as fast as its workers do."""
    return {
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes"]},
        "adapter": {"target_modules": ["layer"], "global_rank": RANK},
        "rounds": {
            "num_rounds": 100_000,
            "min_clients": num_workers,
            "round_deadline_seconds": 7200,
            "lease_ttl_seconds": 3600,
            "evaluate_every": 0,
        },
        # Nobody trains here, so a client changes more in a minute than an operator would let one.
        "limits": {"changes": 1_000_000},
        "training": {"learning_rate": 0.1},
    }
