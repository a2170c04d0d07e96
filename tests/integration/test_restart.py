"""kill -9 at the worst moments: nothing acknowledged is lost, nothing is asked for twice, the bytes stay the same."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from coordinators import (
    SEED,
    SPEC,
    CoordinatorProcess,
    NumpyClient,
    clients_of,
    config_of,
    entries_of,
    observing,
    serving,
    settings_of,
)
from raflora.v1 import status_pb2

from common.adapter import initial_adapter
from common.codec import digest_of, encode
from coordinator.config import CoordinatorConfig
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import SqlJournal
from worker.messages import Blob, Outcome, Progress

RANKS = {"ada": 2, "bob": 4, "cem": 8}
Start = Callable[[], CoordinatorProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[CoordinatorProcess] = []

    def start_one() -> CoordinatorProcess:
        processes.append(CoordinatorProcess(tmp_path, settings_of(tmp_path)))
        return processes[-1]

    yield start_one
    for process in processes:
        process.close()


async def undisturbed(folder: Path) -> list[str]:
    """The adapters' digests of a federation to which nothing happened."""
    config = config_of(folder)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        await observer.finished()
        return await digests(observer.status)


async def digests(stub) -> list[str]:
    answer = await stub.ListRounds(status_pb2.ListRoundsRequest())
    return [summary.adapter_digest for summary in answer.rounds]


async def test_a_coordinator_killed_in_the_middle_of_a_round_goes_on_as_if_nothing_had_been(
    tmp_path: Path, start: Start
) -> None:
    process = start()
    async with clients_of(process.wait_until_listening(), RANKS) as (ada, bob, cem):
        ada_task, bob_task = await ada.fetch_task(), await bob.fetch_task()
        ada_update, bob_update = await ada.train(ada_task), await bob.train(bob_task)
        await ada.upload(ada_task, ada_update)
        assert await ada.submit(ada_task, ada_update) is Outcome.ACCEPTED
        half = len(bob_update) // 2
        assert await bob.upload(bob_task, bob_update, stop_at=half) == half
        process.kill()

    process = start()
    address = process.wait_until_listening()
    ada, bob, cem = (NumpyClient(address, name, rank, 10 * i) for i, (name, rank) in enumerate(RANKS.items(), 1))
    assert (await ada.rpc.poll_task(0.0)).tasks == ()
    assert await ada.submit(ada_task, ada_update) is Outcome.DUPLICATE
    assert await ada.rpc.begin_upload(ada_task.lease_token, Blob(digest_of(ada_update), len(ada_update))) == len(
        ada_update
    )
    assert await bob.rpc.begin_upload(bob_task.lease_token, Blob(digest_of(bob_update), len(bob_update))) == half
    assert await bob.upload(bob_task, bob_update) == len(bob_update)
    assert await bob.submit(bob_task, bob_update) is Outcome.ACCEPTED
    await cem.do(await cem.fetch_task())  # the round's last: the next kill comes while it is aggregated, or just after
    process.kill()
    for client in (ada, bob, cem):
        await client.rpc.close()

    process = start()
    address = process.wait_until_listening()
    async with observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        status = await observer.finished()
        assert await digests(observer.status) == await undisturbed(tmp_path / "undisturbed")
    assert [c.num_examples for c in status.last_round.contributions] == [10, 20, 30]
    assert process.terminate() == 0, process.output


async def test_a_clean_end_answers_those_who_wait_and_a_stopped_federation_goes_on(start: Start) -> None:
    process = start()
    async with clients_of(process.wait_until_listening(), {"ada": 2}) as (ada,), observing(ada.address) as observer:
        watch = observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60)
        assert (await watch.read()).status.clients_connected == 1
        poll = asyncio.create_task(ada.rpc.poll_task(45.0))
        await ada.rpc.heartbeat(0, Progress("waiting"))  # after it, on the same connection, the poll has arrived
        assert await asyncio.to_thread(process.terminate) == 0, process.output
        assert (await poll).tasks == ()
        while await watch.read() is not grpc.aio.EOF:
            pass
        assert await watch.code() is grpc.StatusCode.OK
    process = start()
    async with observing(process.wait_until_listening()) as observer:
        assert (await observer.see()).clients_known == 1


async def test_a_coordinator_that_died_while_aggregating_aggregates_the_frozen_inputs(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        expected = (await observer.finished()).adapter_digest
    dead = as_it_was_when_the_round_closed(config, tmp_path / "dead", [client.sent[1] for client in clients])
    assert expected not in FileBlobs(dead.state_dir / "blobs").digests()
    async with serving(dead) as address, observing(address) as observer:
        assert (await observer.finished()).adapter_digest == expected
    kinds = [entry.kind for entry in entries_of(dead)]
    assert (kinds.count("RoundOpened"), kinds.count("RoundClosed"), kinds.count("AdapterPublished")) == (1, 1, 1)


async def test_a_damaged_update_is_found_before_it_is_aggregated(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, rounds__max_attempts=1)
    async with serving(config) as address, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
    dead = as_it_was_when_the_round_closed(config, tmp_path / "dead", [client.sent[1] for client in clients])
    FileBlobs(dead.state_dir / "blobs").open(digest_of(clients[1].sent[1])).write_bytes(b"rot")
    async with serving(dead) as address, observing(address) as observer:
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if answer.status.paused:
                break
        assert "its bytes changed on disk" in answer.status.explanation
        assert answer.status.phase == status_pb2.PHASE_WAITING_FOR_CLIENTS


async def test_a_finished_federation_stays_finished_and_goes_on_serving_its_adapter(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        before = await observer.fetch(3)
    entries = entries_of(config)
    async with serving(config) as address, observing(address) as observer:
        assert (await observer.see()).phase == status_pb2.PHASE_FINISHED
        assert await observer.fetch(3) == before
    assert entries_of(config) == entries


async def test_only_what_is_referred_to_stays_on_disk(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=3, store__keep_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        status = await observer.finished()
    async with serving(config):  # sweeps at its start
        kept = FileBlobs(config.state_dir / "blobs").digests()
    assert kept == {status.manifest_digest, status.adapter_digest}
    assert [path for path in (config.state_dir / "uploads").rglob("*") if path.is_file()] == []


def as_it_was_when_the_round_closed(config: CoordinatorConfig, folder: Path, updates: list[bytes]) -> CoordinatorConfig:
    """The state folder of a coordinator that died between freezing the inputs of round 1 and publishing."""
    dead = config_of(folder, **{"rounds__num_rounds": 1, "rounds__max_attempts": config.rounds.max_attempts})
    source, blobs = FileBlobs(config.state_dir / "blobs"), folder / "state" / "blobs"
    blobs.parent.mkdir(parents=True)
    entries = entries_of(config)
    closed = next(i for i, entry in enumerate(entries) if entry.kind == "RoundClosed")
    journal = SqlJournal(f"sqlite:///{dead.state_dir / 'journal.sqlite'}")
    journal.append(dead.name, entries[: closed + 1])
    journal.close()
    target = FileBlobs(blobs)
    for digest in source.digests():
        content = source.open(digest).read_bytes()
        if content.startswith(b"{"):
            target.put(content)  # the manifest
    for content in (encode(initial_adapter(SPEC, config.adapter.global_rank, SEED)), *updates):
        target.put(content)
    return dead
