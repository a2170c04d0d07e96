"""The fault proxies themselves: what the tests of faults stand on must break exactly as it says."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from faults.proxy import FLIGHT_BYTES, READ_BYTES, Cut, FaultProxy, Way

CONTENT = bytes(range(256)) * 1000


class Echo:
    """Sends back what it gets, and ends when the other side has ended."""

    def __init__(self) -> None:
        self.received = b""
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.received += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            self.ended.set()
            writer.close()


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def line(echo: Echo) -> AsyncIterator[FaultProxy]:
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with FaultProxy(f"127.0.0.1:{port}") as proxy:
        yield proxy
    server.close()
    await server.wait_closed()


class Caller:
    """A client's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, line: FaultProxy) -> "Caller":
        host, port = line.address.split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def says(self, content: bytes, *, ends: bool = True) -> None:
        self.writer.write(content)
        await self.writer.drain()
        if ends:
            self.writer.write_eof()

    async def hears(self) -> bytes:
        return await self.reader.read(-1)

    def close(self) -> None:
        self.writer.close()


async def test_without_a_fault_everything_goes_through_both_ways(line: FaultProxy) -> None:
    caller = await Caller.to(line)
    saying = asyncio.create_task(caller.says(CONTENT))
    assert await caller.hears() == CONTENT
    await saying
    caller.close()
    await line.until(lambda: line.open_connections == 0)
    assert (line.sent, line.connections) == ({Way.UP: len(CONTENT), Way.DOWN: len(CONTENT)}, 1)
    assert line.lost == {Way.UP: 0, Way.DOWN: 0}


@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537])
async def test_a_reset_comes_after_exactly_that_byte(line: FaultProxy, echo: Echo, size: int) -> None:
    line.cut_after(Way.UP, size)
    caller = await Caller.to(line)
    with pytest.raises(ConnectionError):
        await asyncio.gather(caller.says(CONTENT), caller.hears())
    await echo.ended.wait()
    assert len(echo.received) <= size, "a reset may also take along what was on its way"
    assert line.sent[Way.UP] == size
    caller.close()


@pytest.mark.parametrize("size", [1, 70_000])
async def test_an_orderly_end_comes_after_exactly_that_byte(line: FaultProxy, size: int) -> None:
    line.cut_after(Way.DOWN, size, Cut.END)
    caller = await Caller.to(line)
    await caller.says(CONTENT[:100_000], ends=False)
    assert await caller.hears() == CONTENT[:size]
    caller.close()


async def test_a_cut_is_made_once_and_the_next_connection_is_whole(line: FaultProxy) -> None:
    line.cut_after(Way.DOWN, 10, Cut.END)
    for expected in (b"0123456789", b"0123456789abc"):
        caller = await Caller.to(line)
        await caller.says(b"0123456789abc")
        assert await caller.hears() == expected
        caller.close()


async def test_what_is_held_comes_after_the_partition(line: FaultProxy, echo: Echo) -> None:
    line.hold(Way.DOWN)
    caller = await Caller.to(line)
    await caller.says(b"are you there?")
    await echo.ended.wait()  # one direction still works
    assert line.sent[Way.DOWN] == 0
    line.release()
    assert await caller.hears() == b"are you there?"
    caller.close()


async def test_what_is_lost_never_comes_and_is_counted(line: FaultProxy) -> None:
    line.lose(Way.DOWN)
    caller = await Caller.to(line)
    await caller.says(b"acknowledge this", ends=False)
    await line.until(lambda: line.lost[Way.DOWN] == len(b"acknowledge this"))
    line.cut(Cut.END)
    assert await caller.hears() == b""
    assert line.sent == {Way.UP: len(b"acknowledge this"), Way.DOWN: 0}
    caller.close()


async def test_nobody_connects_while_it_refuses(line: FaultProxy) -> None:
    line.refuse()
    caller = await Caller.to(line)  # the kernel has said yes before the proxy can say no
    with pytest.raises(ConnectionError):
        await caller.hears()
    caller.close()
    line.heal()
    caller = await Caller.to(line)
    await caller.says(b"again")
    assert await caller.hears() == b"again"
    caller.close()
    assert line.connections == 1


async def test_a_thin_line_changes_no_byte(line: FaultProxy) -> None:
    line.limit(Way.DOWN, bytes_per_second=100e6)
    caller = await Caller.to(line)
    saying = asyncio.create_task(caller.says(CONTENT))
    assert await caller.hears() == CONTENT
    await saying
    caller.close()


async def test_a_long_line_changes_no_byte_and_no_order(line: FaultProxy) -> None:
    line.delay(0.02)
    caller = await Caller.to(line)
    saying = asyncio.create_task(caller.says(CONTENT))
    assert await caller.hears() == CONTENT
    await saying
    assert line.sent == {Way.UP: len(CONTENT), Way.DOWN: len(CONTENT)}
    caller.close()


async def test_no_more_is_under_way_than_may_be_and_the_sender_waits(line: FaultProxy) -> None:
    line.delay(3600.0, Way.UP)
    caller = await Caller.to(line)
    saying = asyncio.create_task(caller.says(CONTENT * 100))
    await line.until(lambda: line.under_way[Way.UP] >= FLIGHT_BYTES)
    for _ in range(50):
        await asyncio.sleep(0)
    assert line.under_way[Way.UP] < FLIGHT_BYTES + READ_BYTES
    assert line.sent == {Way.UP: 0, Way.DOWN: 0}, "nothing is due for an hour"
    assert not saying.done()
    line.cut()
    with pytest.raises(ConnectionError):
        await saying
    caller.close()


async def test_what_is_under_way_when_the_line_heals_stays_ahead_of_what_comes_after(line: FaultProxy) -> None:
    line.delay(0.05, Way.UP)
    caller = await Caller.to(line)
    await caller.says(b"first, ", ends=False)
    await line.until(lambda: line.under_way[Way.UP] == len(b"first, "))
    line.heal()
    await caller.says(b"then this")
    assert await caller.hears() == b"first, then this"
    caller.close()


async def test_a_target_that_is_not_there_is_a_reset() -> None:
    async with FaultProxy("127.0.0.1:1") as line:
        caller = await Caller.to(line)
        with pytest.raises(ConnectionError):
            await caller.hears()
        caller.close()
