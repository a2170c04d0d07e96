"""Owns the trainer process, or the group of them: starts it, speaks to it, notices its death, kills it.

The trainer is started when it is needed and stays, with the base model in memory, also when a task is dropped. It
is killed if it does not answer, and when the worker ends; the next task then starts it afresh.
Nothing here imports torch.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from common.errors import RafloraError
from common.settings import environment_alone
from worker.config import LaunchConfig
from worker.launch import Meeting, first_of, group_command, group_environment
from worker.trainer_protocol import (
    MAX_LINE_BYTES,
    Answer,
    DryRun,
    DryRunDone,
    Evaluate,
    Evaluated,
    Failed,
    Load,
    Loaded,
    ProgressMade,
    Request,
    Stop,
    Train,
    Trained,
    answer_from_line,
    to_line,
)

DEFAULT_COMMAND = (sys.executable, "-m", "worker.trainer")
MAX_LOAD_SECONDS = 6 * 3600.0  # a base model may have to come over a slow line first
MAX_START_SECONDS = 900.0  # of a group, until its first process speaks; a cluster's launcher may be slow
STOP_SECONDS = 20.0  # between telling the trainer to drop a task and killing it: one step of a slow model
_REMEMBERED_LINES = 8  # of the trainer's stderr, for the message when it has died
_LONGEST_QUOTE = 600
_MAX_STDERR_BYTES = 64 << 10  # a longer line is passed through in pieces
_REAP_SECONDS = 5.0

Expected = TypeVar("Expected", Loaded, Trained, Evaluated, DryRunDone)
OnProgress = Callable[[ProgressMade], None]

log = structlog.get_logger()


class TrainerDied(RafloraError):
    """The trainer process ended, or no longer speaks the protocol."""

    reason = "trainer_died"


class TaskFailed(RafloraError):
    """The trainer lives, but could not do it; `word` says why in one word ("out_of_memory")."""

    reason = "task_failed"

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


@dataclass(frozen=True)
class _Process:
    """A running trainer, its pipes and its last words."""

    process: asyncio.subprocess.Process
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    last_words: deque[str]
    listening: asyncio.Task[None]
    is_group: bool = False

    def kill(self) -> None:
        """Ends it and everything it started: data loader workers must not outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.is_group:
            # Launchers put their processes into sessions of their own. Those end with their launcher, and also
            # where that is on another machine, as soon as the first one loses its agent.
            self.stdin.close()

    async def reap(self) -> None:
        """Waits for its end and its last words; not for ever, as a stray child may keep the pipes open."""
        try:
            async with asyncio.timeout(_REAP_SECONDS):
                await self.process.wait()
                await self.listening
        except TimeoutError:
            self.listening.cancel()


class TrainerProcess:
    """One trainer at a time. Cancelling a task makes it drop the task; cancelling a load, or taking too long, kills it.

    Raises TrainerDied, or TaskFailed with the trainer's own reason.
    """

    def __init__(
        self,
        max_task_seconds: float,
        command: Sequence[str] = DEFAULT_COMMAND,
        launch: LaunchConfig = LaunchConfig(),
    ) -> None:
        self._max_task_seconds = max_task_seconds
        self._command = tuple(command)
        self._launch = launch
        self._running: _Process | None = None
        self._order: Load | None = None
        self._loaded: Loaded | None = None
        self._is_over = False

    async def load(self, order: Load) -> Loaded:
        """Loads model and data; the same order is not carried out twice by a trainer that lives."""
        if self._order != order:
            await self.stop()
            self._order, self._loaded = order, None
        if self._running is None or self._loaded is None:
            return await self._start(order)
        return self._loaded

    async def train(self, request: Train, on_progress: OnProgress) -> Trained:
        """Trains one slice."""
        return await self._work(request, Trained, on_progress)

    async def evaluate(self, request: Evaluate, on_progress: OnProgress) -> Evaluated:
        """Evaluates one slice."""
        return await self._work(request, Evaluated, on_progress)

    async def dry_run(self, request: DryRun, on_progress: OnProgress) -> DryRunDone:
        """Measures on a base model that the trainer loads by itself; a trainer that failed is not used again."""
        if self._running is None:
            self._running = await _spawn(self._command)
        try:
            return await self._ask(request, DryRunDone, on_progress)
        except TaskFailed:
            await self.stop()  # what an out-of-memory left behind would be measured too
            raise

    def kill(self) -> None:
        """Kills the trainer for good and at once: who cancels a task afterwards need not wait for its next step."""
        self._is_over = True
        if self._running is not None:
            self._running.kill()

    async def stop(self) -> None:
        """Kills the trainer; the next task starts a new one."""
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            await running.reap()

    async def _work(self, request: Request, expected: type[Expected], on_progress: OnProgress) -> Expected:
        if self._order is None:
            raise RuntimeError("load() comes before any task")
        if self._running is None:
            await self._start(self._order)
        return await self._ask(request, expected, on_progress)

    async def _start(self, order: Load) -> Loaded:
        """A fresh trainer with model and data loaded."""
        await self.stop()
        is_group = self._launch.is_group
        self._running = await (_spawn_group(self._command, self._launch) if is_group else _spawn(self._command))
        log.info("trainer started", pid=self._running.process.pid, is_group=is_group)
        try:
            loaded = await self._ask(order, Loaded, _ignore)
        except TaskFailed:
            await self.stop()  # it lives, but without a model it is of no use to the next task
            raise
        before, self._loaded = self._loaded, loaded
        if before is not None and _identity_of(before) != _identity_of(loaded):
            await self.stop()
            raise TaskFailed("model_error", "the base model or its modules changed since this worker joined")
        return loaded

    async def _ask(self, request: Request, expected: type[Expected], on_progress: OnProgress) -> Expected:
        """One request and its answer; whatever goes wrong but an orderly failure, the trainer is gone afterwards."""
        running = self._running
        if running is None:
            raise RuntimeError("there is no trainer to ask")
        limit_seconds = MAX_LOAD_SECONDS if isinstance(request, Load | DryRun) else self._max_task_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                answer = await _converse(running, request, on_progress)
        except TimeoutError:
            await self.stop()
            what = type(request).__name__.lower()
            raise TaskFailed("time_limit", f"trainer: {what} took longer than {limit_seconds:g} s") from None
        except asyncio.CancelledError:
            await self._interrupt(running, request)
            raise
        except BaseException:
            await self.stop()
            raise
        if isinstance(answer, Failed):
            if answer.fatal:
                await self.stop()
            raise TaskFailed(answer.reason, answer.message)
        if not isinstance(answer, expected):
            await self.stop()
            raise TrainerDied(f"trainer: answered {type(answer).__name__} to {type(request).__name__}")
        return answer

    async def _interrupt(self, running: _Process, request: Request) -> None:
        """Makes the trainer drop what it does; it lives on if it says so in time."""
        has_dropped = False
        try:
            if not isinstance(request, Load) and not self._is_over:
                async with asyncio.timeout(STOP_SECONDS):
                    answer = await _converse(running, Stop(), _ignore)
                has_dropped = not (isinstance(answer, Failed) and answer.fatal)
        except (TimeoutError, TrainerDied) as error:
            log.warning("the trainer did not stop its task and is killed", why=str(error) or "no answer in time")
        finally:
            if not has_dropped:
                await self.stop()


async def _spawn(command: Sequence[str]) -> _Process:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
        start_new_session=True,
        env=environment_alone(),  # without the join token: the trainer runs code of the model's libraries
    )
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError("three pipes were asked for")
    last_words: deque[str] = deque(maxlen=_REMEMBERED_LINES)
    listening = asyncio.create_task(_pass_through(process.stderr, last_words))
    return _Process(process, process.stdin, process.stdout, last_words, listening)


async def _spawn_group(trainer: Sequence[str], launch: LaunchConfig) -> _Process:
    """Starts the launcher and waits for the group's first process. Raises ConfigError, TrainerDied or TaskFailed."""
    meeting = Meeting()
    try:
        await meeting.open()
        process = await asyncio.create_subprocess_exec(
            *group_command(launch, trainer, meeting.path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=group_environment(launch),
        )
        if process.stdout is None:
            raise RuntimeError("a pipe was asked for")
        last_words: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        listening = asyncio.create_task(_pass_through(process.stdout, last_words))
        return await _met(process, meeting, last_words, listening)
    finally:
        meeting.close()


async def _met(
    process: asyncio.subprocess.Process, meeting: Meeting, last_words: deque[str], listening: asyncio.Task[None]
) -> _Process:
    ended = asyncio.create_task(process.wait())
    try:
        connection = await first_of(meeting, ended, MAX_START_SECONDS)
        if connection is None:
            await asyncio.wait({listening}, timeout=_REAP_SECONDS)
            raise TrainerDied(_how_it_ended(process.returncode, last_words))
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, TimeoutError):
            what = f"trainer: no process of the group came within {MAX_START_SECONDS:g} s"
            raise TaskFailed("time_limit", what) from None
        raise
    finally:
        ended.cancel()
    return _Process(process, connection[1], connection[0], last_words, listening, is_group=True)


async def _converse(running: _Process, request: Request, on_progress: OnProgress) -> Answer:
    """Writes the request and reads until something other than progress comes. Raises TrainerDied."""
    try:
        running.stdin.write(to_line(request))
        await running.stdin.drain()
        while line := await running.stdout.readline():
            answer = answer_from_line(line)
            if not isinstance(answer, ProgressMade):
                return answer
            on_progress(answer)
    except ConnectionError:
        pass  # it is gone, and what it left behind says more than the pipe
    except (ValueError, RafloraError) as error:
        log.warning("the trainer said something that is no message", error=str(error))
        raise TrainerDied("trainer: said something that is no message; the worker's log says more") from None
    raise TrainerDied(await _epitaph(running))


async def _epitaph(running: _Process) -> str:
    """How a trainer ended whose pipes are closed, in a sentence."""
    await running.reap()
    status = running.process.returncode
    if status is None:
        return "trainer closed its output and went on without us"
    return _how_it_ended(status, running.last_words)


def _how_it_ended(status: int | None, last_words: Sequence[str]) -> str:
    if status is None:
        return "trainer ended"
    how = f"exit code {status}"
    if status < 0:
        how = f"signal {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += " (often the system, short of memory)"
    log.warning("trainer ended", how=how, last_words=" | ".join(last_words)[-_LONGEST_QUOTE:])
    # What it wrote may hold local data; it stays in the site's log.
    return f"trainer ended with {how}; the worker's log has its last words"


async def _pass_through(stderr: asyncio.StreamReader, last_words: deque[str]) -> None:
    """Everything that the trainer writes to stderr goes to ours, as it is."""
    while data := await stderr.read(_MAX_STDERR_BYTES):
        text = data.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        last_words.extend(line.strip() for line in text.splitlines() if line.strip())


def _identity_of(loaded: Loaded) -> tuple[object, ...]:
    return loaded.base_model_digest, loaded.modules, loaded.tensors


def _ignore(progress: ProgressMade) -> None:
    """Loading has no steps that anybody counts."""
