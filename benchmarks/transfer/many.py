"""Many large uploads at once into a coordinator that watches its own event loop: how far it grows, how late it is.

Every client has a connection of its own. The coordinator is founded, hands out the tasks, and is then started anew, so
that what is counted begins with a fresh process. Aggregation is no part of it: one client more owes its update.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.clients import Client, closing, make_payload
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.report import MIB
from benchmarks.load.uploads import settings_of
from benchmarks.load.usage import forget_peak, usage_of
from benchmarks.transfer.site import RANK, spec_of
from benchmarks.transfer.watched import lateness
from common.codec import Layout

_IDLE_SECONDS = 5.0


@dataclass(frozen=True)
class Many:
    """What was seen of the coordinator while the bytes arrived."""

    growth_mib: float
    late_seconds: list[float]  # of its event loop: the worst of every tenth of a second
    idle_late_seconds: list[float]  # the same just before, with nothing to do: what the machine adds
    seconds: float


async def measure(folder: Path, num_clients: int, megabytes: int, progress: Callable[[str], None]) -> Many:
    """The whole test in an empty folder; it needs about (clients + 3) x megabytes of disk."""
    spec = spec_of(megabytes)
    progress(f"{num_clients} uploads of {megabytes} MB: founding")
    payloads = [make_payload(folder / f"update-{i}", Layout(spec, RANK), i) for i in range(num_clients)]
    names = [f"client-{i:04}" for i in range(num_clients + 1)]
    watch = folder / "late"
    program = ("-m", "benchmarks.transfer.watched", str(watch))
    async with CoordinatorProcess(folder / "coordinator", settings_of(num_clients + 1), program) as coordinator:
        async with closing([Client(coordinator.address, name, RANK) for name in names]) as clients:
            for client in clients:
                await client.join(spec)
            tasks = [await client.task() for client in clients[:-1]]
        await coordinator.stop()
        await coordinator.start()
        async with closing([Client(coordinator.address, name, RANK) for name in names[:-1]]) as clients:
            await asyncio.gather(*(client.heartbeat(task) for client, task in zip(clients, tasks, strict=True)))
            idle_since = time.monotonic()
            await asyncio.sleep(_IDLE_SECONDS)
            progress(f"{num_clients} uploads of {megabytes} MB: arriving")
            before = usage_of(coordinator.pid)
            forget_peak(coordinator.pid)
            since = time.monotonic()
            await asyncio.gather(*map(Client.upload, clients, tasks, payloads))
            until, after = time.monotonic(), usage_of(coordinator.pid)
    return Many(
        growth_mib=(after.peak_bytes - before.rss_bytes) / MIB,
        late_seconds=lateness(watch, since, until),
        idle_late_seconds=lateness(watch, idle_since, since),
        seconds=until - since,
    )
