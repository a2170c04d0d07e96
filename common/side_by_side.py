"""Blocking work in a thread while the event loop goes on with the piece before or after it; never two ahead.

A transfer that reads, waits, sends and waits again is idle half of the time. Nothing is queued here: at most one
piece is being worked on beside the one that is in hand.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


async def one_ahead(pieces: Generator[T]) -> AsyncGenerator[T, None]:
    """The pieces of a blocking generator; the next one is made while the one before is used. Closes the generator."""
    making = _in_thread(pieces, 2)  # two at first: most files are one piece, and its end is then known too
    try:
        held = await asyncio.shield(making)
        has_more = len(held) == 2
        while held:
            piece = held.pop(0)
            if has_more and not held:
                making = _in_thread(pieces, 1)
            yield piece
            del piece
            if has_more and not held:
                held = await asyncio.shield(making)
                has_more = bool(held)
    finally:
        await _ended(making)  # a generator that runs in a thread cannot be closed
        pieces.close()


class OneBehind:
    """Does one thing after another in the background; the next one waits for the one before.

    What one raises comes out of the next `start`, or of `settle`. Call `abandon` in a finally.
    """

    def __init__(self) -> None:
        self._doing: asyncio.Future[None] | None = None

    async def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Returns as soon as the work has begun."""
        await self.settle()
        self._doing = asyncio.ensure_future(work())

    async def settle(self) -> None:
        """Returns when nothing is being done; a caller that is cancelled leaves the work to its own end."""
        if self._doing is not None:
            await asyncio.shield(self._doing)
            self._doing = None

    async def abandon(self) -> None:
        """Returns when nothing is being done, whatever became of it."""
        doing, self._doing = self._doing, None
        if doing is not None:
            await _ended(doing)


def _in_thread(pieces: Generator[T], most: int) -> asyncio.Future[list[T]]:
    return asyncio.ensure_future(asyncio.to_thread(_some_of, pieces, most))


def _some_of(pieces: Generator[T], most: int) -> list[T]:
    return list(islice(pieces, most))


async def _ended(doing: asyncio.Future[T]) -> None:
    await asyncio.wait({doing})
    if not doing.cancelled():
        doing.exception()  # nobody waits for it any more, and an error must not look forgotten
