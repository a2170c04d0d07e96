"""Engines for tests: on a clock that stands where the test puts it, and a journal that can be held up and can fail."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from rounds import EVERYBODY, RULES, Act, joins

from coordinator.clock import FederationClock
from coordinator.engine import Engine
from coordinator.federation.requests import Found
from coordinator.federation.step import Command
from coordinator.stores.journal import Entry, Journal, MemoryJournal

FOUND = Found(RULES, "manifest", "adapter-0")


class Monotonic:
    """A machine's clock that stands where the test puts it."""

    def __init__(self, seconds: float = 5000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


class WatchedJournal(MemoryJournal):
    """Remembers its commits and reads, can be held up, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []
        self.read_after: list[int] = []
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        self.begun.set()
        assert self.may_go_on.wait(timeout=30)
        if self.failure is not None:
            raise self.failure
        super().append(federation, entries)
        self.commits.append(len(entries))

    def read(self, federation: str, after: int = 0) -> Iterator[Entry]:
        self.read_after.append(after)
        return super().read(federation, after)


class Bench:
    """Engines on one journal, one after the other."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.monotonic = Monotonic()
        self.commands: list[Command] = []

    def engine(self) -> Engine:
        return Engine("digits", self.journal, self.commands.append, lambda at: FederationClock(at, self.monotonic))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        engine = self.engine()
        task = asyncio.create_task(engine.run())
        try:
            yield engine
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def play(engine: Engine, *acts: Act) -> None:
    for act in acts:
        await engine.submit(act(engine.state) if callable(act) else act)


ROUND_ONE = (FOUND, *map(joins, EVERYBODY))
