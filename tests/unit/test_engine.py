"""The engine: durable before answered, one commit a batch, and after a restart as if nothing had been."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from engines import FOUND, ROUND_ONE, Bench, WatchedJournal, play
from rounds import ADA, BOB, CEM, EVERYBODY, RULES, claims, joins, publishes, trains
from structlog.testing import capture_logs

import coordinator.engine
from common.errors import (
    CorruptStore,
    JournalConflict,
    RafloraError,
    StorageFailed,
    TooBusy,
    Unavailable,
    UnknownClient,
)
from coordinator.engine import Engine
from coordinator.federation.requests import Evict, Leave, Outcome, Pause, Resume, Tick
from coordinator.federation.state import Membership, Phase, State
from coordinator.federation.step import Command, pending
from coordinator.stores.event_codec import event_of, snapshot_of, state_of
from coordinator.stores.journal import Entry, MemoryJournal, SqlJournal


@pytest.fixture(params=["memory", "sqlite"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    journal = MemoryJournal() if request.param == "memory" else SqlJournal(f"sqlite:///{tmp_path / 'journal.sqlite'}")
    yield Bench(journal)
    journal.close()


# ---------------------------------------------------------------- restarts


async def test_a_restart_in_the_middle_of_a_round_goes_on_where_it_was(bench: Bench) -> None:
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE, *trains(ADA), claims(BOB))
        before = engine.state
    async with bench.running() as engine:
        assert engine.state == before
        await play(engine, *trains(BOB), *trains(CEM), publishes())
        assert engine.state.round == 1
        assert [c.client_id for c in engine.state.history[0].contributions] == [ADA, BOB, CEM]


async def test_an_aggregation_is_started_once_and_again_after_a_restart(bench: Bench) -> None:
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE, *(act for c in EVERYBODY for act in trains(c)))
        assert list(bench.commands) == list(pending(engine.state))
        await play(engine, Tick(), joins("dan"))
        assert len(bench.commands) == 1
    async with bench.running() as engine:
        await engine.submit(Tick())
        assert bench.commands[0] == bench.commands[1]
        await play(engine, publishes())
    assert len(bench.commands) == 2


async def test_federation_time_stands_still_while_nobody_runs(bench: Bench) -> None:
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        bench.monotonic.seconds += 60.0
        await play(engine, claims(ADA))
        assert engine.now == 60.0
    bench.monotonic.seconds = 3.0  # another boot, another zero
    async with bench.running() as engine:
        assert engine.now == 60.0
        bench.monotonic.seconds += 39.0
        await engine.submit(Tick())
        assert engine.state.open is not None
        assert not engine.state.open.is_extended
        bench.monotonic.seconds += 1.0
        await engine.submit(Tick())
        assert engine.state.open.is_extended


async def test_a_snapshot_bounds_what_a_restart_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.engine, "SNAPSHOT_EVERY", 5)
    journal = WatchedJournal()
    bench = Bench(journal)
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        bench.monotonic.seconds += 7.0
        await play(engine, claims(ADA))
        before = engine.state
    snapshot = journal.latest_snapshot("digits")
    assert snapshot is not None
    assert snapshot[0] == 5
    restarted = bench.engine()
    assert journal.read_after[-1] >= 4
    assert (restarted.state, restarted.now) == (before, 7.0)


async def test_a_restart_right_after_a_snapshot_knows_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.engine, "SNAPSHOT_EVERY", 1)
    bench = Bench(MemoryJournal())
    async with bench.running() as engine:
        bench.monotonic.seconds += 9.0
        await engine.submit(FOUND)
    assert bench.engine().now == 9.0


def test_an_event_of_a_newer_version_is_refused_by_name() -> None:
    journal = MemoryJournal()
    journal.append("digits", [Entry(1, 0.0, "MoonLanded", "{}")])
    with pytest.raises(CorruptStore, match="entry 1: unknown event 'MoonLanded'; a newer version wrote it"):
        Bench(journal).engine()


def test_an_event_that_does_not_fit_its_kind_is_refused() -> None:
    journal = MemoryJournal()
    journal.append("digits", [Entry(1, 0.0, "PauseSet", '{"is_paused": "perhaps"}')])
    with pytest.raises(CorruptStore, match="entry 1: not a PauseSet"):
        Bench(journal).engine()


# ---------------------------------------------------------------- durable before answered


async def test_nobody_is_answered_and_nothing_adopted_before_the_journal_has_it() -> None:
    journal = WatchedJournal()
    async with Bench(journal).running() as engine:
        journal.may_go_on.clear()
        answer = asyncio.create_task(engine.submit(FOUND))
        assert await asyncio.to_thread(journal.begun.wait, 30)
        assert not answer.done()
        assert engine.state.phase is Phase.WAITING_FOR_SPEC
        journal.may_go_on.set()
        assert (await answer).outcome is Outcome.ACCEPTED
        assert engine.state.phase is Phase.WAITING_FOR_CLIENTS


async def test_requests_that_come_meanwhile_share_the_next_commit() -> None:
    journal = WatchedJournal()
    async with Bench(journal).running() as engine:
        journal.may_go_on.clear()
        first = asyncio.create_task(engine.submit(FOUND))
        assert await asyncio.to_thread(journal.begun.wait, 30)
        others = [asyncio.create_task(engine.submit(joins(c))) for c in (ADA, BOB)]
        await asyncio.sleep(0)  # lets them ask
        journal.may_go_on.set()
        await asyncio.gather(first, *others)
    assert journal.commits == [1, 2]


async def test_a_refused_request_does_not_touch_those_in_the_same_batch() -> None:
    async with Bench(MemoryJournal()).running() as engine:
        await play(engine, FOUND)
        answers = await asyncio.gather(
            engine.submit(joins(ADA)),
            engine.submit(Evict("eve", "noise")),
            engine.submit(joins(ADA, key="another")),
            engine.submit(joins(BOB)),
            return_exceptions=True,
        )
        assert isinstance(answers[1], UnknownClient)
        assert isinstance(answers[2], RafloraError)
        assert sorted(engine.state.clients) == [ADA, BOB]


@pytest.mark.parametrize("failure", [OSError("no space left"), JournalConflict("somebody else writes")])
async def test_a_journal_that_fails_ends_the_engine_and_nothing_was_adopted(failure: Exception) -> None:
    journal = WatchedJournal()
    engine = Bench(journal).engine()
    running = asyncio.create_task(engine.run())
    await engine.submit(FOUND)
    before = engine.state
    journal.failure = failure
    with pytest.raises(Unavailable, match="ending"):
        await engine.submit(joins(ADA))
    with pytest.raises(type(failure), match=str(failure)):
        await running
    assert engine.state == before
    assert [entry.kind for entry in journal.read("digits")] == ["FederationFounded"]
    with pytest.raises(Unavailable):
        await engine.submit(joins(ADA))


async def test_everybody_who_waits_is_told_that_the_engine_ends() -> None:
    journal = WatchedJournal()
    engine = Bench(journal).engine()
    running = asyncio.create_task(engine.run())
    journal.may_go_on.clear()
    waiting = [asyncio.create_task(engine.submit(FOUND))]
    assert await asyncio.to_thread(journal.begun.wait, 30)
    waiting += [asyncio.create_task(engine.submit(joins(c))) for c in EVERYBODY]
    await asyncio.sleep(0)  # lets them ask
    running.cancel()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    journal.may_go_on.set()
    assert [type(answer) for answer in answers] == [Unavailable] * 4


async def test_a_caller_that_hangs_up_does_not_undo_its_request() -> None:
    journal = WatchedJournal()
    async with Bench(journal).running() as engine:
        journal.may_go_on.clear()
        caller = asyncio.create_task(engine.submit(FOUND))
        assert await asyncio.to_thread(journal.begun.wait, 30)
        caller.cancel()
        journal.may_go_on.set()
        assert (await engine.submit(FOUND)).outcome is Outcome.DUPLICATE


async def test_a_full_disk_refuses_and_the_engine_goes_on() -> None:
    journal = WatchedJournal()
    async with Bench(journal).running() as engine:
        await engine.submit(FOUND)
        before, journal.failure = engine.state, TooBusy("the disk is full")
        with pytest.raises(TooBusy):
            await engine.submit(joins(ADA))
        assert engine.state == before
        journal.failure = None
        assert (await engine.submit(joins(ADA))).outcome is Outcome.ACCEPTED


async def test_a_disk_that_failed_somebody_else_ends_the_engine() -> None:
    engine = Bench(MemoryJournal()).engine()
    running = asyncio.create_task(engine.run())
    await engine.submit(FOUND)
    engine.end_with(StorageFailed("blob 1: the first"))
    engine.end_with(StorageFailed("blob 2: what followed from it"))
    with pytest.raises(StorageFailed, match="the first"):
        await running
    with pytest.raises(Unavailable):
        await engine.submit(joins(ADA))


async def test_nobody_is_answered_for_a_command_that_could_not_be_started() -> None:
    def carry_out(_: Command) -> None:
        raise RuntimeError("no room for another task")

    engine = Engine("digits", MemoryJournal(), carry_out)
    running = asyncio.create_task(engine.run())
    await play(engine, *ROUND_ONE, *(act for c in (ADA, BOB) for act in trains(c)))
    with pytest.raises(Unavailable):
        await play(engine, *trains(CEM))
    with pytest.raises(RuntimeError, match="no room"):
        await running


async def test_a_commit_does_not_queue_behind_slow_work() -> None:
    release = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    slow = asyncio.create_task(asyncio.to_thread(release.wait, 30))
    async with Bench(MemoryJournal()).running() as engine:
        assert (await engine.submit(FOUND)).outcome is Outcome.ACCEPTED
        assert not slow.done()
        release.set()
        await slow


async def test_the_log_names_every_event_by_its_own_number() -> None:
    with capture_logs() as logged:
        async with Bench(MemoryJournal()).running() as engine:
            await asyncio.gather(*(engine.submit(request) for request in (FOUND, joins(ADA), joins(BOB))))
    assert [(e["kind"], e["sequence"]) for e in logged if e["event"] == "event"] == [
        ("FederationFounded", 1),
        ("ClientJoined", 2),
        ("ClientJoined", 3),
    ]


# ---------------------------------------------------------------- time and silence


async def test_a_silent_client_is_lost_and_returns_when_it_is_heard() -> None:
    bench = Bench(MemoryJournal())

    def membership(engine: Engine) -> list[Membership]:
        return [engine.state.clients[c].membership for c in (ADA, BOB)]

    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        bench.monotonic.seconds += 10.0
        engine.hear(BOB)
        bench.monotonic.seconds += 0.1
        await engine.submit(Tick())
        assert membership(engine) == [Membership.LOST, Membership.ACTIVE]
        assert (engine.silent_seconds(ADA), engine.silent_seconds(BOB)) == pytest.approx((10.1, 0.1))
        engine.hear(ADA)
        await engine.submit(Tick())
        assert membership(engine) == [Membership.ACTIVE, Membership.ACTIVE]


async def test_a_lost_client_that_joins_again_is_not_lost_at_once() -> None:
    bench = Bench(MemoryJournal())
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        bench.monotonic.seconds += 11.0
        await play(engine, Tick(), joins(ADA), Tick(), Tick())
        assert engine.state.clients[ADA].is_active
        assert not engine.state.clients[BOB].is_active


async def test_a_restart_is_nobody_s_silence(bench: Bench) -> None:
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
    bench.monotonic.seconds += 3600.0
    async with bench.running() as engine:
        await engine.submit(Tick())
        assert len(engine.state.active_clients) == 3


async def test_a_client_that_left_is_not_lost_too() -> None:
    bench = Bench(MemoryJournal())
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE, Leave(ADA))
        bench.monotonic.seconds += 11.0
        await engine.submit(Tick())
        assert engine.state.clients[ADA].membership is Membership.LEFT


async def test_who_waits_for_a_change_is_woken_by_it() -> None:
    async with Bench(MemoryJournal()).running() as engine:
        await play(engine, FOUND)
        version = engine.version
        waiter = asyncio.create_task(engine.wait_for_change(version, 30.0))
        await engine.submit(Pause())
        assert await waiter > version
        await engine.submit(Pause())  # a duplicate is no change
        assert await engine.wait_for_change(engine.version, 0.0) == engine.version


async def test_deadlines_come_without_anybody_asking() -> None:
    bench = Bench(MemoryJournal())
    async with bench.running() as engine:
        hurried = replace(RULES, lease_ttl_seconds=0.1)  # a quarter of it is the longest nap
        await play(engine, replace(FOUND, rules=hurried), *map(joins, EVERYBODY))
        version = engine.version
        bench.monotonic.seconds += 100.0
        while engine.state.open is None or not engine.state.open.is_extended:
            version = await engine.wait_for_change(version, 30.0)


async def test_an_order_and_its_opposite_in_one_batch_leave_two_entries() -> None:
    journal = WatchedJournal()
    async with Bench(journal).running() as engine:
        await play(engine, FOUND)
        await asyncio.gather(engine.submit(Pause()), engine.submit(Resume()))
    assert journal.commits == [1, 2]


def test_a_field_of_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(CorruptStore, match="entry 7: unknown field 'until'"):
        event_of(Entry(7, 1.0, "PauseSet", '{"is_paused": true, "until": 99}'))
    newer = snapshot_of(State()).replace('"round":0', '"round":0,"mood":1')
    with pytest.raises(CorruptStore, match="unknown field 'mood'"):
        state_of(newer)
