"""The parts of this benchmark, each with what the project holds itself to."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.interleaved import Figure, Goal, Spread
from benchmarks.transfer import empty, many, on_the_wire
from benchmarks.transfer.alone import MEGABYTES, Alone, Measured

Progress = Callable[[str], None]

_CLIENTS, _MEGABYTES_EACH = 8, 500
_WORKERS = 100
_WIRE_MEGABYTES = 32


def figures(progress: Progress, only: str | None, repetitions: int) -> list[Figure]:
    """What was measured; `only` one of PARTS."""
    found: list[Figure] = []
    for name, part in PARTS.items():
        if only in (None, name):
            found += part(progress, repetitions)
    return found


def _alone(progress: Progress, repetitions: int) -> list[Figure]:
    progress(f"transfers of {MEGABYTES} MB: founding")
    with _folder() as folder:
        alone = Alone(folder)
        with alone as bench:
            up = bench.uploads(alone.run, repetitions, progress)
            down = bench.downloads(alone.run, repetitions, progress)
            bare = bench.bare_downloads(alone.run, repetitions, progress)
    size = f"{MEGABYTES} MB"
    return [
        *_compared(f"upload of {size}, hashed and durable", up, Goal(0.6, 0.9)),
        *_compared(f"download of {size}, hashed and durable", down, Goal(0.6, 0.8)),
        *_compared(f"download of {size} into nothing", bare, Goal(0.6, 0.8)),
    ]


def _compared(name: str, measured: Measured, goal: Goal) -> list[Figure]:
    took = f"{measured.ours.median:.2f} s against {measured.raw.median:.2f} s"
    return [
        Figure("transfer", name, measured.wall_ratio, "of raw TCP", goal, f"wall; medians {took}"),
        Figure("transfer", f"{name}: CPU", measured.cpu_ratio, "of raw TCP", None, "CPU seconds of both ends"),
    ]


def _many(progress: Progress, repetitions: int) -> list[Figure]:
    del repetitions  # once: it takes four gigabytes of disk
    with _folder() as folder:
        seen = asyncio.run(many.measure(folder, _CLIENTS, _MEGABYTES_EACH, progress))
    name = f"{_CLIENTS} uploads of {_MEGABYTES_EACH} MB at once"
    late = sorted(1000 * seconds for seconds in seen.late_seconds)
    once = "one run; sampled inside the coordinator every 2 ms, the worst of every 0.1 s: median between least and most"
    usual = late[round(0.99 * (len(late) - 1))]
    return [
        Figure(
            "transfer", f"{name}: growth", Spread.of([seen.growth_mib]), "MiB", Goal(64, 32, at_least=False), "one run"
        ),
        Figure(
            "transfer", f"{name}: event loop late, worst", Spread.of([late[-1]]), "ms", Goal(100, 20, at_least=False)
        ),
        Figure("transfer", f"{name}: event loop late, 99 of 100 tenths", Spread.of([usual]), "ms", None),
        Figure("transfer", f"{name}: event loop late", Spread.of(late), "ms", None, once),
        Figure(
            "transfer",
            "event loop late with nothing to do, just before",
            Spread.of([1000 * seconds for seconds in seen.idle_late_seconds]),
            "ms",
            None,
            "what the machine adds: every tenth of a second, median between least and most",
        ),
        Figure("transfer", f"{name}: arrival", Spread.of([seen.seconds]), "s", None, "all bytes durable"),
    ]


def _round(progress: Progress, repetitions: int) -> list[Figure]:
    with _folder() as folder:
        course = asyncio.run(empty.measure(folder, _WORKERS, repetitions, progress))
    return [
        Figure(
            "rounds",
            f"empty round of {_WORKERS} workers",
            Spread.of(course.seconds("evaluate")),
            "s",
            Goal(0.4, 0.25, at_least=False),
            "task out, result in, every submission durable, until the next task",
        ),
        Figure(
            "rounds",
            f"round of {_WORKERS} workers with an update of some hundred bytes",
            Spread.of(course.seconds("train")),
            "s",
            None,
            "task, slice, upload, inspection, submission, merge, until the next task",
        ),
        Figure("rounds", "the same: coordinator's CPU", Spread.of(course.cpu_seconds("train")), "s", None),
        Figure("rounds", "empty round: coordinator's CPU", Spread.of(course.cpu_seconds("evaluate")), "s", None),
    ]


def _wire(progress: Progress, repetitions: int) -> list[Figure]:
    del repetitions  # bytes do not vary with the time
    progress("bytes on the wire")
    with _folder() as folder:
        share = asyncio.run(on_the_wire.share_of_planes(folder, _WIRE_MEGABYTES, seed=1))
    note = "all bytes of the connection over the file's; lora_A uniform, lora_B normal"
    return [
        Figure(
            "transfer",
            "bytes on the wire, bf16 as byte planes",
            Spread.of([share]),
            "of the file",
            Goal(0.72, 0.67, at_least=False),
            note,
        )
    ]


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="raflora-transfer-") as folder:
        yield Path(folder)


PARTS: dict[str, Callable[[Progress, int], list[Figure]]] = {
    "alone": _alone,
    "many": _many,
    "rounds": _round,
    "wire": _wire,
}
