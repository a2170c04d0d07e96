"""A coordinator that nobody speaks to: time passes on the loop itself, and what is counted is steps, not seconds."""

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rounds import EVERYBODY, RULES, claims, joins

import coordinator.engine
from coordinator.clock import FederationClock
from coordinator.engine import Engine
from coordinator.federation.requests import Found, Request
from coordinator.federation.state import Phase, State
from coordinator.federation.step import Transition, step
from coordinator.stores.journal import Entry, MemoryJournal

HOURS_SECONDS = 3 * 3600.0
LONGEST_NAP_SECONDS = 5.0
PATIENT = replace(RULES, lease_ttl_seconds=90.0)


class VirtualSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Never waits for time: it moves the loop's clock instead. Waits for threads, so that nothing is overtaken."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.is_working: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> Any:
        must_wait = timeout is None or (timeout > 0 and self.is_working())
        ready = super().select(None if must_wait else 0)
        if not ready and timeout:
            self.now += timeout
        return ready


class BusyJournal(MemoryJournal):
    """Says while it is at work."""

    is_busy = False

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        self.is_busy = True
        super().append(federation, entries)
        self.is_busy = False


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine has stepped."""
    steps: Counter[str] = Counter()

    def counting(state: State, request: Request, now: float) -> Transition:
        steps[type(request).__name__] += 1
        return step(state, request, now)

    monkeypatch.setattr(coordinator.engine, "step", counting)
    return steps


def test_hours_without_anybody_cost_a_few_steps_a_minute(counted: Counter[str]) -> None:
    selector = VirtualSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]

    async def some_hours() -> State:
        journal = BusyJournal()
        engine = Engine("digits", journal, lambda _: None, lambda at: FederationClock(at, loop.time))
        running = asyncio.create_task(engine.run())
        selector.is_working = lambda: engine._writer._work_queue.qsize() > 0 or journal.is_busy
        await engine.submit(Found(PATIENT, "manifest", "adapter-0"))
        for client_id in EVERYBODY:
            await engine.submit(joins(client_id))
        for client_id in EVERYBODY:
            await engine.submit(claims(client_id)(engine.state))
        counted.clear()
        await asyncio.sleep(HOURS_SECONDS)
        selector.is_working = lambda: False
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return engine.state

    try:
        state = loop.run_until_complete(some_hours())
    finally:
        loop.close()
    assert state.phase is Phase.WAITING_FOR_CLIENTS
    assert not state.active_clients
    assert "only 0 of 2 updates" in state.last_abandoned
    assert state.attempt == 1, "an absent client fails no further attempt"
    assert counted["NoteSilence"] <= 2 * len(EVERYBODY)
    assert counted.total() <= HOURS_SECONDS / LONGEST_NAP_SECONDS + 20
