"""Partitions, stragglers and clocks: hours pass by the federation's clock, which the test moves.

One test waits: the line is held until a lease as short as may be, a second, has really expired.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
from coordinators import NumpyClient, Observer, clients_of, config_of, entries_of, observing, serving
from engines import Monotonic
from faults.proxy import FaultProxy, Way
from raflora.v1 import admin_pb2, status_pb2
from structlog.testing import capture_logs

import coordinator.service
from coordinator.clock import FederationClock
from coordinator.engine import Engine
from worker.messages import Outcome, Progress, Task

RANKS = {"ada": 2, "bob": 4, "cem": 8}
LEASE_SECONDS, DEADLINE_SECONDS, HOUR = 90.0, 36_000.0, 3600.0
SHORTEST_LEASE_SECONDS = 1.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Monotonic]:
    """The coordinators of this test run on this machine's clock."""
    clock = Monotonic()
    engine = partial(Engine, clock=lambda at: FederationClock(at, clock))
    monkeypatch.setattr(coordinator.service, "Engine", engine)
    return clock


@asynccontextmanager
async def federation(folder: Path, **changes: Any) -> AsyncIterator[tuple[Observer, list[NumpyClient]]]:
    """Three clients and an open round; ten hours to the deadline."""
    changes = {"rounds__round_deadline_seconds": DEADLINE_SECONDS, "rounds__quorum": 2, **changes}
    async with (
        serving(config_of(folder, **changes)) as address,
        observing(address) as observer,
        clients_of(address, RANKS) as clients,
    ):
        yield observer, clients


async def pass_time(machine: Monotonic, seconds: float, observer: Observer) -> status_pb2.FederationStatus:
    """Moves the clock, and wakes the engine as the next caller or the end of its nap would."""
    machine.seconds += seconds
    for _ in range(3):  # silence is looked for after what a batch asked
        await observer.admin.Resume(admin_pb2.ResumeRequest())
    return await observer.see()


async def membership(observer: Observer, client_id: str) -> str:
    answer = await observer.status.ListClients(status_pb2.ListClientsRequest())
    return next(c.membership for c in answer.clients if c.client_id == client_id)


async def trained(client: NumpyClient) -> tuple[Task, bytes]:
    task = await client.fetch_task()
    content = await client.train(task)
    await client.upload(task, content)
    return task, content


# ---------------------------------------------------------------- partitions


@pytest.mark.parametrize(
    ("seconds", "is_lost"), [(1.0, False), (60.0, False), (LEASE_SECONDS - 1, False), (HOUR, True)]
)
async def test_a_result_that_comes_after_a_partition_is_taken_while_its_round_is_open_and_nobody_replaced_it(
    tmp_path: Path, machine: Monotonic, seconds: float, is_lost: bool
) -> None:
    async with federation(tmp_path) as (observer, (ada, _, _)):
        task, content = await trained(ada)
        await pass_time(machine, seconds, observer)
        assert await membership(observer, "ada") == ("lost" if is_lost else "active")
        assert await ada.submit(task, content) is Outcome.ACCEPTED
        assert await membership(observer, "ada") == "active"


async def test_a_result_of_a_lease_that_somebody_took_over_during_the_partition_is_superseded(
    tmp_path: Path, machine: Monotonic
) -> None:
    async with federation(tmp_path) as (observer, (ada, _, _)):
        task, content = await trained(ada)
        await pass_time(machine, HOUR, observer)
        again = NumpyClient(ada.address, "ada", 2, 10)  # the same worker, restarted
        newer = await again.fetch_task()
        assert await ada.submit(task, content) is Outcome.SUPERSEDED
        assert await again.submit(newer, content) is Outcome.ACCEPTED
        await again.rpc.close()


async def test_a_client_whose_line_is_held_beyond_its_lease_comes_back_and_its_round_closes(tmp_path: Path) -> None:
    """On the real clock and a real line: what ada says is under way all the time, and arrives when it heals."""
    rounds = {"rounds__num_rounds": 1, "rounds__quorum": 3, "rounds__lease_ttl_seconds": SHORTEST_LEASE_SECONDS}
    config = config_of(tmp_path, rounds__round_deadline_seconds=DEADLINE_SECONDS, **rounds)
    async with (
        serving(config) as address,
        observing(address) as observer,
        FaultProxy(address) as line,
        clients_of(line.address, {"ada": 2}) as (ada,),
        clients_of(address, {"bob": 4, "cem": 8}) as others,
    ):
        lease = (await ada.fetch_task()).lease_token
        for client in others:
            assert await client.do(await client.fetch_task()) is Outcome.ACCEPTED
        line.hold()
        heard = line.sent[Way.UP]
        beating = asyncio.create_task(ada.rpc.heartbeat(lease, Progress("training")))
        await silent_for_its_lease(observer, "ada")
        assert line.sent[Way.UP] == heard
        assert not beating.done()
        line.heal()
        await beating
        await ada.join()
        assert await membership(observer, "ada") == "active"
        assert await ada.do(await ada.fetch_task()) is Outcome.ACCEPTED
        status = await observer.finished()
        assert [c.client_id for c in status.last_round.contributions] == ["ada", "bob", "cem"]


async def silent_for_its_lease(observer: Observer, client_id: str) -> None:
    """Returns once the coordinator calls the client lost; the test's own limit bounds it."""
    async for _ in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
        if await membership(observer, client_id) == "lost":
            return
    raise AssertionError(f"{client_id} was never called lost")


async def test_a_straggler_after_the_deadline_is_told_what_became_of_its_round(
    tmp_path: Path, machine: Monotonic
) -> None:
    async with federation(tmp_path) as (observer, (ada, bob, cem)):
        late_task, late = await trained(cem)
        for client in (ada, bob):
            await client.do(await client.fetch_task())
        await pass_time(machine, DEADLINE_SECONDS + 1, observer)
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if answer.status.last_round.round == 1:
                break
        assert [c.client_id for c in answer.status.last_round.contributions] == ["ada", "bob"]
        assert await cem.submit(late_task, late) is Outcome.STALE
        for client in (ada, bob):
            await client.rpc.heartbeat(0, Progress("waiting"))
        assert (await cem.fetch_task()).round == 2, "and it goes on with the next round"


# ---------------------------------------------------------------- no quorum


async def test_without_a_quorum_a_round_is_extended_once_then_given_up_and_opened_anew(
    tmp_path: Path, machine: Monotonic
) -> None:
    with capture_logs() as logs:
        async with federation(tmp_path) as (observer, (ada, bob, cem)):
            before = (await observer.see()).adapter_digest
            await ada.do(await ada.fetch_task())
            extended = await pass_time(machine, DEADLINE_SECONDS + 1, observer)
            assert "extended once" in extended.explanation
            for client in (ada, bob, cem):
                await client.rpc.heartbeat(0, Progress("waiting"))
            machine.seconds += DEADLINE_SECONDS - LEASE_SECONDS / 2
            for client in (ada, bob, cem):
                await client.rpc.heartbeat(0, Progress("waiting"))
            given_up = await pass_time(machine, LEASE_SECONDS / 2, observer)
            assert (given_up.adapter_digest, given_up.round) == (before, 1)
            task = await ada.fetch_task()
            assert (task.round, task.attempt) == (1, 2)
    said = [(line["event"], line.get("why", "")) for line in logs]
    assert any(event == "round extended" for event, _ in said)
    assert ("round given up", "only 1 of 2 updates after the deadline was extended once") in said


async def test_when_everybody_is_gone_the_federation_says_why_and_goes_on_when_they_return(
    tmp_path: Path, machine: Monotonic
) -> None:
    async with federation(tmp_path) as (observer, clients):
        for client in clients:
            await client.fetch_task()
        for _ in range(3 * 2):  # each deadline, and its extension
            status = await pass_time(machine, DEADLINE_SECONDS + 1, observer)
        assert status.explanation.startswith("waiting for clients: 0 of 3 are here; round 1 was given up: only 0 of 2")
        assert any("too few clients are left (ada, bob, cem gone)" in warning for warning in status.warnings)
        assert not status.paused, "who is not there fails no attempt"
        await asyncio.gather(*(client.work() for client in clients))
        await observer.finished()


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 365 * 24 * HOUR], ids=["+1 h", "-1 h", "+1 year"])
async def test_a_wall_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """On either side: both are in this process. Leases and deadlines count seconds, not dates."""
    real, config = time.time, config_of(tmp_path)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        tasks = [await client.fetch_task() for client in clients]
        before = await observer.see()
        # gRPC's Python makes a date of every time-out and its core takes it back: a real jump hits both.
        monkeypatch.setattr(grpc.aio._utils, "time", SimpleNamespace(time=real))
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        for client, task in zip(clients, tasks, strict=True):
            assert await client.rpc.heartbeat(task.lease_token, Progress("training"))
        after = await observer.see()
        assert after.clients_connected == before.clients_connected == len(RANKS)
        # What passed is what the test took, and never the jump.
        assert before.deadline_seconds - abs(jump) / 2 < after.deadline_seconds <= before.deadline_seconds
        for client, task in zip(clients, tasks, strict=True):
            assert await client.do(task) is Outcome.ACCEPTED
        await asyncio.gather(*(client.work() for client in clients))
        await observer.finished()
    kinds = [entry.kind for entry in entries_of(config)]
    assert "MembershipChanged" not in kinds
    assert "RoundExtended" not in kinds
