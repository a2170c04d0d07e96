"""The child processes of a federation on this machine: each with a log file, watched while they run, ended with it.

That holds for an error and for Ctrl-C, not if the command itself is killed (SIGKILL): nobody is left to end them.
Only processes that were started here are ever signalled.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from cli.errors import Failed
from cli.words import plain

Result = TypeVar("Result")

LAST_LINES = 12
GOODBYE_SECONDS = 15.0  # between asking a process to end and ending it
_REAP_SECONDS = 5.0
_LAST_BYTES = 16 << 10  # of a log, when its last lines are looked for


@dataclass(frozen=True)
class Child:
    """One process and where its words go."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self.process.returncode is not None

    def failure(self, what: str) -> Failed:
        """What happened to it, in a sentence, and the end of its log."""
        return Failed("\n".join([f"{self.name} {what}; the end of its log ({self.log}):", *last_lines(self.log)]))

    def signal(self, kind: signal.Signals) -> None:
        """Sends a signal to its process group, if it is still there."""
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)


class Children:
    """Processes that do not outlive this context: asked to end first, killed if they do not."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await end(reversed(self._children))
        finally:
            for child in self._children:  # also when a second Ctrl-C ends the patience above
                child.signal(signal.SIGKILL)

    async def start(self, name: str, *arguments: str, log: Path) -> Child:
        """Starts `raflora ARGUMENTS`; standard output and error go to the log."""
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cli.main",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C reaches the command alone, and it ends them in order
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises Failed if one of them has failed."""
        for child in self._children:
            if child.process.returncode:
                raise child.failure(_how_it_ended(child.process.returncode))


async def until_told_to_end(work: Coroutine[Any, Any, Result], on_interrupt: Callable[[], None]) -> Result:
    """The work's result; SIGTERM and a closed terminal end it as Ctrl-C does, with every child process."""
    running = asyncio.create_task(work)
    told: list[str] = []

    def stop(kind: signal.Signals) -> None:
        told.append(kind.name)
        running.cancel()

    loop = asyncio.get_running_loop()
    for kind in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(kind, stop, kind)
    try:
        return await running
    except asyncio.CancelledError:
        if told:
            raise Failed(f"ended by {told[0]}; every process that was started has been ended") from None
        on_interrupt()
        raise


async def end(children: Iterable[Child]) -> None:
    """Asks all to end and waits for them; who does not listen is killed."""
    listed = list(children)
    for child in listed:
        child.signal(signal.SIGTERM)
    if await _all_ended(listed, GOODBYE_SECONDS):
        return
    for child in listed:
        child.signal(signal.SIGKILL)
    await _all_ended(listed, _REAP_SECONDS)


async def wait_for(children: Iterable[Child], seconds: float) -> None:
    """Waits until all have ended by themselves and well. Raises Failed for one that has not."""
    listed = list(children)
    await _all_ended(listed, seconds)
    for child in listed:
        if child.process.returncode is None:
            raise child.failure(f"should have ended by now, but still runs after {seconds:g} s")
        if child.process.returncode:
            raise child.failure(_how_it_ended(child.process.returncode))


async def output_of(name: str, *arguments: str, log: Path, seconds: float) -> str:
    """Runs `python ARGUMENTS` to its end; what it printed, while its complaints go to the log. Raises Failed."""
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
        )
    child = Child(name, process, log)
    try:
        async with asyncio.timeout(seconds):
            printed, _ = await process.communicate()
    except TimeoutError:
        raise child.failure(f"took longer than {seconds:g} s") from None
    finally:
        if not child.has_ended:
            child.signal(signal.SIGKILL)
            await asyncio.wait_for(process.communicate(), _REAP_SECONDS)
    if process.returncode:
        raise child.failure(_how_it_ended(process.returncode))
    return printed.decode(errors="replace")


def last_lines(log: Path) -> list[str]:
    """The end of a log, indented; one line that says so if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_BYTES))
            lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return [f"  (cannot be read: {error.strerror})"]
    return [f"  {plain(line)}" for line in lines[-LAST_LINES:]] or ["  (empty)"]


async def _all_ended(children: list[Child], seconds: float) -> bool:
    waiting = [asyncio.ensure_future(child.process.wait()) for child in children]
    if not waiting:
        return True
    try:
        _, late = await asyncio.wait(waiting, timeout=seconds)
        return not late
    finally:
        for task in waiting:
            task.cancel()


def _how_it_ended(status: int) -> str:
    if status < 0:
        how = f"was ended by signal {signal.Signals(-status).name}"
        return f"{how} (often the system, short of memory)" if -status == signal.SIGKILL else how
    return f"ended with exit code {status}"
