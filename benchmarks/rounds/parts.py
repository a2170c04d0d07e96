"""Rounds of two workers, ours and Flower's in turn, and a thousand workers that wait.

Ours: a coordinator process and two workers without a model that speak through the worker's own client; slices are
fetched and checked, updates are hashed, sent, durable, inspected and merged, the next adapter is published and the next
round is open. Flower's: SuperLink, two SuperNodes, and what send_and_receive takes inside a ServerApp whose ClientApp
answers with as many numbers as it was sent; nothing is averaged there and nothing is on disk.
"""

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.interleaved import Figure, Goal, Spread, Turn, cpu_ratio, wall_ratio
from benchmarks.load import idle
from benchmarks.programs import ProgramFailed, take_turns
from benchmarks.report import NOT_MEASURED
from benchmarks.rivals.environment import Rivals, prepare
from benchmarks.rivals.flower import flower_rounds
from benchmarks.rounds.ours import our_rounds
from benchmarks.rounds.shapes import RANK, modules_for, spec_of
from common.codec import Layout

PART = "rounds"
WORKERS = 2
IDLE_WORKERS = 1000
_IDLE_SECONDS = 30.0
_KB_A_KIB = 1.024
_OURS = "ours, all of it: durable, inspected, merged, published, the next round open"
_THEIRS = "Flower's send_and_receive with its default settings, to two SuperNodes"
_RATIO = "Flower's seconds over ours, taken turn by turn"
_CPU_RATIO = "the same in CPU seconds of all processes, which no waiting between looks adds to"
_IDLE = f"taken once, over {_IDLE_SECONDS:g} s; every worker has a TCP connection of its own and a long poll open"


@dataclass(frozen=True)
class Size:
    """A round of so many bytes each way and worker."""

    label: str
    megabytes: float
    goal: Goal  # of Flower's wall time over ours

    @property
    def num_modules(self) -> int:
        """Of our adapter."""
        return modules_for(self.megabytes)

    @property
    def flower_bytes(self) -> int:
        """As many as ours has; none at all in an empty round, in which ours has to send a tiny adapter."""
        return Layout(spec_of(self.num_modules), RANK).size_bytes if self.num_modules else 0


SIZES = {
    "empty": Size("empty round of 2 workers", 0, Goal(500, 2000)),
    "10mb": Size("round of 2 workers, 10 MB each way", 10, Goal(50, 80)),
    "50mb": Size("round of 2 workers, 50 MB each way", 50, Goal(15, 20)),
}


def figures(progress: Callable[[str], None], only: str | None, repetitions: int) -> list[Figure]:
    """All cases, or one: empty, 10mb, 50mb, idle. `progress` is told what is being done."""
    sizes = [size for name, size in SIZES.items() if only in {None, name}]
    found = []
    if sizes:
        found = _rounds(prepare(progress), sizes, repetitions, progress)
    if only in {None, "idle"}:
        progress(f"{IDLE_WORKERS:,} workers wait")
        found += _idle()
    return found


def _rounds(rivals: Rivals, sizes: list[Size], repetitions: int, progress: Callable[[str], None]) -> list[Figure]:
    """With Flower, or without it where it cannot run."""
    if why := rivals.why_not("flwr"):
        return _alone(sizes, repetitions, why, progress)
    try:
        return _beside_flower(rivals, sizes, repetitions, progress)
    except ProgramFailed as error:
        return _alone(sizes, repetitions, str(error), progress)


def _beside_flower(
    rivals: Rivals, sizes: list[Size], repetitions: int, progress: Callable[[str], None]
) -> list[Figure]:
    found = []
    progress("starting Flower")
    with (
        tempfile.TemporaryDirectory(prefix="raflora-flower-") as folder,
        flower_rounds(rivals, Path(folder), WORKERS) as flower,
    ):
        for size in sizes:
            turns = _turns(size, {"flower": partial(flower.turn, size.flower_bytes)}, repetitions, progress)
            found += _compared(size, turns["ours"], turns["flower"])
    return found


def _alone(sizes: list[Size], repetitions: int, why: str, progress: Callable[[str], None]) -> list[Figure]:
    found = []
    for size in sizes:
        ours = _turns(size, {}, repetitions, progress)["ours"]
        found += [Figure(PART, f"{size.label}, against Flower's", NOT_MEASURED, "x", size.goal, why)]
        found += _seconds(f"{size.label}, ours", ours, _OURS)
    return found


def _turns(
    size: Size, others: Mapping[str, Callable[[], Turn]], repetitions: int, progress: Callable[[str], None]
) -> dict[str, list[Turn]]:
    with (
        tempfile.TemporaryDirectory(prefix="raflora-rounds-") as folder,
        our_rounds(Path(folder) / "federation", WORKERS, size.num_modules) as ours,
    ):
        contenders = {"ours": ours.turn, **others}
        return take_turns(contenders, repetitions, lambda name: progress(f"{size.label}: {name} had a turn"))


def _compared(size: Size, ours: list[Turn], flower: list[Turn]) -> list[Figure]:
    return [
        Figure(PART, f"{size.label}, against Flower's", wall_ratio(flower, ours), "x", size.goal, _RATIO),
        Figure(PART, f"{size.label}, against Flower's, CPU", cpu_ratio(flower, ours), "x", None, _CPU_RATIO),
        *_seconds(f"{size.label}, ours", ours, _OURS),
        *_seconds(f"{size.label}, Flower's", flower, _THEIRS),
    ]


def _seconds(name: str, turns: list[Turn], note: str) -> list[Figure]:
    return [
        Figure(PART, name, Spread.of([turn.wall_seconds for turn in turns]), "s", None, note),
        Figure(PART, f"{name}, CPU", Spread.of([turn.cpu_seconds for turn in turns]), "s", None, note),
    ]


def _idle() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="raflora-idle-") as folder:
        report = asyncio.run(idle.measure(Path(folder), IDLE_WORKERS, _IDLE_SECONDS))
    said = {figure.name: figure.value for figure in report.figures}
    cpu, memory = said["CPU of the wait"], said["memory a waiting worker"] * _KB_A_KIB
    name = f"{IDLE_WORKERS:,} workers that wait"
    return [
        Figure(PART, f"{name}: CPU", Spread.of([cpu]), "% of a core", Goal(1.0, 0.5, at_least=False), _IDLE),
        Figure(PART, f"{name}: memory each", Spread.of([memory]), "KB", Goal(100, 80, at_least=False), _IDLE),
    ]
