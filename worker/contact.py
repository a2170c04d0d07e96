"""Patience: every call to the coordinator goes on until it is answered, and the log says why it has not been yet.

Time and chance are arguments, so a test needs neither.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from common.errors import RafloraError, TooBusy, Unavailable
from worker.identity import touch_alive

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
REMIND_SECONDS = 30.0
_DOUBLINGS = 10  # more than it takes from the first pause to the longest

Answer = TypeVar("Answer")

log = structlog.get_logger()


@dataclass(frozen=True)
class Clock:
    """Time and chance."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.SystemRandom().random  # in [0, 1)
    wall_time: Callable[[], float] = time.time  # only for what people read


def pause_seconds(failures: int, chance: float) -> float:
    """Full jitter: anywhere between the first pause and one that doubles with every failure, up to the longest."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * (1 << min(failures, _DOUBLINGS)))
    return FIRST_PAUSE_SECONDS + chance * (longest - FIRST_PAUSE_SECONDS)


class Contact:
    """Whether the coordinator answers, in the log and in the state folder's sign of life."""

    def __init__(self, state_dir: Path, clock: Clock) -> None:
        self._state_dir = state_dir
        self._clock = clock
        self._lost_since: float | None = None
        self._said_at = 0.0
        self._why = ""

    def made(self) -> None:
        """The coordinator has answered."""
        touch_alive(self._state_dir, self._clock.wall_time())
        if self._lost_since is not None:
            log.info("the coordinator is back", after_seconds=round(self._clock.now() - self._lost_since, 1))
            self._lost_since = None

    def lost(self, error: RafloraError) -> None:
        """It has not: says so at once, and then every so often."""
        self._why = str(error)
        if self._lost_since is None:
            self._lost_since = self._clock.now()
        elif self._until_reminder() > 0:
            return
        self._remind()

    async def insist(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """The operation's answer, however long it takes.

        Raises what the coordinator refuses for a reason; what may pass (no connection, no room, a fault
        of its own) is tried again for ever.
        """
        failures = 0
        while True:
            try:
                answer = await (operation() if self._lost_since is None else self._reminding(operation))
            except RafloraError as error:
                if not may_pass(error):
                    self.made()
                    raise
                self.lost(error)
            else:
                self.made()
                return answer
            failures += 1
            await self.pause(failures)

    async def pause(self, failures: int) -> None:
        """Waits before the next attempt, longer after more failures; the log is not silent meanwhile."""
        left = pause_seconds(failures, self._clock.chance())
        while self._lost_since is not None and left > (until := max(0.0, self._until_reminder())):
            await self._clock.sleep(until)
            left -= until
            self._remind()
        await self._clock.sleep(left)

    async def _reminding(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """The operation's answer; one that nobody answers may take longer than the log should be silent."""
        attempt = asyncio.ensure_future(operation())
        try:
            while not (await asyncio.wait({attempt}, timeout=REMIND_SECONDS))[0]:
                self._remind()
            return attempt.result()
        finally:
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)

    def _until_reminder(self) -> float:
        return self._said_at + REMIND_SECONDS - self._clock.now()

    def _remind(self) -> None:
        self._said_at = self._clock.now()
        log.warning(f"{self._why}; trying again")


def may_pass(error: RafloraError) -> bool:
    """Whether the same call may succeed later: nobody answered, no room, or a fault without a reason."""
    return isinstance(error, Unavailable | TooBusy) or type(error) is RafloraError
