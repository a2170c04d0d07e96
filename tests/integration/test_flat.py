"""Memory and handles stay flat: benchmarks/load in small, against a coordinator process. Linux only."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeAlias

import grpc.aio
import pytest
from raflora.v1 import federation_pb2 as pb

from benchmarks.load import uploads
from benchmarks.load.clients import Client, Payload, closing, make_payload, observing, reason_of
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.usage import Usage, usage_of
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout

Stream: TypeAlias = "grpc.aio.StreamUnaryCall[pb.UploadAdapterRequest, pb.UploadAdapterResponse]"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

SPEC = AdapterSpec((ModuleShape("layer.0", 4096, 4096),), ())
RANK = 48  # 1.5 MiB a client: two chunks
PLACES = 64  # server.max_uploads as it comes
STATUS_SECONDS = 10.0  # the deadline of a status call


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[CoordinatorProcess]:
    settings = uploads.settings_of(num_clients=PLACES + 2)
    async with CoordinatorProcess(tmp_path / "federation", settings) as process:
        yield process


def clients_of(coordinator: CoordinatorProcess, count: int) -> list[Client]:
    return [Client(coordinator.address, f"client-{i:03}", RANK) for i in range(count)]


async def stalled(client: Client, task: pb.Task, payload: Payload) -> Stream:
    """A stream with a place, of which one chunk has come and the rest never will."""
    await client.begin(task, payload)
    call = client.stream(payload, 0)
    await call.write(pb.UploadAdapterRequest(data=next(payload.chunks(0))))
    return call


async def flap(coordinator: CoordinatorProcess, number: int) -> None:
    client = Client(coordinator.address, f"client-{number:03}", RANK)
    async with closing([client]):
        await client.join(SPEC)
        await client.poll(0.0)
        await client.leave()


async def usage_at_most(coordinator: CoordinatorProcess, bound: Usage) -> Usage:
    """What the process holds as soon as that is no more than the bound. Nobody tells when it has closed a socket."""
    async with asyncio.timeout(60):
        while True:
            now = usage_of(coordinator.pid)
            if now.handles <= bound.handles and now.threads <= bound.threads:
                return now
            await asyncio.sleep(0.05)


async def test_eight_uploads_at_once_cost_less_memory_than_one_of_their_files(tmp_path: Path) -> None:
    # Before streams were bounded, the same eight cost several of their files.
    report = await uploads.measure(tmp_path, num_clients=8, megabytes=64)
    growth = next(f for f in report.figures if f.name == "growth from the first byte to the last answer")
    assert growth.value * 2**20 < 64e6, report


async def test_clients_that_come_and_go_leave_neither_handles_nor_threads(coordinator: CoordinatorProcess) -> None:
    for number in range(10):  # the first ones found the federation and fill the thread pools
        await flap(coordinator, number)
    before = usage_of(coordinator.pid)
    await asyncio.gather(*(flap(coordinator, number) for number in range(10, 60)))
    after = await usage_at_most(coordinator, before)
    assert after.handles <= before.handles


async def test_stalled_uploads_leave_the_status_answering_and_the_next_one_is_refused(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    payload = make_payload(tmp_path / "update", Layout(SPEC, RANK), 0)
    async with closing(clients_of(coordinator, PLACES + 2)) as clients, observing(coordinator.address) as observer:
        for client in clients:
            await client.join(SPEC)
        tasks = await asyncio.gather(*(client.task() for client in clients))
        calls = [await stalled(*each, payload) for each in zip(clients[:PLACES], tasks[:PLACES], strict=True)]
        async with asyncio.timeout(STATUS_SECONDS):
            status = await observer.look()
        assert len(status.assignments) == PLACES + 2
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await clients[PLACES].begin(tasks[PLACES], payload)
        assert reason_of(refusal.value) == "too_busy"
        calls[0].cancel()  # its place is free again for the one that was refused
        async with asyncio.timeout(60):
            await place_of(clients[PLACES], tasks[PLACES], payload)
        for call in calls:
            call.cancel()


async def place_of(client: Client, task: pb.Task, payload: Payload) -> None:
    """Waits for a place as a worker does: it asks again, and the calls themselves are the pause."""
    while True:
        try:
            await client.begin(task, payload)
            return
        except grpc.aio.AioRpcError as error:
            if reason_of(error) != "too_busy":
                raise
