"""Uploads that send one chunk and then nothing, and a status call meanwhile. `python -m benchmarks.load.stalled`

Twice: with the limits as they come, where the surplus must be refused at once with "too_busy", and with room for all,
where every stream keeps its place. Every client has a connection of its own. The coordinator takes a place back after
CHUNK_WAIT_SECONDS (60 s) of silence; the second turn waits for that, too, and counts who is told so.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from raflora.v1 import federation_pb2 as pb

from benchmarks.load.clients import Client, Observer, Payload, closing, make_payload, observing, reason_of
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.report import MIB, Figure, Report, add_format, percentiles, setting_of, tell
from benchmarks.load.usage import Usage, forget_peak, usage_of
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout
from common.memory import keep_memory_flat
from coordinator.intake import CHUNK_WAIT_SECONDS

STATUS_MS = 100.0  # that issue 4 allows
SPEC = AdapterSpec((ModuleShape("layer.0", 8192, 8192),), ())
RANK = 32  # 2 MiB a client: two chunks, of which one comes
_AT_ONCE = 64  # connections that are being made at one time
_LOOK_SECONDS = 0.05  # between two status calls
_WATCH_SECONDS = 20.0  # of status calls while all are stalled
_GRACE_SECONDS = 30.0  # beyond CHUNK_WAIT_SECONDS


@dataclass
class Turn:
    """One coordinator with its stalled streams."""

    before: Usage | None = None
    during: Usage | None = None
    latencies: list[float] = field(default_factory=list)
    idle_latencies: list[float] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # by reason, at once
    ended: Counter[str] = field(default_factory=Counter)  # by reason, after the silence
    stalled: int = 0


@dataclass(frozen=True)
class Stalled:
    """A stream whose sender has gone quiet."""

    call: "grpc.aio.StreamUnaryCall[pb.UploadAdapterRequest, pb.UploadAdapterResponse]"


async def measure(folder: Path, num_streams: int) -> Report:
    """Both turns, in an empty folder."""
    payload = make_payload(folder / "update", Layout(SPEC, RANK), 0)
    with_limits, with_room = Turn(), Turn()
    await _play(folder / "with-limits", num_streams, payload, with_limits, {})
    room = {"max_uploads": num_streams + num_streams // 10}
    await _play(folder / "with-room", num_streams, payload, with_room, room, until_places_are_back=True)
    return Report(
        title=f"{num_streams} uploads that stall",
        setting=setting_of(streams=num_streams, refusals=dict(with_limits.refused)),
        figures=(
            Figure("as it comes: streams with a place", with_limits.stalled, ""),
            Figure("as it comes: refused with too_busy", with_limits.refused["too_busy"], ""),
            Figure(
                "as it comes: refused otherwise", with_limits.refused.total() - with_limits.refused["too_busy"], "", 0
            ),
            *percentiles("as it comes: time to a refusal", with_limits.refusal_seconds or [0.0]),
            *percentiles("as it comes: status call", with_limits.latencies, bound_ms=STATUS_MS),
            Figure("with room: streams with a place", with_room.stalled, ""),
            Figure("with room: refused", with_room.refused.total(), "", 0),
            *percentiles("with room: status call before", with_room.idle_latencies),
            *percentiles("with room: status call", with_room.latencies, bound_ms=STATUS_MS),
            *_costs(with_room),
            Figure(f"with room: places taken back after {CHUNK_WAIT_SECONDS:g} s", with_room.ended["too_busy"], ""),
            Figure("with room: not taken back", with_room.stalled - with_room.ended["too_busy"], "", 0),
        ),
    )


def _costs(turn: Turn) -> tuple[Figure, ...]:
    assert turn.before is not None
    assert turn.during is not None
    streams = max(1, turn.stalled)
    return (
        Figure("with room: growth a stream", (turn.during.rss_bytes - turn.before.rss_bytes) / streams / 1024, "KiB"),
        Figure("with room: peak growth", (turn.during.peak_bytes - turn.before.rss_bytes) / MIB, "MiB"),
        Figure("with room: open files a stream", (turn.during.handles - turn.before.handles) / streams, ""),
        Figure("with room: threads", turn.during.threads, ""),
    )


async def _play(
    folder: Path,
    num_streams: int,
    payload: Payload,
    turn: Turn,
    server: dict[str, Any],
    *,
    until_places_are_back: bool = False,
) -> None:
    async with CoordinatorProcess(folder, _settings(num_streams, server)) as coordinator:
        clients = [Client(coordinator.address, f"client-{i:05}", RANK) for i in range(num_streams)]
        async with closing(clients), observing(coordinator.address) as observer:
            tasks = await _tasks(clients)
            await _look(observer, turn.idle_latencies, 2.0)
            turn.before = usage_of(coordinator.pid)
            forget_peak(coordinator.pid)
            calls = await _stall(clients, tasks, payload, turn)
            await _look(observer, turn.latencies, _WATCH_SECONDS)
            turn.during = usage_of(coordinator.pid)
            # A place can be lost between the announcement and the stream; who lost it learns so from the stream.
            late = [call for call in calls if call.call.done()]
            turn.refused.update([await _end_of(call) for call in late])
            calls = [call for call in calls if call not in late]
            turn.stalled = len(calls)
            waiting = [asyncio.create_task(_end_of(call)) for call in calls]
            if until_places_are_back:
                await asyncio.wait(waiting, timeout=CHUNK_WAIT_SECONDS + _GRACE_SECONDS)
            for task in waiting:
                if task.done():
                    turn.ended[task.result()] += 1
                task.cancel()
            for call in calls:
                call.call.cancel()


async def _tasks(clients: list[Client]) -> list[pb.Task]:
    """Every client joins and takes its task; the round opens with the last one."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def join(client: Client) -> None:
        async with turns:
            await client.join(SPEC)

    async def take(client: Client) -> pb.Task:
        async with turns:
            return await client.task()

    await clients[0].join(SPEC)  # it founds the federation
    await asyncio.gather(*(join(client) for client in clients[1:]))
    return await asyncio.gather(*(take(client) for client in clients))


async def _stall(clients: list[Client], tasks: list[pb.Task], payload: Payload, turn: Turn) -> list[Stalled]:
    turns = asyncio.Semaphore(_AT_ONCE)

    async def stall(client: Client, task: pb.Task) -> list[Stalled]:
        async with turns:
            return await _stall_one(client, task, payload, turn)

    return [stream for found in await asyncio.gather(*map(stall, clients, tasks)) for stream in found]


async def _stall_one(client: Client, task: pb.Task, payload: Payload, turn: Turn) -> list[Stalled]:
    """The stream, or nothing if it was refused."""
    started = time.monotonic()
    try:
        await client.begin(task, payload)
        call = client.stream(payload, 0)
        await call.write(pb.UploadAdapterRequest(data=next(payload.chunks(0))))
        return [Stalled(call)]
    except grpc.aio.AioRpcError as error:
        turn.refused[reason_of(error)] += 1
        turn.refusal_seconds.append(time.monotonic() - started)
        return []


async def _end_of(stalled: Stalled) -> str:
    try:
        await stalled.call
        return "ok"
    except grpc.aio.AioRpcError as error:
        return reason_of(error)


async def _look(observer: Observer, latencies: list[float], seconds: float) -> None:
    ends_at = time.monotonic() + seconds
    while (started := time.monotonic()) < ends_at:
        await observer.look()
        latencies.append(time.monotonic() - started)
        await asyncio.sleep(_LOOK_SECONDS)


def _settings(num_clients: int, server: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "server": server,
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes"]},
        "adapter": {"target_modules": ["layer"], "global_rank": RANK},
        "rounds": {
            "num_rounds": 1,
            "min_clients": num_clients,
            "round_deadline_seconds": 7200,
            "lease_ttl_seconds": 3600,
        },
        "training": {"learning_rate": 0.1},
    }


def main() -> None:
    """Parses the arguments, measures, tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.stalled", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000, help="that stall (1000)")
    add_format(parser)
    arguments = parser.parse_args()
    os.nice(5)
    keep_memory_flat()
    with tempfile.TemporaryDirectory(prefix="raflora-stalled-") as folder:
        report = asyncio.run(measure(Path(folder), arguments.streams))
    tell(report, arguments.format)


if __name__ == "__main__":
    main()
