"""Named steps at which a test may make this process die or fail: every write, fsync, rename and commit, every answer.

In a process that nobody armed a step costs one comparison. Nothing here knows what the steps mean; docs/reliability.md
lists them. A plan says what happens where, several things with commas between them:

    kill@137                            kill -9 at the 137th step of this process, whichever it is
    kill@file.renamed:2                 at the second time that it comes to this step
    fail@bytes.syncing=EIO              this step raises OSError(EIO), once
    fail@file.writing:3+=ENOSPC         from the third time on, always
    trace=FILE                          appends a line for each step: its number, its name
"""

import atexit
import errno
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import ConfigError

Watch = Callable[[str], None]

_watch: Watch | None = None
_POINT = re.compile(
    r"(?P<what>kill|fail)@(?:(?P<number>[0-9]+)|(?P<step>[a-z_]+\.[a-z_]+)(?::(?P<hit>[0-9]+))?)(?P<onwards>\+)?"
    r"(?:=(?P<error>[A-Z]+))?"
)


def reach(step: str) -> None:
    """Says that the process has come to this step ("file.renamed"). Raises whatever the watch raises."""
    if _watch is not None:
        _watch(step)


def arm(watch: Watch | None) -> None:
    """From now on `watch` is told every step of this process; None: nobody is."""
    global _watch  # noqa: PLW0603 - one process, one watch, set before it works
    _watch = watch


@dataclass(frozen=True)
class Point:
    """Where something happens, and what."""

    hit: int  # the how-manieth time that the step is reached, from 1
    step: str = ""  # empty: all steps are counted together
    onwards: bool = False  # not once but from then on
    error: int = 0  # an errno; 0: kill -9

    def is_met(self, step: str, number: int, hit: int) -> bool:
        """Whether it happens now: at this step, the process's `number`th, this one for the `hit`th time."""
        if self.step and step != self.step:
            return False
        count = hit if self.step else number
        return count >= self.hit if self.onwards else count == self.hit


@dataclass(frozen=True)
class Plan:
    """What happens to a process, and where it writes its steps down."""

    points: tuple[Point, ...] = ()
    trace: str = ""  # a file; empty: nowhere


def parse_plan(text: str) -> Plan:
    """The plan that a text spells. Raises ConfigError."""
    points: list[Point] = []
    trace = ""
    for part in text.split(","):
        if part.startswith("trace=") and part != "trace=":
            trace = part.removeprefix("trace=")
        else:
            points.append(_point_of(part))
    return Plan(tuple(points), trace)


def arm_as_planned(text: str) -> None:
    """Carries a plan out in this process from now on; an empty one arms nothing. Raises ConfigError.

    At its end the process names the steps of the plan that it never came to: a mistyped one looks like a passed test.
    """
    if text:
        executor = _Executor(parse_plan(text))
        atexit.register(executor.tell_what_was_not_met)
        arm(executor)


def _point_of(text: str) -> Point:
    match = _POINT.fullmatch(text)
    wants_error = match is not None and match["what"] == "fail"
    if match is None or wants_error != (match["error"] is not None) or (wants_error and match["error"] not in _ERRORS):
        raise ConfigError(
            f"failpoints: {text!r}; expected kill@NUMBER, kill@STEP:HIT, fail@STEP:HIT=ENOSPC or trace=FILE"
        )
    hit = int(match["number"] or match["hit"] or 1)
    if hit < 1:
        raise ConfigError(f"failpoints: {text!r}: steps and hits are counted from 1")
    error = _ERRORS[match["error"]] if wants_error else 0
    return Point(hit, match["step"] or "", match["onwards"] is not None, error)


_ERRORS = {name: number for number, name in errno.errorcode.items()}


class _Executor:
    """Counts the steps of all threads and does what the plan says."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._number = 0
        self._hits: Counter[str] = Counter()
        self._trace = -1
        if plan.trace:
            self._trace = os.open(plan.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, step: str) -> None:
        with self._lock:  # so that the last line of the trace is the step at which the process dies
            self._number += 1
            self._hits[step] += 1
            if self._trace >= 0:
                os.write(self._trace, f"{self._number} {step}\n".encode())
            met = [p for p in self._plan.points if p.is_met(step, self._number, self._hits[step])]
            if any(point.error == 0 for point in met):
                os.kill(os.getpid(), signal.SIGKILL)
        if met:
            raise OSError(met[0].error, f"{os.strerror(met[0].error)} (as planned, at {step})")

    def tell_what_was_not_met(self) -> None:
        never = sorted({point.step for point in self._plan.points if point.step and not self._hits[point.step]})
        if never:
            sys.stderr.write(f"failpoints: this process never came to {', '.join(never)}\n")
