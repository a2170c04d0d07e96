"""Processes that a measurement starts: what they say, what they cost, and their end.

Some take turns by lines: an order on their input, one line of JSON as the answer. Such contenders tell themselves what
a turn took; the order of the turns is that of `benchmarks.interleaved`.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.interleaved import Turn
from benchmarks.load.usage import children_of

_NICE = 5  # as the coordinator of the load tests has it: nobody here runs before anybody else
_GOODBYE_SECONDS = 15.0
_QUOTED_CHARACTERS = 1500
_TICKS = os.sysconf("SC_CLK_TCK")


class ProgramFailed(Exception):
    """A program ended or said nothing; the message has the end of its log."""


class Program:
    """A process that never outlives its context. What it says to people goes to the log."""

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, answers: bool = True
    ) -> None:
        """`answers`: it takes orders on its input; otherwise all that it prints goes to the log, too."""
        self.log = log
        self._name = Path(command[0]).name
        self._lines = b""
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                ("nice", "-n", str(_NICE), *command),
                stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
                stdout=subprocess.PIPE if answers else sink,
                stderr=sink,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    def ask(self, order: str, seconds: float) -> dict[str, Any]:
        """The answer. Raises ProgramFailed."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.complaint("has ended") from None
        return self.hear(seconds)

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line. Raises ProgramFailed if none comes in time."""
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._lines:
            if not select.select([descriptor], [], [], seconds)[0]:
                raise self.complaint(f"said nothing for {seconds:g} s")
            if not (read := os.read(descriptor, 1 << 16)):
                raise self.complaint("has ended")
            self._lines += read
        line, _, self._lines = self._lines.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Ends it and all that it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        started = [self.pid, *children_of(self.pid)]
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GOODBYE_SECONDS)

    def complaint(self, what: str) -> ProgramFailed:
        """That this happened, and what the program said last."""
        said = self.log.read_text(errors="replace")[-_QUOTED_CHARACTERS:].strip()
        return ProgramFailed(f"{self._name} {what}: {said}")


def take_turns(
    contenders: Mapping[str, Callable[[], Turn]], repetitions: int, after_turn: Callable[[str], None] = lambda _: None
) -> dict[str, list[Turn]]:
    """Every contender's measured turns, in the order of the rounds."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, play in contenders.items():
            turn = play()
            if repetition > 0:
                turns[name].append(turn)
            after_turn(name)
    return turns


def tree_cpu_seconds(pid: int) -> float:
    """User and system time of a process, of all that it started, and of those of them that have ended."""
    return sum(_cpu_seconds(one) for one in (pid, *children_of(pid)))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS
