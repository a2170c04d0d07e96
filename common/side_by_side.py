"""Blocking work in a thread while the event loop goes on with the piece before or after it; never two ahead.

A transfer that reads, waits, sends and waits again is idle half of the time. Nothing is queued here: at most one
piece is being worked on beside the one that is in hand.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


async def one_ahead(pieces: Generator[T]) -> AsyncGenerator[T, None]:
    """The pieces of a blocking generator; the next one is made while the one before is used. Closes the generator."""
    source = _Source(pieces)
    making = _in_thread(source, 2)  # two at first: most files are one piece, and its end is then known too
    try:
        held = await asyncio.shield(making)
        has_more = len(held) == 2
        while held:
            piece = held.pop(0)
            if has_more and not held:
                making = _in_thread(source, 1)
            yield piece
            del piece
            if has_more and not held:
                held = await asyncio.shield(making)
                has_more = bool(held)
    finally:
        try:
            await _ended(making)
        finally:
            source.give_up()  # closes it; if the wait was cancelled, the thread that is in it does so


class OneBehind:
    """Does one thing after another in the background; the next one waits for the one before.

    What one raises comes out of the next `start` or `settle`, once. Call `abandon` in a finally.
    """

    def __init__(self) -> None:
        self._doing: asyncio.Future[None] | None = None

    async def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Returns as soon as the work has begun."""
        await self.settle()
        self._doing = asyncio.ensure_future(work())

    async def settle(self) -> None:
        """Returns when nothing is being done; a caller that is cancelled leaves the work to its own end."""
        if (doing := self._doing) is not None:
            try:
                await asyncio.shield(doing)
            finally:
                if doing.done():
                    self._doing = None

    async def abandon(self) -> None:
        """Returns when nothing is being done, whatever became of it; a caller that is cancelled may wait again."""
        if self._doing is not None:
            await _ended(self._doing)
            self._doing = None


class _Source(Generic[T]):
    """A blocking generator that is closed as soon as it is given up and no thread is in it: one in use cannot be."""

    def __init__(self, pieces: Generator[T]) -> None:
        self._pieces = pieces
        self._in_use = threading.Lock()
        self._is_given_up = False

    def some(self, most: int) -> list[T]:
        """So many pieces, or those that are left."""
        try:
            with self._in_use:
                return list(islice(self._pieces, most))
        finally:
            self._close_if_given_up()

    def give_up(self) -> None:
        """No more pieces are wanted. Never waits."""
        self._is_given_up = True
        self._close_if_given_up()

    def _close_if_given_up(self) -> None:
        # Whoever finds it in use leaves it to its user, who comes by here afterwards.
        if self._is_given_up and self._in_use.acquire(blocking=False):
            try:
                self._pieces.close()
            finally:
                self._in_use.release()


def _in_thread(source: _Source[T], most: int) -> asyncio.Future[list[T]]:
    return asyncio.ensure_future(asyncio.to_thread(source.some, most))


async def _ended(doing: asyncio.Future[T]) -> None:
    await asyncio.wait({doing})
    if not doing.cancelled():
        doing.exception()  # nobody waits for it any more, and an error must not look forgotten
