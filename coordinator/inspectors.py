"""The processes that look at uploads: bytes from outside are parsed where a crash hurts nobody.

The coordinator hands such a process the path of a file and takes from it nothing but an error's name and some numbers.
A process that dies, takes too long or needs too much memory costs its upload alone; the next upload gets a new one.
Processes are started when first needed, never forked, and an idle one is kept for the next coordinator in this process.
"""

import asyncio
import atexit
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from common.errors import AdapterMismatch, InspectionFailed, by_reason
from common.settings import environment_with
from coordinator.inspection import Inspection, line_of

MAX_INSPECTIONS = 4  # at one time; more wait for their turn
MAX_ANSWER_BYTES = 1 << 20
_COMMAND = (sys.executable, "-P", "-m", "coordinator.inspection")


@dataclass(frozen=True)
class Allowance:
    """What one inspection may use."""

    seconds: float
    memory_bytes: int


class Inspectors:
    """The processes of one coordinator. Call `close` at its end."""

    def __init__(self, allowance: Allowance, command: tuple[str, ...] = _COMMAND) -> None:
        self._allowance = allowance
        self._command = command
        self._threads = ThreadPoolExecutor(MAX_INSPECTIONS, thread_name_prefix="inspection")
        self._busy: set[_Process] = set()

    async def inspect(self, inspection: Inspection) -> tuple[float, ...]:
        """What inspect_file gives and raises; InspectionFailed if the process does not survive the file."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._inspect, inspection)

    def close(self) -> None:
        """Ends what is still being looked at."""
        for process in tuple(self._busy):
            process.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _inspect(self, inspection: Inspection) -> tuple[float, ...]:
        process = _parked_or_new(self._command)
        self._busy.add(process)
        try:
            answer = process.ask(inspection, self._allowance)
        except BaseException:
            process.end()
            raise
        finally:
            self._busy.discard(process)
        _park(process)
        return _norms_in(answer, inspection)


class _Process:
    """One process that looks at one file after another."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.command = command
        self._running = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # its answers say what went wrong; a library's last words are not ours
            start_new_session=True,  # a Ctrl-C is for the coordinator, which still has answers to give
            # One thread: BLAS reserves address space for each before the limit is known.
            env=environment_with(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        )
        self._lock = threading.Lock()  # no kill for being late reaches a process that has answered
        self._is_asked = False
        self._is_late = False

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._running.poll() is None

    def ask(self, inspection: Inspection, allowance: Allowance) -> dict[str, Any]:
        """Its answer. Raises InspectionFailed if there is none; then it must be ended."""
        self._is_asked, self._is_late = True, False
        started = time.monotonic()
        timer = threading.Timer(allowance.seconds, self._end_for_being_late)
        timer.daemon = True
        timer.start()
        try:
            line = self._exchange(line_of(inspection, seconds=allowance.seconds, memory_bytes=allowance.memory_bytes))
        finally:
            timer.cancel()
            with self._lock:
                self._is_asked = False
        # On a busy machine an answer can come before the timer is heard; it is late all the same.
        self._is_late = self._is_late or time.monotonic() - started > allowance.seconds
        answer = {} if self._is_late else _answer_in(line)
        if answer.get("failed") is None and answer:
            return answer
        raise InspectionFailed(
            f"{inspection.whose}: the process that looked at this update {self._ending(answer, allowance)}; "
            "the update is forgotten"
        )

    def _ending(self, answer: dict[str, Any], allowance: Allowance) -> str:
        if answer:
            return str(answer["failed"]) or f"needed more than {allowance.memory_bytes} bytes of memory"
        if self._is_late:
            return f"took longer than {allowance.seconds:g} s"
        self.kill()  # it may live, and have said nothing that can be understood
        status = self._running.wait()
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def kill(self) -> None:
        """At once."""
        self._running.kill()

    def end(self) -> None:
        """And leaves nothing behind."""
        self.kill()
        self._running.wait()
        for pipe in (self._running.stdin, self._running.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it was not yet told, it need not know
                    pipe.close()

    def _exchange(self, line: bytes) -> bytes:
        stdin, stdout = self._running.stdin, self._running.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("two pipes were asked for")
        try:
            stdin.write(line)
            stdin.flush()
            return stdout.readline(MAX_ANSWER_BYTES)
        except BrokenPipeError:
            return b""

    def _end_for_being_late(self) -> None:
        with self._lock:
            if self._is_asked:
                self._is_late = True
                self.kill()


_parking = threading.Lock()
_parked: list[_Process] = []


def _parked_or_new(command: tuple[str, ...]) -> _Process:
    with _parking:
        for process in [p for p in _parked if p.command == command]:
            _parked.remove(process)
            if process.is_alive:
                return process
            process.end()
    return _Process(command)


def _park(process: _Process) -> None:
    with _parking:
        if len(_parked) < MAX_INSPECTIONS:
            _parked.append(process)
            return
    process.end()


@atexit.register
def _end_the_parked() -> None:
    with _parking:
        while _parked:
            _parked.pop().end()


def _answer_in(line: bytes) -> dict[str, Any]:
    """What the process said; nothing if it died over it."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _norms_in(answer: dict[str, Any], inspection: Inspection) -> tuple[float, ...]:
    if "norms" in answer:
        return tuple(float(norm) for norm in answer["norms"])
    kind = by_reason(str(answer.get("reason")))
    if not issubclass(kind, AdapterMismatch):
        kind = InspectionFailed
    raise kind(str(answer.get("message", f"{inspection.whose}: refused")))
