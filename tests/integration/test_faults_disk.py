"""A disk that is full, broken or held by somebody else, at each write: nothing acknowledged is lost or done twice.

Full and held are waited out, by workers and by the coordinator itself; broken is the end of the process, at once.
"""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from errno import EIO, ENOSPC
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
from coordinators import (
    CoordinatorProcess,
    NumpyClient,
    Observer,
    clients_of,
    config_of,
    entries_of,
    observing,
    serving,
    settings_of,
)
from faults.small_disk import fill, small_disk
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raflora.v1 import status_pb2

from common import failpoints, transfer
from common.errors import RafloraError, StorageFailed, TooBusy, Unavailable
from common.settings import FAILPOINTS_VARIABLE
from common.transfer import is_disk_full
from coordinator import founding
from coordinator.config import CoordinatorConfig
from coordinator.server import run_coordinator
from coordinator.stores import journal as journal_module
from worker.messages import Outcome, Task

RANKS = {"ada": 2, "bob": 4}
WRITES = frozenset(
    {"part.writing", "file.writing", "file.renaming", "bytes.syncing", "shard.making", "blob.linking"}
    | {"upload.announcing", "journal.committing", "journal.checkpointing", "head.writing"}
)
WATCHERS = 2  # every one of them must hear it
T = TypeVar("T")


@pytest.fixture(autouse=True)
def unarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(founding, "ROOM_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("coordinator.engine._FULL_DISK_PAUSE_SECONDS", 0.01)
    yield
    failpoints.arm(None)


def config_for(folder: Path, **changes: object) -> CoordinatorConfig:
    return config_of(folder, rounds__num_rounds=1, rounds__min_clients=2, **changes)


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """As a worker does: what is too busy or unavailable is tried again."""
    while True:
        try:
            return await call()
        except (TooBusy, Unavailable):
            await asyncio.sleep(0.02)


async def send(client: NumpyClient, task: Task, content: bytes) -> Outcome:
    await client.upload(task, content)
    return await client.submit(task, content)


async def work(client: NumpyClient) -> None:
    """To the end of the federation, by a client that never gives up."""
    await insist(client.join)
    while True:
        polled = await insist(lambda: client.rpc.poll_task(30.0))
        for task in polled.tasks:
            await insist(partial(do, client, task))
        if polled.is_finished:
            return


async def do(client: NumpyClient, task: Task) -> None:
    outcome = await send(client, task, await client.train(task))
    # Of an answer that did not come, the repetition finds what became of it.
    assert outcome in (Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.STALE)


async def play(config: CoordinatorConfig) -> str:
    """A whole round; the digest of its adapter."""
    async with serving(config) as address, observing(address) as observer:
        clients = [NumpyClient(address, name, rank, 10 * (i + 1)) for i, (name, rank) in enumerate(RANKS.items())]
        await insist(clients[0].join)  # in this order
        await asyncio.gather(*(work(client) for client in clients))
        digest = (await observer.finished()).adapter_digest
        for client in clients:
            await client.rpc.close()
    return digest


def check_once_each(config: CoordinatorConfig) -> None:
    kinds = [entry.kind for entry in entries_of(config)]
    assert (kinds.count("UpdateAccepted"), kinds.count("AdapterPublished")) == (2, 1)
    assert "RoundAbandoned" not in kinds


@pytest.fixture
async def expected(tmp_path: Path) -> str:
    return await play(config_for(tmp_path / "undisturbed"))


# ---------------------------------------------------------------- full, by failpoints


async def play_on_a_disk_that_fills(config: CoordinatorConfig, fails: Callable[[str, int], bool]) -> tuple[str, int]:
    """The adapter's digest, and how many writes found the disk full."""
    count = refused = 0

    def watch(step: str) -> None:
        nonlocal count, refused
        if step in WRITES:
            count += 1
            if fails(step, count):
                refused += 1
                raise OSError(ENOSPC, os.strerror(ENOSPC))

    failpoints.arm(watch)
    try:
        while True:
            try:
                return await play(config), refused
            except (TooBusy, OSError) as error:  # at the start: whoever supervises the process starts it again
                if not isinstance(error, TooBusy) and not is_disk_full(error):
                    raise
    finally:
        failpoints.arm(None)


async def test_every_kind_of_write_finds_the_disk_full_at_first_and_every_fourth_time(
    tmp_path: Path, expected: str
) -> None:
    seen: set[str] = set()
    random = Random(20261123)  # noqa: S311 - to be repeatable

    def fails(step: str, _: int) -> bool:
        is_first = step not in seen
        seen.add(step)
        return is_first or random.random() < 0.25  # not by turns: a start of several writes would never get through

    config = config_for(tmp_path / "full")
    digest, refused = await play_on_a_disk_that_fills(config, fails)
    assert digest == expected
    assert seen == WRITES
    assert refused > len(WRITES)
    check_once_each(config)


@pytest.mark.parametrize("kth", [1, 4, 9, 16, 25, 36])
async def test_the_disk_is_full_for_a_while_from_the_kth_write_on(tmp_path: Path, expected: str, kth: int) -> None:
    config = config_for(tmp_path / "full")
    digest, refused = await play_on_a_disk_that_fills(config, lambda _, count: kth <= count < kth + 6)
    assert (digest, refused) == (expected, 6)
    check_once_each(config)


async def test_a_round_that_cannot_be_published_waits_for_room_and_says_so(tmp_path: Path, expected: str) -> None:
    is_full = False

    def watch(step: str) -> None:
        nonlocal is_full
        is_full = is_full or step == "adapter.merged"
        if is_full and step in WRITES:
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    config = config_for(tmp_path / "full")
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        failpoints.arm(watch)
        for client in clients:
            assert await client.do(await client.fetch_task()) is Outcome.ACCEPTED
        status = await until(observer, lambda status: any("not yet published" in line for line in status.warnings))
        assert any("round 1 is closed but not yet published: " in line and "full" in line for line in status.warnings)
        failpoints.arm(None)
        status = await observer.finished()
        assert (status.adapter_digest, status.last_round.attempts) == (expected, 1)
        assert not any("published" in line for line in (await observer.see()).warnings)
    check_once_each(config)


async def until(
    observer: Observer, holds: Callable[[status_pb2.FederationStatus], bool]
) -> status_pb2.FederationStatus:
    """The status as soon as it holds; the calls themselves are the pause."""
    async with asyncio.timeout(60):
        while not holds(status := await observer.see()):
            pass
    return status


# ---------------------------------------------------------------- full, to the byte


def fill_at(wanted: str, folder: Path, step: str) -> None:
    if step == wanted:
        fill(folder)


async def test_on_a_disk_without_a_byte_nothing_is_lost_and_everything_goes_on_when_there_is_room(
    tmp_path: Path, expected: str
) -> None:
    async with small_disk(tmp_path / "disk", 4) as disk:
        config = config_for(tmp_path / "full", state_dir=str(disk / "state"), limits__min_free_bytes=0)
        async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
            ada, bob = clients
            tasks = [await client.fetch_task() for client in clients]
            contents = [await client.train(task) for client, task in zip(clients, tasks, strict=True)]
            assert await send(ada, tasks[0], contents[0]) is Outcome.ACCEPTED
            before = entries_of(config)
            filler = fill(disk)
            with pytest.raises(TooBusy):
                await send(bob, tasks[1], contents[1])
            status = await observer.see()
            assert status.phase == status_pb2.PHASE_TRAINING  # readable
            assert entries_of(config) == before
            filler.unlink()
            # Full again when the round has closed: its adapter finds no room.
            failpoints.arm(partial(fill_at, "adapter.merged", disk))
            assert await insist(lambda: send(bob, tasks[1], contents[1])) is Outcome.ACCEPTED
            await until(observer, lambda status: any("not yet published" in line for line in status.warnings))
            failpoints.arm(None)
            (disk / "filler").unlink()
            assert (await observer.finished()).adapter_digest == expected
        check_once_each(config)


async def test_uploads_that_would_not_fit_are_refused_before_their_first_byte(tmp_path: Path) -> None:
    async with small_disk(tmp_path / "disk", 4) as disk:
        config = config_for(tmp_path / "full", state_dir=str(disk / "state"), limits__min_free_bytes=2 << 20)
        async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as (ada, _):
            task = await ada.fetch_task()
            content = await ada.train(task)
            (disk / "filler").write_bytes(bytes(2 << 20))
            with pytest.raises(TooBusy, match=r"no room for this upload: the disk has .* keeps 2.0 MiB free"):
                await ada.upload(task, content)
            status = await observer.see()
            assert any(line.startswith("uploads are refused: the disk has") for line in status.warnings)
            assert 0 < status.disk_free_bytes < 2 << 20
            assert status.disk_bytes > 0
            (disk / "filler").unlink()
            assert await send(ada, task, content) is Outcome.ACCEPTED
            assert not any("refused" in line for line in (await observer.see()).warnings)


# ---------------------------------------------------------------- broken


class BreakingFsync:
    """The kth fsync fails; which file it was for, and which files were synced afterwards."""

    def __init__(self, kth: int) -> None:
        self._left = kth
        self._real = os.fsync
        self._lock = threading.Lock()
        self.failed = ""
        self.synced_after: list[str] = []

    def __call__(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.failed = path
                raise OSError(EIO, os.strerror(EIO))
            if self.failed:
                self.synced_after.append(path)
        self._real(descriptor)


@pytest.mark.parametrize("kth", range(1, 40, 5))
async def test_a_failed_fsync_is_the_end_and_is_never_asked_again(
    tmp_path: Path, expected: str, kth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "broken")
    fsync = BreakingFsync(kth)
    monkeypatch.setattr(os, "fsync", fsync)
    acknowledged: list[str] = []
    ended: StorageFailed | None = None
    try:
        await asyncio.wait_for(_play_until_it_ends(config, acknowledged), 60)
    except StorageFailed as failure:
        ended = failure
    monkeypatch.undo()
    monkeypatch.setattr(transfer, "_lost", set())  # what follows stands for a new process
    assert bool(ended) == bool(fsync.failed)
    assert fsync.failed not in fsync.synced_after
    accepted = [e.body for e in entries_of(config) if e.kind == "UpdateAccepted"]
    assert all(any(name in body for body in accepted) for name in acknowledged)
    assert await play(config) == expected
    check_once_each(config)


async def _play_until_it_ends(config: CoordinatorConfig, acknowledged: list[str]) -> None:
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_coordinator(config, on_listening=listening.set_result))
    try:
        either: set[asyncio.Future[Any]] = {running, listening}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if listening.done():
            with suppress(RafloraError):  # of any call, as soon as the coordinator has ended
                await _play_with(await listening, acknowledged)
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
    if isinstance(ended, Exception):
        raise ended


async def _play_with(address: str, acknowledged: list[str]) -> None:
    async def until_unavailable(client: NumpyClient) -> None:
        with suppress(RafloraError):
            await client.join()
            task = await client.fetch_task()
            content = await client.train(task)
            if await send(client, task, content) is Outcome.ACCEPTED:
                acknowledged.append(client.client_id)

    clients = [NumpyClient(address, name, rank, 10 * (i + 1)) for i, (name, rank) in enumerate(RANKS.items())]
    try:
        with suppress(RafloraError):
            await clients[0].join()
        await asyncio.gather(*(until_unavailable(client) for client in clients))
        async with observing(address) as observer:
            with suppress(Exception):
                await observer.finished()
    finally:
        for client in clients:
            await client.rpc.close()


async def test_a_broken_disk_ends_the_process_with_a_status_and_health_says_so_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    settings = settings_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2)
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "fail@part.writing=EIO")
    process = CoordinatorProcess(tmp_path, settings)
    monkeypatch.delenv(FAILPOINTS_VARIABLE)
    try:
        address = process.wait_until_listening()
        async with clients_of(address, RANKS) as (ada, _), observing(address) as observer:
            stub = health_pb2_grpc.HealthStub(observer.channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(WATCHERS)]
            assert [(await watch.read()).status for watch in watches] == WATCHERS * [serving_]
            task = await ada.fetch_task()
            content = await ada.train(task)
            with pytest.raises(Unavailable):
                await send(ada, task, content)
            said = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
            assert [getattr(answer, "status", answer) for answer in said] == WATCHERS * [not_serving]
            assert await asyncio.to_thread(process.wait) == 1
    finally:
        process.close()
    assert any("did not keep what it was given" in line for line in process.output)


# ---------------------------------------------------------------- held by somebody else


async def test_a_database_that_another_process_locks_is_waited_out(
    tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WAIT_SECONDS", 0.1)
    config = config_for(tmp_path / "held")
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as (ada, bob):
        assert await ada.do(await ada.fetch_task()) is Outcome.ACCEPTED
        task = await bob.fetch_task()
        content = await bob.train(task)
        await bob.upload(task, content)
        foreigner = sqlite3.connect(config.state_dir / "journal.sqlite", isolation_level=None)
        foreigner.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            with pytest.raises(Unavailable, match="another process has locked it"):
                await bob.submit(task, content)
        assert (await observer.see()).phase == status_pb2.PHASE_TRAINING
        foreigner.execute("ROLLBACK")
        foreigner.close()
        assert await bob.submit(task, content) is Outcome.ACCEPTED
        assert (await observer.finished()).adapter_digest == expected
    check_once_each(config)
