"""Processes that die, freeze and are told to end in the middle of something: real ones, with real signals."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from coordinators import START_SECONDS, CoordinatorProcess, clients_of, entries_of, observing, serving, settings_of
from faults.workers import mishap, tiny_federation, worker_process
from raflora.v1 import federation_pb2, federation_pb2_grpc

from common.codec import digest_of
from common.errors import RafloraError
from coordinator.stores.journal import SqlJournal
from worker.messages import Blob, Outcome

RANKS = {"ada": 2, "bob": 4, "cem": 8}
Start = Callable[..., CoordinatorProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[CoordinatorProcess] = []

    def start_one(folder: Path = tmp_path, **changes: Any) -> CoordinatorProcess:
        processes.append(CoordinatorProcess(folder, settings_of(folder, **changes)))
        return processes[-1]

    yield start_one
    for process in processes:
        process.close()


def signalled(process: CoordinatorProcess, kind: signal.Signals) -> None:
    os.kill(process._process.pid, kind)


# ---------------------------------------------------------------- workers


async def test_a_worker_killed_in_training_is_restarted_and_the_same_round_completes(tmp_path: Path) -> None:
    config, folder = tiny_federation(tmp_path, rounds__lease_ttl_seconds=1), tmp_path / "ada"
    mishap(folder, "wait_for_stop")
    async with serving(config) as address, observing(address) as observer:
        with worker_process(address, folder, "ada") as first:
            await until_training(observer)
            first.kill()
        with worker_process(address, folder, "ada") as second:
            status = await observer.finished()
            said, _ = await asyncio.to_thread(second.communicate, timeout=START_SECONDS)
            assert second.returncode == 0, said
    kinds = [entry.kind for entry in entries_of(config)]
    assert kinds.count("RoundOpened") == 1, "the same round, the same attempt"
    assert kinds.count("TaskClaimed") == 2, "under a newer lease"
    assert [c.client_id for c in status.last_round.contributions] == ["ada"]
    assert not any("two workers" in warning for warning in status.warnings)


async def until_training(observer: Any) -> None:
    while "training" not in [a.activity for a in (await observer.see()).assignments]:
        pass


async def test_a_trainer_killed_in_training_costs_its_task_and_the_same_round_completes(tmp_path: Path) -> None:
    config, folder = tiny_federation(tmp_path), tmp_path / "ada"
    mishap(folder, "crash")
    async with serving(config) as address, observing(address) as observer:
        with worker_process(address, folder, "ada") as agent:
            await observer.finished()
            await asyncio.to_thread(agent.communicate, timeout=START_SECONDS)
    kinds = [entry.kind for entry in entries_of(config)]
    assert (kinds.count("TaskFailed"), kinds.count("RoundOpened")) == (1, 1)


# ---------------------------------------------------------------- an orderly end


async def test_a_coordinator_told_to_end_finishes_the_upload_and_takes_it_up_after_its_restart(start: Start) -> None:
    process = start()
    address = process.wait_until_listening()
    async with clients_of(address, RANKS) as (ada, _, _), grpc.aio.insecure_channel(address) as channel:
        task = await ada.fetch_task()
        content = await ada.train(task)
        await ada.rpc.begin_upload(task.lease_token, Blob(digest_of(content), len(content)))
        metadata = {"client-id": "ada", "enrol-key": ada.enrol_key, "digest": digest_of(content), "offset": "0"}
        call = federation_pb2_grpc.FederationServiceStub(channel).UploadAdapter(
            metadata=tuple((f"raflora-{key}", value) for key, value in metadata.items())
        )
        half = len(content) // 2
        await call.write(federation_pb2.UploadAdapterRequest(data=content[:half]))
        signalled(process, signal.SIGTERM)
        await asyncio.to_thread(until_said, process, "stopping")
        async with grpc.aio.insecure_channel(address) as late:
            with pytest.raises(grpc.aio.AioRpcError):  # nobody new is let in
                await federation_pb2_grpc.FederationServiceStub(late).Handshake(
                    federation_pb2.HandshakeRequest(protocol_min=1, protocol_max=1), timeout=5
                )
        await call.write(federation_pb2.UploadAdapterRequest(data=content[half:]))
        await call.done_writing()
        assert (await call).committed_bytes == len(content), "what was under way came to its end"
    assert await asyncio.to_thread(process.wait) == 0, process.output
    process = start()
    async with clients_of(process.wait_until_listening(), RANKS) as (ada, _, _):
        assert await ada.rpc.begin_upload(task.lease_token, Blob(digest_of(content), len(content))) == len(content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED


def until_said(process: CoordinatorProcess, event: str) -> None:
    """Reads its log up to this event."""
    while True:
        line = process._lines.get(timeout=START_SECONDS)
        assert line, process.output
        if line.startswith("{") and json.loads(line).get("event") == event:
            return


# ---------------------------------------------------------------- two coordinators on one journal


async def test_a_coordinator_that_slept_while_another_took_its_journal_records_nothing_and_ends(
    tmp_path: Path, start: Start
) -> None:
    """As on PostgreSQL: the journal is shared, so no lock of a folder keeps the second one out; the sequence does."""
    journal = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    old = start(store__journal=journal)
    async with clients_of(old.wait_until_listening(), RANKS) as (ada, bob, _):
        ada_task, bob_task = await ada.fetch_task(), await bob.fetch_task()
        content = await ada.train(ada_task)
        await ada.upload(ada_task, content)
        bobs = await bob.train(bob_task)
        signalled(old, signal.SIGSTOP)

        other = tmp_path / "standby"
        shutil.copytree(tmp_path / "state", other / "state", ignore=shutil.ignore_patterns("*.lock"))
        new = start(other, store__journal=journal)
        async with clients_of(new.wait_until_listening(), RANKS) as (_, newer_bob, _):
            await newer_bob.upload(bob_task, bobs)
            assert await newer_bob.submit(bob_task, bobs) is Outcome.ACCEPTED
            before = entries_in(journal)
            signalled(old, signal.SIGCONT)
            with pytest.raises(RafloraError):
                await ada.submit(ada_task, content)
            assert await asyncio.to_thread(old.wait) != 0
            assert entries_in(journal) == before, "the old one's commit has changed nothing"
            assert any("another coordinator writes to this journal" in line for line in old.output)
            assert (await newer_bob.rpc.poll_task(0.0)).tasks == (), "the new one goes on"


def entries_in(journal: str) -> list[Any]:
    shared = SqlJournal(journal)
    try:
        return list(shared.read("digits"))
    finally:
        shared.close()
