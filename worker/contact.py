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

    def made(self) -> None:
        """The coordinator has answered."""
        touch_alive(self._state_dir, self._clock.wall_time())
        if self._lost_since is not None:
            log.info("the coordinator is back", after_seconds=round(self._clock.now() - self._lost_since, 1))
            self._lost_since = None

    def lost(self, error: RafloraError) -> None:
        """It has not: says so at once, and then every so often."""
        now = self._clock.now()
        if self._lost_since is None:
            self._lost_since = now
        elif now - self._said_at < REMIND_SECONDS:
            return
        self._said_at = now
        log.warning(f"{error}; trying again")

    async def insist(self, operation: Callable[[], Awaitable[Answer]]) -> Answer:
        """The operation's answer, however long it takes.

        Raises what the coordinator refuses for a reason; what may pass (no connection, no room, a fault
        of its own) is tried again for ever.
        """
        failures = 0
        while True:
            try:
                answer = await operation()
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
        """Waits before the next attempt, longer after more failures."""
        await self._clock.sleep(pause_seconds(failures, self._clock.chance()))


def may_pass(error: RafloraError) -> bool:
    """Whether the same call may succeed later: nobody answered, no room, or a fault without a reason."""
    return isinstance(error, Unavailable | TooBusy) or type(error) is RafloraError
