"""Blocking work beside the event loop: one piece ahead, one behind, never more."""

import asyncio
import threading
from collections.abc import Generator
from contextlib import aclosing

import pytest

from common.side_by_side import OneBehind, one_ahead


class Pieces:
    """A blocking source that says how far it was asked."""

    def __init__(self, number: int, fails_at: int = -1) -> None:
        self.made, self.is_closed, self._number, self._fails_at = 0, False, number, fails_at
        self.threads: set[int] = set()

    def generate(self) -> Generator[int]:
        try:
            for piece in range(self._number):
                self.threads.add(threading.get_ident())
                if piece == self._fails_at:
                    raise OSError("the disk is gone")
                self.made = piece + 1
                yield piece
        finally:
            self.is_closed = True


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7])
async def test_every_piece_comes_once_and_in_order(number: int) -> None:
    pieces = Pieces(number)
    assert [piece async for piece in one_ahead(pieces.generate())] == list(range(number))
    assert pieces.is_closed
    assert threading.get_ident() not in pieces.threads


async def test_nothing_is_made_more_than_one_piece_ahead() -> None:
    pieces = Pieces(50)
    async with aclosing(one_ahead(pieces.generate())) as ahead:
        async for piece in ahead:
            assert pieces.made <= piece + 2
            if piece == 20:
                break
    assert pieces.is_closed
    assert pieces.made <= 22


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5])
async def test_an_error_of_the_source_comes_out_where_it_belongs(fails_at: int) -> None:
    got: list[int] = []

    async def read_all() -> None:
        async for piece in one_ahead(Pieces(9, fails_at).generate()):
            got.append(piece)

    with pytest.raises(OSError, match="gone"):
        await read_all()
    assert got == list(range(fails_at)) or (fails_at == 1 and not got)  # the first two are made together


async def test_a_source_is_closed_by_its_own_thread_when_nobody_waits_for_it_any_more() -> None:
    entered, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def held() -> Generator[int]:
        try:
            entered.set()
            assert may_go_on.wait(timeout=30)
            yield from range(9)
        finally:
            closed.set()

    source = held()  # kept, so that it is not closed for want of owners

    async def read_all() -> None:
        async for _ in one_ahead(source):
            pass

    reading = asyncio.create_task(read_all())
    assert await asyncio.to_thread(entered.wait, 30)
    reading.cancel()
    await asyncio.sleep(0)  # it waits now for the thread that is in the source
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not closed.is_set()
    may_go_on.set()
    assert await asyncio.to_thread(closed.wait, 30)


async def test_one_thing_is_done_after_another_beside_the_caller() -> None:
    done: list[int] = []
    gate = asyncio.Event()

    async def do(number: int) -> None:
        await gate.wait()
        done.append(number)

    behind = OneBehind()
    await behind.start(lambda: do(1))  # returns although nothing can be done yet
    second = asyncio.create_task(behind.start(lambda: do(2)))
    await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    await second
    await behind.settle()
    assert done == [1, 2]


async def test_what_went_wrong_comes_out_of_the_next_start_and_what_is_abandoned_is_silent() -> None:
    async def fail() -> None:
        raise OSError("the disk is gone")

    behind = OneBehind()
    await behind.start(fail)
    with pytest.raises(OSError, match="gone"):
        await behind.start(fail)
    await behind.abandon()
    await behind.settle()


async def test_a_caller_that_is_cancelled_leaves_the_work_to_its_end() -> None:
    gate, ended = asyncio.Event(), asyncio.Event()

    async def do() -> None:
        await gate.wait()
        ended.set()

    behind = OneBehind()
    await behind.start(do)
    waiting = asyncio.create_task(behind.settle())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await behind.abandon()
    assert ended.is_set()


async def test_what_a_cancelled_caller_no_longer_waits_for_can_be_waited_for_again() -> None:
    gate, ended = asyncio.Event(), asyncio.Event()

    async def do() -> None:
        await gate.wait()
        ended.set()

    behind = OneBehind()
    await behind.start(do)
    waiting = asyncio.create_task(behind.abandon())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await behind.abandon()
    assert ended.is_set()
