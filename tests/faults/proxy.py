"""A TCP line that breaks when it is told to: between a client and a server of a test, every fault by name and by byte.

    async with FaultProxy(target) as line:
        connect(line.address)
        line.cut_after(Way.DOWN, 10_000)       # the 10,000th byte from the server is the last; then a reset
        line.hold(Way.UP); line.release()      # a partition: nothing is lost, as TCP would send it again
        line.lose(Way.DOWN)                    # bytes vanish: whatever was answered, nobody hears of it
        line.delay(0.1)                        # a long line: every byte is so many seconds under way
        line.refuse(); line.heal()             # nobody can connect; everything is as before
        line.sent[Way.UP], line.lost[Way.DOWN], line.under_way[Way.UP], line.connections

It knows bytes and connections, not HTTP/2: what a single answer is, faults.answers knows. Nothing here waits for
time but a limited rate and a delay.
"""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

READ_BYTES = 64 << 10
FLIGHT_BYTES = 4 << 20  # each way of a connection: with so many under way nothing more is read
# With this and nothing unsent, close() sends a reset; the other side sees its connection die, not end.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way(Enum):
    """Which way bytes go."""

    UP = "from the client to the target"
    DOWN = "from the target to the client"


class Cut(Enum):
    """How a connection ends."""

    RESET = "reset"  # RST: a process died, a firewall forgot
    END = "end"  # FIN: an orderly end in the middle of something


class _Flow(Enum):
    OPEN = "comes through"
    HOLD = "is held"  # not read, so that the sender's buffers fill
    LOSE = "is lost"  # read and thrown away


@dataclass(eq=False)
class _Flight:
    """What was read of one way of a connection and has not arrived; whoever reads keeps to FLIGHT_BYTES."""

    size_bytes: int = 0
    parts: asyncio.Queue[tuple[float, bytes]] = field(default_factory=asyncio.Queue)  # due when, by the loop's clock


@dataclass(eq=False)
class _Connection:
    """One client's connection and ours to the target."""

    writers: dict[Way, asyncio.StreamWriter]  # by where the bytes go
    readers: dict[Way, asyncio.StreamReader]
    flights: dict[Way, _Flight] = field(default_factory=lambda: {way: _Flight() for way in Way})
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    is_closed: bool = False

    def close(self, how: Cut) -> None:
        self.is_closed = True
        for writer in self.writers.values():
            if how is Cut.RESET:
                sock = writer.get_extra_info("socket")
                with suppress(OSError):  # the other side was first
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                writer.transport.abort()
            else:
                writer.close()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()


class FaultProxy:
    """Forwards every connection to `target` ("host:port"); all faults hold for the connections of now and later."""

    def __init__(self, target: str) -> None:
        self.address = ""  # once it is entered
        self.connections = 0  # that were ever made
        self.sent = {way: 0 for way in Way}  # bytes that came through, over all connections
        self.lost = {way: 0 for way in Way}
        self._target = target
        self._open: set[_Connection] = set()
        self._flow = {way: _Flow.OPEN for way in Way}
        self._rate: dict[Way, float] = {}  # bytes a second
        self._delay: dict[Way, float] = {}  # seconds
        self._cuts: Counter[Way] = Counter()  # at which count of `sent`; 0: none
        self._cut_how = Cut.RESET
        self._refuses = False
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        tasks = [task for connection in self._open for task in connection.tasks]
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    # ------------------------------------------------------------ faults

    def cut(self, how: Cut = Cut.RESET) -> None:
        """Ends every connection that is open now; new ones are welcome."""
        for connection in list(self._open):
            connection.close(how)

    def cut_after(self, way: Way, size_bytes: int, how: Cut = Cut.RESET) -> None:
        """Ends the connection that brings the next so many bytes this way, once, after exactly that byte."""
        self._cuts[way], self._cut_how = self.sent[way] + size_bytes, how

    def hold(self, *ways: Way) -> None:
        """Lets nothing through, and keeps it: a partition. None named: both."""
        self._set(_Flow.HOLD, ways)

    def lose(self, *ways: Way) -> None:
        """Takes bytes and throws them away. A stream with a hole is no stream: cut it before it is healed."""
        self._set(_Flow.LOSE, ways)

    def release(self, *ways: Way) -> None:
        """Lets bytes through again, those that were held first."""
        self._set(_Flow.OPEN, ways)

    def limit(self, way: Way, bytes_per_second: float) -> None:
        """A thin line."""
        self._rate[way] = bytes_per_second

    def delay(self, seconds: float, *ways: Way) -> None:
        """A long line: bytes arrive so much later, in their order. A reset overtakes them. None named: both."""
        self._delay.update(dict.fromkeys(ways or tuple(Way), seconds))
        self._wake()

    def refuse(self) -> None:
        """Resets every new connection; those that are open stay."""
        self._refuses = True

    def heal(self) -> None:
        """Everything as at the start, but for the counters; open connections and what is under way stay."""
        self._refuses, self._rate, self._delay = False, {}, {}
        self._cuts.clear()
        self.release()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as the counters say so; a test's own limit bounds it."""
        async with self._changed:
            await self._changed.wait_for(condition)

    @property
    def open_connections(self) -> int:
        """Right now."""
        return len(self._open)

    @property
    def under_way(self) -> dict[Way, int]:
        """Bytes that were read and have not arrived, over all connections, right now."""
        return {way: sum(connection.flights[way].size_bytes for connection in self._open) for way in Way}

    # ------------------------------------------------------------ inside

    def _set(self, flow: _Flow, ways: tuple[Way, ...]) -> None:
        for way in ways or tuple(Way):
            self._flow[way] = flow
        self._wake()

    def _wake(self) -> None:
        task = asyncio.ensure_future(self._notify())
        self._waking = task  # the loop itself holds tasks only weakly

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection({Way.DOWN: writer}, {Way.UP: reader})
        if self._refuses:
            connection.close(Cut.RESET)
            return
        host, _, port = self._target.rpartition(":")
        try:
            connection.readers[Way.DOWN], connection.writers[Way.UP] = await asyncio.open_connection(host, int(port))
        except OSError:  # the target is not there: neither are we
            connection.close(Cut.RESET)
            return
        self.connections += 1
        self._open.add(connection)
        connection.tasks = [
            asyncio.create_task(half(connection, way)) for way in Way for half in (self._take_in, self._bring)
        ]
        await asyncio.gather(*connection.tasks, return_exceptions=True)
        connection.close(Cut.END)
        self._open.discard(connection)
        await self._notify()

    async def _take_in(self, connection: _Connection, way: Way) -> None:
        """Reads one way of one connection to its end, no more at a time than may be under way."""
        reader, flight, data = connection.readers[way], connection.flights[way], b"?"
        try:
            while data:
                await self.until(lambda: self._flow[way] is not _Flow.HOLD and self._has_room(flight, way))
                data = await reader.read(READ_BYTES)
                flight.size_bytes += len(data)
                flight.parts.put_nowait((asyncio.get_running_loop().time() + self._delay.get(way, 0.0), data))
                await self._notify()
        except OSError:
            connection.close(Cut.RESET)

    def _has_room(self, flight: _Flight, way: Way) -> bool:
        # Without a delay a part arrives before the next is read: what the receiver does not take, the sender feels.
        return flight.size_bytes < FLIGHT_BYTES if way in self._delay else not flight.size_bytes

    async def _bring(self, connection: _Connection, way: Way) -> None:
        """Passes on what was read when it is due; the end goes through as an end."""
        writer, flight = connection.writers[way], connection.flights[way]
        try:
            while not connection.is_closed:
                due, data = await flight.parts.get()
                if (seconds := due - asyncio.get_running_loop().time()) > 0:
                    await asyncio.sleep(seconds)
                await self.until(lambda: self._flow[way] is not _Flow.HOLD)
                if not data:
                    break
                await self._pass_on(connection, way, data)
                flight.size_bytes -= len(data)
                await self._notify()
            if writer.can_write_eof() and not connection.is_closed:
                writer.write_eof()
        except OSError:
            connection.close(Cut.RESET)

    async def _pass_on(self, connection: _Connection, way: Way, data: bytes) -> None:
        if self._flow[way] is _Flow.LOSE:
            self.lost[way] += len(data)
            return
        left = self._cuts[way] - self.sent[way] if self._cuts[way] else len(data) + 1
        writer = connection.writers[way]
        writer.write(data[:left])
        await writer.drain()
        self.sent[way] += len(data[:left])
        if way in self._rate:
            await asyncio.sleep(len(data) / self._rate[way])
        if len(data) >= left:
            self._cuts[way] = 0
            self.lost[way] += len(data) - left
            connection.close(self._cut_how)
