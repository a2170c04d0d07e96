"""Many large uploads at once: how far the coordinator's memory grows. `python -m benchmarks.load.uploads`

The coordinator is founded, every client fetches its task, and then the coordinator is started anew, so that what is
counted begins with a fresh process. All clients send at once (each on a connection of its own), then all submit at
once; what is counted includes the digest and the inspection of every update, and not the aggregation: one more
client owes its update until the end, so the round stays open. Files need about (clients + 3) x megabytes of disk.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raflora.v1 import federation_pb2 as pb

from benchmarks.load.clients import Client, Observer, Payload, closing, make_payload, observing
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.report import MIB, Figure, Report, add_format, percentiles, setting_of, tell
from benchmarks.load.usage import forget_peak, usage_of, watching
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout
from common.memory import keep_memory_flat

GROWTH_MIB = 64.0  # that issue 4 allows
RANK = 64
SIDE = 4096  # of every layer
_LOOK_SECONDS = 0.05  # between two status calls


@dataclass
class Course:
    """What was seen of the coordinator in one phase."""

    peak_mib: float = 0.0  # largest resident set
    growth_mib: float = 0.0  # of it over the one before the phase
    children_mib: float = 0.0
    threads: int = 0
    handles: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0


def spec_of(megabytes: int) -> AdapterSpec:
    """As many layers as make an update of about so many million bytes."""
    layers = max(1, round(megabytes * 1e6 / (2 * SIDE * RANK * 4)))
    return AdapterSpec(tuple(ModuleShape(f"layer.{i:04}", SIDE, SIDE) for i in range(layers)), ())


def settings_of(num_clients: int, **server: Any) -> dict[str, dict[str, Any]]:
    """A federation whose first round waits for all of its clients, and long."""
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


async def measure(folder: Path, num_clients: int, megabytes: int) -> Report:
    """The whole test in an empty folder."""
    spec = spec_of(megabytes)
    payloads = [make_payload(folder / f"update-{i}", Layout(spec, RANK), i) for i in range(num_clients)]
    async with CoordinatorProcess(folder, settings_of(num_clients + 1)) as coordinator:
        tasks, founding = await _found(coordinator, spec, num_clients + 1)
        await coordinator.stop()
        await coordinator.start()
        members = [Client(coordinator.address, _name(i), RANK) for i in range(num_clients)]
        latencies: list[float] = []
        async with closing(members) as clients, observing(coordinator.address) as observer:
            await observer.look()
            begun = usage_of(coordinator.pid)
            looking = asyncio.create_task(_look(observer, latencies))
            sending, submitting = Course(), Course()
            async with _phase(coordinator.pid, sending):
                await asyncio.gather(*map(Client.upload, clients, tasks, payloads))
            async with _phase(coordinator.pid, submitting):
                outcomes = await asyncio.gather(*map(Client.submit, clients, tasks, payloads))
            looking.cancel()
            assert set(outcomes) == {pb.SUBMIT_OUTCOME_ACCEPTED}, outcomes
            ended = usage_of(coordinator.pid)
    growth_mib = max(sending.peak_mib, submitting.peak_mib) - begun.rss_bytes / MIB
    return Report(
        title=f"{num_clients} uploads of {payloads[0].size_bytes / 1e6:,.0f} MB at once",
        setting=setting_of(coordinator_before=f"{begun.rss_bytes / MIB:.0f} MiB", updates=num_clients),
        figures=(
            Figure("growth while all bytes arrive", sending.growth_mib, "MiB", GROWTH_MIB),
            Figure("growth while all are inspected and recorded", submitting.growth_mib, "MiB", GROWTH_MIB),
            Figure("growth from the first byte to the last answer", growth_mib, "MiB", GROWTH_MIB),
            Figure("kept afterwards", (ended.rss_bytes - begun.rss_bytes) / MIB, "MiB"),
            Figure(
                "helper processes at the same time, all together",
                max(sending.children_mib, submitting.children_mib),
                "MiB",
            ),
            Figure("threads", max(sending.threads, submitting.threads), ""),
            Figure("open files", max(sending.handles, submitting.handles), ""),
            Figure("arrival", sending.seconds, "s"),
            Figure("arrival, coordinator's CPU", sending.cpu_seconds / _gigabytes(payloads), "s/GB"),
            Figure("inspection", submitting.seconds, "s"),
            Figure("inspection, coordinator's CPU", submitting.cpu_seconds / _gigabytes(payloads), "s/GB"),
            *percentiles("status call meanwhile", latencies),
            Figure("founding before (its adapter is one update's size)", founding / MIB, "MiB"),
        ),
    )


@asynccontextmanager
async def _phase(pid: int, course: Course) -> AsyncIterator[None]:
    before, started = usage_of(pid), time.monotonic()
    forget_peak(pid)
    async with watching(pid) as peaks:
        yield
    after = usage_of(pid)
    course.seconds = time.monotonic() - started
    course.peak_mib = after.peak_bytes / MIB
    course.growth_mib = (after.peak_bytes - before.rss_bytes) / MIB
    course.children_mib = peaks.children_rss_bytes / MIB
    course.threads, course.handles = peaks.threads, peaks.handles
    course.cpu_seconds = after.cpu_seconds - before.cpu_seconds


async def _found(coordinator: CoordinatorProcess, spec: AdapterSpec, num_clients: int) -> tuple[list[pb.Task], int]:
    """Every client's task, and how far making adapter and slice made the coordinator grow."""
    begun = usage_of(coordinator.pid)
    async with closing([Client(coordinator.address, _name(i), RANK) for i in range(num_clients)]) as clients:
        for client in clients:
            await client.join(spec)
        tasks = [await client.task() for client in clients]
    return tasks, usage_of(coordinator.pid).peak_bytes - begun.rss_bytes


async def _look(observer: Observer, latencies: list[float]) -> None:
    while True:
        started = time.monotonic()
        await observer.look()
        latencies.append(time.monotonic() - started)
        await asyncio.sleep(_LOOK_SECONDS)


def _gigabytes(payloads: list[Payload]) -> float:
    return sum(payload.size_bytes for payload in payloads) / 1e9


def _name(number: int) -> str:
    return f"client-{number:04}"


def main() -> None:
    """Parses the arguments, measures, tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.uploads", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8, help="uploads at once (8)")
    parser.add_argument("--megabytes", type=int, default=500, help="of each (500)")
    parser.add_argument("--folder", type=Path, help="where the files go for the time being (the system's)")
    add_format(parser)
    arguments = parser.parse_args()
    os.nice(5)
    keep_memory_flat()  # of this process, which plays all clients
    with tempfile.TemporaryDirectory(prefix="raflora-uploads-", dir=arguments.folder) as folder:
        report = asyncio.run(measure(Path(folder), arguments.clients, arguments.megabytes))
    tell(report, arguments.format)


if __name__ == "__main__":
    main()
