"""What both fuzzers show: progress, a table of outcomes, and whether memory stayed flat."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
ALLOWED_GROWTH_BYTES = 24 << 20  # over all of a run, after its first quarter
ENOUGH_SAMPLES = 8  # below, what a process takes at its start looks like a trend


def resident_bytes(pid: int | str = "self") -> int:
    """Of a process, now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


@dataclass
class Flatness:
    """How the memory of one process went with its work."""

    samples: list[tuple[int, int]] = field(default_factory=list)  # work done, bytes

    def note(self, done: int, size_bytes: int) -> None:
        """A sample."""
        self.samples.append((done, size_bytes))

    @property
    def growth_bytes(self) -> float:
        """Of a straight line through the samples after the first quarter of the work."""
        kept = sorted(self.samples)[len(self.samples) // 4 :]
        if len(kept) < 2:
            return 0.0
        return self.slope * (kept[-1][0] - kept[0][0])

    @property
    def slope(self) -> float:
        """Bytes for one more piece of work."""
        kept = sorted(self.samples)[len(self.samples) // 4 :]
        if len(kept) < 2:
            return 0.0
        done, sizes = np.array(kept, dtype=np.float64).T
        return float(np.polynomial.Polynomial.fit(done, sizes, 1).convert().coef[-1])

    @property
    def is_flat(self) -> bool:
        """Whether it stayed within what is allowed."""
        return self.growth_bytes <= ALLOWED_GROWTH_BYTES

    @property
    def sentence(self) -> str:
        """For people."""
        sizes = [size for _, size in sorted(self.samples)]
        ends = f"{sizes[0] / 2**20:.1f} MiB at first, {sizes[-1] / 2**20:.1f} MiB at last"
        if len(sizes) < ENOUGH_SAMPLES:
            return f"{ends} ({len(sizes)} samples: too few for a trend)"
        return f"{ends}, {self.slope:+.1f} bytes for one more (from {len(sizes)} samples)"


class Progress:
    """One line that is written over on a terminal, and one line for every tenth elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, max(1, total)
        self._started = time.monotonic()
        self._tenths = 0

    def show(self, done: int, breaches: int) -> None:
        """So far."""
        seconds = max(1e-3, time.monotonic() - self._started)
        bar = "#" * (30 * done // self._total)
        line = f"[{bar:<30}] {done}/{self._total} {self._what}, {done / seconds:.0f} a second, {breaches} wrong"
        if sys.stderr.isatty():
            print(f"\r{line}", end="" if done < self._total else "\n", file=sys.stderr, flush=True)
        elif 10 * done // self._total > self._tenths:
            self._tenths = 10 * done // self._total
            print(line, file=sys.stderr, flush=True)


def print_outcomes(what: str, outcomes: Mapping[tuple[str, str], int]) -> None:
    """A row for each kind, a column for each reason."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for (kind, outcome), count in outcomes.items():
        rows[kind][outcome] += count
    for kind in sorted(rows):
        told = ", ".join(f"{outcome} {count}" for outcome, count in rows[kind].most_common())
        print(f"{kind:<34} {told}")
    reasons = sorted({outcome for _, outcome in outcomes})
    print(f"{len(rows)} kinds of {what}, {len(reasons)} outcomes: {', '.join(reasons)}")
