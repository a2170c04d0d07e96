"""Slices and updates over a line that breaks: the right bytes arrive, and hardly any of them twice."""

import asyncio
import random
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc.aio
import pytest
from coordinators import observing, serving
from faults.answers import CallProxy
from faults.proxy import Cut, FaultProxy, Way
from faults.wide import CHUNKS, CONTENT, WideClient, beside, content, wide_client, wide_config
from raflora.v1 import federation_pb2, federation_pb2_grpc

import coordinator.server
import coordinator.servicers.federation as servicer
import worker.client
from common.channel import Keepalive, client_channel
from common.codec import digest_of
from common.transfer import CHUNK_BYTES, SYNC_BYTES
from worker.messages import Outcome, Task

SEED = 20_261_123
BOUNDARIES = [
    byte
    for boundary in [*range(CHUNK_BYTES, CHUNKS * CHUNK_BYTES + 1, CHUNK_BYTES), len(CONTENT)]
    for byte in (boundary - 1, boundary, boundary + 1)
    if byte <= len(CONTENT)
]


async def accepted(client: WideClient, task: Task, update: bytes) -> None:
    """The coordinator holds exactly these bytes: it has checked their digest, and takes them."""
    blob = await client.send(task, update)
    assert await client.submit(task, blob) is Outcome.ACCEPTED


# ---------------------------------------------------------------- downloads


@pytest.mark.parametrize("how", list(Cut))
async def test_a_fetch_that_is_cut_at_random_bytes_is_resumed_and_checked(tmp_path: Path, how: Cut) -> None:
    chance = random.Random(SEED)  # noqa: S311 - a seed, not a secret
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        FaultProxy(address) as line,
        wide_client(line.address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        cuts = [chance.randrange(1000, CHUNK_BYTES) for _ in range(4)]
        fetching = asyncio.create_task(ada.fetch(task))
        for number, cut in enumerate(cuts, start=1):
            line.cut_after(Way.DOWN, cut, how)
            await line.until(lambda number=number: line.connections > number)
        path = await fetching
        assert digest_of(path.read_bytes()) == task.adapter.digest
        assert len(path.read_bytes()) == len(CONTENT)
        again = line.sent[Way.DOWN] - len(CONTENT)
        assert again <= (len(cuts) + 1) * CHUNK_BYTES, "no more than the chunk that was cut comes twice"


async def test_a_slice_that_changed_on_the_way_is_not_used(tmp_path: Path) -> None:
    """The bytes of a worker's part file are nobody's word: the digest is looked at when it is whole, before its use."""
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        wide_client(address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        part = ada.folder / "slices" / f"{task.adapter.digest}.part"
        part.parent.mkdir()
        part.write_bytes(bytes(2 * CHUNK_BYTES))  # what a bad disk made of two chunks
        assert digest_of((await ada.fetch(task)).read_bytes()) == task.adapter.digest


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize("is_abrupt", [True, False], ids=["the line breaks", "the answer is lost"])
async def test_an_upload_cut_at_each_chunk_boundary_goes_on_at_the_durable_offset(
    tmp_path: Path, is_abrupt: bool
) -> None:
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        CallProxy(address) as line,
        wide_client(line.address, tmp_path) as ada,
    ):
        line.cut_before_the_end = is_abrupt
        await ada.join()
        task = await ada.task()
        for number, cut in enumerate(BOUNDARIES):
            line.cut_uploads, line.uploaded_bytes = [cut], 0
            blob = await ada.send(task, content(number))
            assert line.cut_uploads == []
            again = line.uploaded_bytes - len(CONTENT)
            assert 0 <= again <= (min(cut, SYNC_BYTES) if is_abrupt else 0), f"cut at byte {cut}"
        assert await ada.submit(task, blob) is Outcome.ACCEPTED


async def test_an_upload_over_a_line_that_is_reset_at_random_bytes_arrives(tmp_path: Path) -> None:
    chance = random.Random(SEED)  # noqa: S311 - a seed, not a secret
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        FaultProxy(address) as line,
        wide_client(line.address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        sending = asyncio.create_task(accepted(ada, task, content(1)))
        before, resets = line.sent[Way.UP], 4
        for number in range(1, resets + 1):
            line.cut_after(Way.UP, chance.randrange(1000, CHUNK_BYTES))
            await line.until(lambda number=number: line.connections > number)
        await sending
        assert line.sent[Way.UP] - before <= len(CONTENT) + resets * CHUNK_BYTES + (256 << 10)


async def test_a_short_partition_in_the_middle_of_an_upload_goes_unnoticed(tmp_path: Path) -> None:
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        FaultProxy(address) as line,
        wide_client(line.address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        began = line.sent[Way.UP]
        line.limit(Way.UP, bytes_per_second=200e6)
        sending = asyncio.create_task(accepted(ada, task, content(1)))
        await line.until(lambda: line.sent[Way.UP] - began > CHUNK_BYTES)
        line.hold()
        await observe_nothing(line)
        line.release()
        await sending
        assert line.connections == 1


async def adapter_of_a_round(folder: Path, line_seconds: float) -> str:
    """Ada's whole round over a line so long, each way, and bob's beside it; the digest of what they made."""
    async with (
        serving(wide_config(folder, rounds__num_rounds=1)) as address,
        observing(address) as observer,
        beside(address, folder) as bob,
        FaultProxy(address) as line,
        wide_client(line.address, folder) as ada,
    ):
        if line_seconds:
            line.delay(line_seconds)
        await ada.join()
        for client, number in ((ada, 1), (bob, 2)):
            task = await client.task()
            assert digest_of((await client.fetch(task)).read_bytes()) == task.adapter.digest
            await accepted(client, task, content(number))
        assert line.connections == 1, "far away is not lost"
        return (await observer.finished()).adapter_digest


async def test_a_round_over_a_line_of_a_tenth_of_a_second_each_way_makes_the_same_adapter(tmp_path: Path) -> None:
    near = await adapter_of_a_round(tmp_path / "near", line_seconds=0.0)
    assert await adapter_of_a_round(tmp_path / "far", line_seconds=0.1) == near


async def observe_nothing(line: FaultProxy) -> None:
    """Some turns of the loop in which nothing comes through."""
    before = dict(line.sent)
    for _ in range(50):
        await asyncio.sleep(0)
    assert line.sent == before


# ---------------------------------------------------------------- one direction only


STREAMS = 8
SMALL_WINDOWS = [("grpc.http2.bdp_probe", 0)]  # 64 KiB a stream, whatever the line could carry


@asynccontextmanager
async def deaf(address: str, task: Task) -> AsyncIterator[list[grpc.aio.UnaryStreamCall]]:
    """Downloads of ada's that have begun, by somebody who pings but reads nothing more and sets no deadline."""
    who = {"client_id": "ada", "enrol_key": "key-of-ada"}
    request = federation_pb2.DownloadAdapterRequest(**who, digest=task.adapter.digest)
    async with grpc.aio.insecure_channel(address, options=SMALL_WINDOWS) as channel:
        stub = federation_pb2_grpc.FederationServiceStub(channel)
        calls = [stub.DownloadAdapter(request) for _ in range(STREAMS)]
        for call in calls:
            await call.initial_metadata()
        yield calls


class Streams:
    """The coordinator's end of the downloads: how many have ended there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = asyncio.Semaphore(0)
        real = servicer.one_ahead

        async def spied(chunks: Generator[bytes]) -> AsyncIterator[bytes]:
            try:
                async with aclosing(real(chunks)) as content:
                    async for chunk in content:
                        yield chunk
            finally:
                self.ended.release()

        monkeypatch.setattr(servicer, "one_ahead", spied)

    async def all_ended(self) -> None:
        for _ in range(STREAMS):
            await self.ended.acquire()


@pytest.mark.parametrize("is_stuck", [True, False], ids=["nothing comes through", "nobody reads"])
async def test_a_slow_reader_is_ended_by_keepalive_or_by_age_and_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stuck: bool
) -> None:
    """One direction is stuck, pings and all; or a caller answers pings for ever and never reads its streams."""
    quick = replace(Keepalive().scaled(1 / 60), connection_seconds=600.0)
    aging = replace(Keepalive(), connection_seconds=2.0, connection_grace_seconds=0.1)
    monkeypatch.setattr(coordinator.server, "Keepalive", lambda: quick if is_stuck else aging)
    streams = Streams(monkeypatch)
    async with (
        serving(wide_config(tmp_path)) as address,
        observing(address) as observer,
        beside(address, tmp_path),
        FaultProxy(address) as line,
        wide_client(address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        async with deaf(line.address, task):
            if is_stuck:
                line.hold(Way.DOWN)
            await streams.all_ended()
            assert (await observer.see()).bytes_sent <= STREAMS * 2 * CHUNK_BYTES, "no more than is under way"
        line.heal()
        assert digest_of((await ada.fetch(task)).read_bytes()) == task.adapter.digest


async def test_answers_that_never_come_are_a_lost_coordinator_and_not_an_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One direction: what the worker says arrives, what it is told does not."""
    quick = partial(client_channel, keepalive=Keepalive().scaled(1 / 30))
    monkeypatch.setattr(worker.client, "client_channel", quick)
    async with (
        serving(wide_config(tmp_path)) as address,
        beside(address, tmp_path),
        FaultProxy(address) as line,
        wide_client(line.address, tmp_path) as ada,
    ):
        await ada.join()
        task = await ada.task()
        blob = await ada.send(task, content(1))
        line.lose(Way.DOWN)
        submitting = asyncio.create_task(ada.submit(task, blob))
        await line.until(lambda: line.lost[Way.DOWN] > 0)
        await line.until(lambda: line.open_connections == 0)
        line.heal()
        assert await submitting in (Outcome.ACCEPTED, Outcome.DUPLICATE)
