"""Contenders take turns in one run, so that a busy machine slows all of them; what comes out are ratios of turns.

Every part of `make bench` measures with this: an unmeasured turn each, then `repetitions` rounds in which every
contender has one turn. A ratio is taken within a round, so that both sides of it met the same machine.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_REPETITIONS = 5  # a median of fewer says little


@dataclass(frozen=True)
class Turn:
    """What one turn of one contender took."""

    wall_seconds: float
    cpu_seconds: float  # user and system, of this process and of its children that have ended


@dataclass(frozen=True)
class Spread:
    """A median between the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Goal:
    """What the project holds itself to: a ratio, and whether more of it is better."""

    bar: float
    goal: float
    at_least: bool = True

    def says(self, value: float) -> str:
        """'goal', 'bar' or 'below' for a value reached."""
        for name, limit in (("goal", self.goal), ("bar", self.bar)):
            if (value >= limit) if self.at_least else (value <= limit):
                return name
        return "below"


@dataclass(frozen=True)
class Figure:
    """One line of a report: a measured ratio (or a quantity that needs none, such as an error), and its goal."""

    part: str  # "aggregation", "transfer", "rounds"
    name: str  # stable: the regression check finds the last one by it
    value: Spread
    unit: str  # "x", "of raw TCP", "MB", "s", ...
    goal: Goal | None = None
    note: str = ""  # what was compared, in words


def take_turns(
    contenders: Mapping[str, Callable[[], object]], repetitions: int, after_turn: Callable[[str], None] = lambda _: None
) -> dict[str, list[Turn]]:
    """Every contender's measured turns, in the order of the rounds. `after_turn` moves a progress bar."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, work in contenders.items():
            turn = timed(work)
            if repetition > 0:
                turns[name].append(turn)
            after_turn(name)
    return turns


def timed(work: Callable[[], object]) -> Turn:
    """One turn."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    work()
    return Turn(time.perf_counter() - wall, _cpu_seconds() - cpu)


def cpu_ratio(slower: list[Turn], faster: list[Turn]) -> Spread:
    """CPU seconds of the first over those of the second, round by round."""
    return Spread.of([s.cpu_seconds / f.cpu_seconds for s, f in zip(slower, faster, strict=True)])


def wall_ratio(slower: list[Turn], faster: list[Turn]) -> Spread:
    """Wall seconds of the first over those of the second, round by round."""
    return Spread.of([s.wall_seconds / f.wall_seconds for s, f in zip(slower, faster, strict=True)])


def _cpu_seconds() -> float:
    # Not os.times(), which counts in hundredths of a second: a turn may be shorter.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
