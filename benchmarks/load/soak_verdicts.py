"""What a soak's samples say: straight lines through them, and whether every promise was kept."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.load.report import Figure
from benchmarks.load.soak_workers import Key
from benchmarks.load.usage import Usage
from coordinator.federation.events import RoundOpened, UpdateAccepted
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal

# A slope is flat if it is not surely above its bound: twice its standard error is taken off before they are compared.
# A federation remembers every round and who contributed, so memory is counted against contributions.
MEMORY_KIB_A_CONTRIBUTION = 4.0
HANDLES_A_HOUR = 20.0  # troubles come by the thousand an hour: a leak of one a trouble is far above
THREADS_A_HOUR = 20.0
FILES_A_HOUR = 20.0
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


@dataclass(frozen=True)
class Slope:
    """A straight line's rise, and how well it is known."""

    rise: float
    error: float  # standard error

    @property
    def least(self) -> float:
        """What it surely is at least; 0 if it may be nothing."""
        return max(0.0, self.rise - 2 * self.error)


def slope(samples: Sequence[Sample], x: Callable[[Sample], float], y: Callable[[Sample], float]) -> Slope:
    """Least squares with one slope for all lives of the coordinator and an intercept for each."""
    across: list[float] = []
    up: list[float] = []
    lives = 0
    for life in {sample.life for sample in samples}:
        warm = [s for s in samples if s.life == life and s.life_seconds >= WARM_UP_SECONDS]
        if len(warm) > 1:
            xs, ys = np.array([x(s) for s in warm]), np.array([y(s) for s in warm])
            across += list(xs - xs.mean())
            up += list(ys - ys.mean())
            lives += 1
    spread, freedom = float(np.dot(across, across)), len(across) - lives - 1
    if not spread or freedom < 1:
        return Slope(0.0, 0.0)
    rise = float(np.dot(across, up)) / spread
    rest = np.array(up) - rise * np.array(across)
    return Slope(rise, float(np.sqrt(np.dot(rest, rest) / freedom / spread)))


def figures_of(samples: Sequence[Sample], promises: Promises, start_seconds: Sequence[float]) -> tuple[Figure, ...]:
    """Slopes with their bounds, promises, and what grows by design without one."""
    last = samples[-1]
    contributions = promises.acknowledged / max(1, last.rounds)  # a round
    # What outlives the process is one line over all lives.
    one_life = [replace(sample, life=0, life_seconds=sample.at_seconds) for sample in samples]
    return (
        *_flat(
            "memory a contribution",
            slope(samples, lambda s: s.rounds * contributions, lambda s: s.usage.anonymous_bytes / 1024),
            "KiB",
            MEMORY_KIB_A_CONTRIBUTION,
        ),
        *_flat("open files an hour", slope(samples, _hours, lambda s: s.usage.handles), "", HANDLES_A_HOUR),
        *_flat("threads an hour", slope(samples, _hours, lambda s: s.usage.threads), "", THREADS_A_HOUR),
        *_flat("files in the state folder an hour", slope(one_life, _hours, lambda s: s.blobs), "", FILES_A_HOUR),
        Figure("journal a round, for ever", last.journal_bytes / max(1, last.rounds) / 1024, "KiB"),
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


def _flat(name: str, found: Slope, unit: str, bound: float) -> tuple[Figure, Figure]:
    return Figure(name, found.rise, unit), Figure(f"{name}, surely", found.least, unit, bound)


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


def _hours(sample: Sample) -> float:
    return sample.at_seconds / 3600
