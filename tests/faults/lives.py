"""Processes of the nursery one by one: started, waited for, killed at a step; what they said, which steps they took.

Where kills.py plays whole federations, this is for what happens once: a worker that comes in, an operator's command.
Nothing is asserted about what they leave behind.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from faults.kills import STUCK_SECONDS, Nursery
from faults.roles import Order


@dataclass
class Life:
    """One process."""

    order: Order
    ready: asyncio.Future[None]
    ended: asyncio.Future[int]  # exit status; negative: the signal

    @property
    def steps(self) -> list[str]:
        """That it came to, so far; of a coordinator since it was ready."""
        file = _trace_of(self.order)
        return [line.split()[1] for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def said(self) -> str:
        """Standard output and error."""
        return (Path(self.order.folder) / f"{self.order.key}.log").read_text(errors="replace")

    async def end(self) -> int:
        """Waits until it has ended; its exit status."""
        async with asyncio.timeout(STUCK_SECONDS):
            return await asyncio.shield(self.ended)

    async def until_ready(self) -> bool:
        """Waits until it is ready; False if it ended before."""
        either: set[asyncio.Future[Any]] = {self.ready, self.ended}
        async with asyncio.timeout(STUCK_SECONDS):
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return self.ready.done()


@dataclass
class Lives:
    """All of one test."""

    place: Nursery
    folder: Path  # of the logs and traces of commands
    alive: dict[str, Life] = field(default_factory=dict)
    killed_at: set[str] = field(default_factory=set)  # steps at which processes died as planned
    _count: int = 0

    def start(self, order: Order) -> Life:
        """Starts it under a key that is its own, writes its steps down."""
        loop = asyncio.get_running_loop()
        self._count += 1
        traced = f"trace={_trace_of(order)}"
        if order.role == "coordinator":
            order = replace(order, plan_when_ready=",".join(part for part in (order.plan_when_ready, traced) if part))
        else:
            order = replace(order, plan=",".join(part for part in (order.plan, traced) if part))
        for left in (_trace_of(order), Path(order.folder) / f"{order.key}.log"):
            left.unlink(missing_ok=True)
        life = Life(order, loop.create_future(), loop.create_future())
        self.alive[order.key] = life
        self.place.start(order)
        return life

    async def command(self, *arguments: object, plan: str = "") -> Life:
        """A verb of the command line, to its end."""
        words = tuple(str(word) for word in arguments)
        life = self.start(Order(f"command-{self._count}", "command", str(self.folder), plan, arguments=words))
        if await life.end() == -signal.SIGKILL:
            self.killed_at.add(life.steps[-1])
        return life

    async def killed(self, life: Life) -> str:
        """Waits until it was killed as planned; the step. Raises RuntimeError for any other end."""
        status = await life.end()
        if status != -signal.SIGKILL or not life.steps:
            raise RuntimeError(f"{life.order.key} was to be killed, but ended with {status}: {life.said}")
        self.killed_at.add(life.steps[-1])
        return life.steps[-1]

    async def kill(self, life: Life) -> None:
        """Ends it from outside, wherever it is."""
        self.place.signal(life.order.key, signal.SIGKILL)
        await life.end()

    async def listen(self) -> None:
        """Hears what the nursery says, for ever; what keeps it from hearing, everybody who waits is told."""
        try:
            while True:
                what, key, status = await self.place.event(10 * STUCK_SECONDS)
                if what == "ready" and not self.alive[key].ready.done():
                    self.alive[key].ready.set_result(None)
                elif what == "ended":
                    self.alive.pop(key).ended.set_result(status)
        except Exception as error:
            for life in self.alive.values():
                life.ended.set_exception(error)
            self.alive.clear()


@contextlib.asynccontextmanager
async def living(place: Nursery, folder: Path) -> AsyncIterator[Lives]:
    """Processes that end with the test."""
    lives = Lives(place, folder)
    listening = asyncio.create_task(lives.listen())
    try:
        yield lives
    finally:
        for life in list(lives.alive.values()):
            await lives.kill(life)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


def _trace_of(order: Order) -> Path:
    return Path(order.folder) / f"{order.key}.trace"
