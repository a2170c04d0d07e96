"""The engine and those who wait: whom it wakes, and whom it takes for silent."""

import asyncio
from dataclasses import replace

import pytest
from engines import FOUND, ROUND_ONE, Bench, WatchedJournal, play
from rounds import ADA, BOB, CEM, EVERYBODY, RULES, joins, publishes, trains

from common.errors import TooBusy
from coordinator.engine import Engine
from coordinator.federation.requests import Evict, Pause, Resume, Tick
from coordinator.federation.state import Membership, Phase
from coordinator.stores.journal import MemoryJournal


async def test_a_client_that_waits_is_woken_by_what_concerns_it_and_sleeps_through_the_rest() -> None:
    async with Bench(MemoryJournal()).running() as engine:
        await play(engine, FOUND, joins(ADA), joins(BOB))
        seen = engine.version
        ada, bob = (asyncio.create_task(engine.wait_for_news(c, seen, 30.0)) for c in (ADA, BOB))
        await play(engine, Pause(), Resume(), Evict(ADA, "noise"))
        await ada
        assert not bob.done()
        await play(engine, joins(CEM), joins("dan"))  # a round is opened
        await bob


async def test_who_waits_for_work_is_woken_when_there_will_be_none() -> None:
    async with Bench(MemoryJournal()).running() as engine:
        await play(engine, replace(FOUND, rules=replace(RULES, num_rounds=1)), *map(joins, EVERYBODY))
        await play(engine, *(act for c in EVERYBODY for act in trains(c)))
        waiting = [asyncio.create_task(engine.wait_for_news(c, engine.version, 30.0)) for c in EVERYBODY]
        await play(engine, publishes())
        await asyncio.gather(*waiting)
        assert engine.state.phase is Phase.FINISHED


async def test_silence_is_found_again_and_again() -> None:
    bench = Bench(MemoryJournal())

    def lost(engine: Engine) -> list[str]:
        return [c for c, client in engine.state.clients.items() if client.membership is Membership.LOST]

    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        for absent in EVERYBODY:
            for _ in range(3):  # within its lease of ten seconds nobody is lost, however often one looks
                bench.monotonic.seconds += 4.0
                for client_id in EVERYBODY:
                    if client_id != absent:
                        engine.hear(client_id)
                await engine.submit(Tick())
            assert lost(engine) == [absent]
            engine.hear(absent)
            await engine.submit(Tick())
            assert not lost(engine)


async def test_a_silence_that_could_not_be_recorded_is_found_again() -> None:
    journal = WatchedJournal()
    bench = Bench(journal)
    async with bench.running() as engine:
        await play(engine, *ROUND_ONE)
        journal.failure = TooBusy("the disk is full")
        bench.monotonic.seconds += 11.0
        with pytest.raises(TooBusy):
            await engine.submit(Tick())
        journal.failure = None
        await engine.submit(Tick())
        assert not engine.state.active_clients
