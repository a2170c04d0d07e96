"""What a soak's samples say: straight lines through them, and whether every promise was kept."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.load.report import Figure
from benchmarks.load.soak_workers import Key
from benchmarks.load.usage import Usage
from coordinator.federation.events import RoundOpened, UpdateAccepted
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal

# A slope within these is flat. A federation remembers every round, so memory is counted against rounds.
MEMORY_KIB_A_ROUND = 32.0
HANDLES_A_HOUR = 60.0  # connections come and go by the dozen; a leak of one a trouble makes a thousand an hour
THREADS_A_HOUR = 20.0
BLOBS_A_HOUR = 60.0
WARM_UP_SECONDS = 30.0  # of every life of the coordinator, before its samples count


@dataclass(frozen=True)
class Sample:
    """One look at coordinator and state folder."""

    at_seconds: float  # since the soak began
    life: int  # counts the coordinator's starts
    life_seconds: float  # since the last of them
    rounds: int
    usage: Usage
    disk_bytes: int  # of the whole state folder
    journal_bytes: int  # of it, the journal with its log
    blobs: int  # files beside the journal


@dataclass(frozen=True)
class Promises:
    """The acknowledgements against the journal."""

    acknowledged: int
    missing: int
    repeated: int
    entries: int


def sample_disk(state: Path) -> tuple[int, int, int]:
    """Bytes of the state folder, bytes of the journal in it, and the number of other files."""
    total = journal = files = 0
    for path in state.rglob("*"):
        try:
            size = path.stat().st_size if path.is_file() else None
        except FileNotFoundError:  # files come and go while we look
            continue
        if size is None:
            continue
        total += size
        if path.name.startswith("journal.sqlite"):
            journal += size
        else:
            files += 1
    return total, journal, files


def check_promises(journal_file: Path, federation: str, acknowledged: set[Key]) -> Promises:
    """Reads the whole journal. The coordinator must have ended."""
    journal = SqlJournal(f"sqlite:///{journal_file}")
    found: Counter[Key] = Counter()
    number = attempt = entries = 0
    try:
        for entry in journal.read(federation):
            event, entries = event_of(entry), entries + 1
            if isinstance(event, RoundOpened):
                number, attempt = event.number, event.attempt
            elif isinstance(event, UpdateAccepted):
                found[number, attempt, event.client_id, event.update.digest] += 1
    finally:
        journal.close()
    return Promises(
        acknowledged=len(acknowledged),
        missing=len(acknowledged - found.keys()),
        repeated=sum(count > 1 for count in found.values()),
        entries=entries,
    )


def slope(samples: Sequence[Sample], x: Callable[[Sample], float], y: Callable[[Sample], float]) -> float:
    """Least squares with one slope for all lives of the coordinator and an intercept for each; 0 without two points."""
    across: list[float] = []
    up: list[float] = []
    for life in {sample.life for sample in samples}:
        warm = [s for s in samples if s.life == life and s.life_seconds >= WARM_UP_SECONDS]
        if len(warm) > 1:
            xs, ys = np.array([x(s) for s in warm]), np.array([y(s) for s in warm])
            across += list(xs - xs.mean())
            up += list(ys - ys.mean())
    spread = float(np.dot(across, across))
    return float(np.dot(across, up)) / spread if spread else 0.0


def overall_slope(samples: Sequence[Sample], x: Callable[[Sample], float], y: Callable[[Sample], float]) -> float:
    """The same over all samples, for what outlives the coordinator's process."""
    if len(samples) < 2:
        return 0.0
    xs, ys = np.array([x(s) for s in samples]), np.array([y(s) for s in samples])
    return float(np.polyfit(xs, ys, 1)[0]) if np.ptp(xs) else 0.0


def figures_of(samples: Sequence[Sample], promises: Promises, start_seconds: Sequence[float]) -> tuple[Figure, ...]:
    """Slopes with their bounds, promises, and what grows by design without one."""
    last = samples[-1]
    return (
        Figure(
            "memory a round",
            slope(samples, _rounds, lambda s: s.usage.anonymous_bytes / 1024),
            "KiB",
            MEMORY_KIB_A_ROUND,
        ),
        Figure("memory an hour", slope(samples, _hours, lambda s: s.usage.anonymous_bytes / (1 << 20)), "MiB"),
        Figure("open files an hour", slope(samples, _hours, lambda s: s.usage.handles), "", HANDLES_A_HOUR),
        Figure("threads an hour", slope(samples, _hours, lambda s: s.usage.threads), "", THREADS_A_HOUR),
        Figure(
            "files in the state folder an hour", overall_slope(samples, _hours, lambda s: s.blobs), "", BLOBS_A_HOUR
        ),
        Figure(
            "journal a round (it keeps everything)",
            overall_slope(samples, _rounds, lambda s: s.journal_bytes / 1024),
            "KiB",
        ),
        Figure("state folder at the end", last.disk_bytes / (1 << 20), "MiB"),
        Figure("journal at the end", last.journal_bytes / (1 << 20), "MiB"),
        Figure("memory at the end", last.usage.rss_bytes / (1 << 20), "MiB"),
        Figure("open files at the end", last.usage.handles, ""),
        Figure("start of the coordinator, first", start_seconds[0], "s"),
        Figure("start of the coordinator, last (its journal is replayed)", start_seconds[-1], "s"),
        Figure("rounds published", last.rounds, ""),
        Figure("journal entries", promises.entries, ""),
        Figure("updates acknowledged", promises.acknowledged, ""),
        Figure("of them not in the journal", promises.missing, "", 0),
        Figure("updates in the journal twice", promises.repeated, "", 0),
    )


def draw(samples: Sequence[Sample], file: Path) -> None:
    """The samples over time as a picture. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415 - everything else works without it

    series: dict[str, Callable[[Sample], float]] = {
        "memory, MiB": lambda s: s.usage.rss_bytes / (1 << 20),
        "open files": lambda s: s.usage.handles,
        "threads": lambda s: s.usage.threads,
        "journal, MiB": lambda s: s.journal_bytes / (1 << 20),
        "other files on disk": lambda s: s.blobs,
        "rounds": lambda s: s.rounds,
    }
    canvas = Canvas(figsize=(11, 6), layout="constrained")
    for axes, (name, value) in zip(canvas.subplots(2, 3).flat, series.items(), strict=True):
        for life in sorted({s.life for s in samples}):
            lived = [s for s in samples if s.life == life]
            axes.plot([s.at_seconds / 60 for s in lived], [value(s) for s in lived], color="#1f5fa8")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("minutes")
        axes.set_ylim(bottom=0)
    canvas.savefig(file, dpi=110)


def _rounds(sample: Sample) -> float:
    return float(sample.rounds)


def _hours(sample: Sample) -> float:
    return sample.at_seconds / 3600
