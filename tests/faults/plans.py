"""Plans that kill where a bug is suspected: at every step once, or around a few steps again and again."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.schedule import COORDINATOR

_COMMITS = 100  # of one life, at most


class EachStep:
    """Plans that kill these processes at every step once, at the first time they come to it; then they may live."""

    def __init__(self, steps: Iterable[str], folder: Path, keys: Collection[str]) -> None:
        self._steps = sorted(steps)
        self._folder = folder
        self._done: dict[str, set[str]] = {key: set() for key in keys}

    def __call__(self, key: str, life: int) -> str:
        """See PlanOf."""
        if key not in self._done:
            return ""
        if life:
            self._done[key].add(last_step(self._folder / f"{key}.{life - 1}.trace"))
        return ",".join(f"kill@{step}" for step in self._steps if step not in self._done[key])


@dataclass(frozen=True)
class Around:
    """Plans that kill at the same few steps again and again, a little later each time, to find one kind of bug."""

    steps: Sequence[str]
    keys: Collection[str]
    refuses_commits: bool = False  # the coordinator's disk is full at every second commit
    kills: int = 24  # of each process

    def __call__(self, key: str, life: int) -> str:
        """See PlanOf."""
        plan = []
        if key in self.keys and life < self.kills:
            plan.append(f"kill@{self.steps[life % len(self.steps)]}:{1 + life * 2 % 7}")
        if self.refuses_commits and key == COORDINATOR:
            # Requests share commits as they happen to meet, so nobody can say which commit will hold an update; and
            # who is refused once is recorded the next time.
            full = range(4 + life % 2, _COMMITS, 2)
            plan += [f"fail@journal.committing:{at}=ENOSPC" for at in full]
        return ",".join(plan)


def last_step(trace: Path) -> str:
    """At which a process ended; empty if it came to none."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return lines[-1].split()[1] if lines else ""
