"""Workers that have joined and wait: what each costs the coordinator. `python -m benchmarks.load.idle`

Every worker has a TCP connection of its own and a long poll open, renewed as workers do. After a quiet while one more
client joins and the first round opens for everybody: all fetch their task, send a tiny update and submit it.
"""

import argparse
import asyncio
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from raflora.v1 import federation_pb2 as pb
from raflora.v1 import status_pb2

from benchmarks.load.clients import Client, Observer, Payload, closing, make_payload, observing
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.report import MIB, Figure, Report, add_format, percentiles, setting_of, tell
from benchmarks.load.usage import Usage, usage_of
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout
from common.memory import keep_memory_flat

KIB_A_WORKER = 100.0  # as transport.md's goal M5 has it, there with TLS
IDLE_CPU_PERCENT = 1.0  # of one core, for every 1,000 workers
STATUS_MS = 100.0
SPEC = AdapterSpec((ModuleShape("layer.0", 16, 16),), ())
RANK = 4
_AT_ONCE = 64  # calls that one thousand workers make at one time here: the machine is both sides
_LOOK_SECONDS = 0.05
_LOOKING_SECONDS = 10.0
_PUBLISH_SECONDS = 600.0


@dataclass
class Course:
    """What was seen, phase by phase."""

    empty: Usage | None = None
    joined: Usage | None = None
    rested: Usage | None = None
    published: Usage | None = None
    join_seconds: float = 0.0
    rest_seconds: float = 0.0
    opening_seconds: float = 0.0  # from the last join until everybody holds a task
    submitting_seconds: float = 0.0
    publishing_seconds: float = 0.0
    idle_latencies: list[float] = field(default_factory=list)
    busy_latencies: list[float] = field(default_factory=list)


async def measure(folder: Path, num_workers: int, rest_seconds: float) -> Report:
    """The whole test in an empty folder."""
    course = Course(rest_seconds=rest_seconds)
    payload = make_payload(folder / "update", Layout(SPEC, RANK), 0)
    async with CoordinatorProcess(folder, _settings(num_workers + 1)) as coordinator:
        address = coordinator.address
        workers = [Client(address, f"worker-{i:05}", RANK) for i in range(num_workers)]
        last = Client(address, "worker-last", RANK)
        async with closing([*workers, last]), observing(address) as observer:
            await last.join(SPEC)  # it founds the federation, and leaves: the round waits for it
            await last.leave()
            course.empty = usage_of(coordinator.pid)
            course.join_seconds = await _join(workers)
            waiting = [asyncio.create_task(worker.task()) for worker in workers]
            await asyncio.sleep(2.0)  # until every poll has arrived
            course.joined = usage_of(coordinator.pid)
            await asyncio.sleep(rest_seconds)
            course.rested = usage_of(coordinator.pid)
            await _look(observer, course.idle_latencies, _LOOKING_SECONDS)
            looking = asyncio.create_task(_look(observer, course.busy_latencies, _PUBLISH_SECONDS))
            await _round(course, [*workers, last], waiting, payload)
            await _published(observer, course)
            looking.cancel()
            course.published = usage_of(coordinator.pid)
    return Report(
        title=f"{num_workers} workers that wait, then a round for all",
        setting=setting_of(workers=num_workers, rest=f"{rest_seconds:g} s"),
        figures=_figures(course, num_workers),
    )


def _figures(course: Course, num_workers: int) -> tuple[Figure, ...]:
    empty, joined, rested, published = course.empty, course.joined, course.rested, course.published
    assert empty
    assert joined
    assert rested
    assert published
    idle = (rested.cpu_seconds - joined.cpu_seconds) / course.rest_seconds * 100
    return (
        Figure(
            "memory a waiting worker", (rested.rss_bytes - empty.rss_bytes) / num_workers / 1024, "KiB", KIB_A_WORKER
        ),
        Figure("coordinator with nobody", empty.rss_bytes / MIB, "MiB"),
        Figure("coordinator with all", rested.rss_bytes / MIB, "MiB"),
        Figure("open files a worker", (rested.handles - empty.handles) / num_workers, "", 1.1),
        Figure("threads", rested.threads, ""),
        Figure("connecting and joining", course.join_seconds, "s"),
        Figure("joins", num_workers / course.join_seconds, "/s"),
        Figure("CPU of the wait", idle, "%", max(1.0, num_workers / 1000) * IDLE_CPU_PERCENT),
        *percentiles("status call while all wait", course.idle_latencies, bound_ms=STATUS_MS),
        Figure("round opens: until all hold their task", course.opening_seconds, "s"),
        Figure("round: until all have submitted", course.submitting_seconds, "s"),
        Figure("round: until it is published", course.publishing_seconds, "s"),
        Figure(
            "round: coordinator's CPU a worker", (published.cpu_seconds - rested.cpu_seconds) / num_workers * 1000, "ms"
        ),
        *percentiles("status call in the round", course.busy_latencies),
        Figure("coordinator after the round", published.rss_bytes / MIB, "MiB"),
    )


async def _join(workers: list[Client]) -> float:
    turns, started = asyncio.Semaphore(_AT_ONCE), time.monotonic()

    async def join(worker: Client) -> None:
        async with turns:
            await worker.join(SPEC)

    await asyncio.gather(*map(join, workers))
    return time.monotonic() - started


async def _round(
    course: Course, workers: list[Client], waiting: "list[asyncio.Task[pb.Task]]", payload: Payload
) -> None:
    started = time.monotonic()
    last = workers[-1]
    await last.join(SPEC)
    tasks = [*(await asyncio.gather(*waiting)), await last.task()]
    course.opening_seconds = time.monotonic() - started
    turns, started = asyncio.Semaphore(_AT_ONCE // 2), time.monotonic()

    async def work(worker: Client, task: pb.Task) -> None:
        async with turns:
            await worker.upload(task, payload)
            outcome = await worker.submit(task, payload)
            assert outcome == pb.SUBMIT_OUTCOME_ACCEPTED, outcome

    await asyncio.gather(*map(work, workers, tasks))
    course.submitting_seconds = time.monotonic() - started


async def _published(observer: Observer, course: Course) -> None:
    started = time.monotonic()
    async with asyncio.timeout(_PUBLISH_SECONDS):
        async for answer in observer.watch(_PUBLISH_SECONDS):
            if answer.status.phase == status_pb2.PHASE_FINISHED:
                break
    course.publishing_seconds = time.monotonic() - started


async def _look(observer: Observer, latencies: list[float], seconds: float) -> None:
    ends_at = time.monotonic() + seconds
    with suppress(asyncio.CancelledError):
        while (started := time.monotonic()) < ends_at:
            await observer.look()
            latencies.append(time.monotonic() - started)
            await asyncio.sleep(_LOOK_SECONDS)


def _settings(num_clients: int) -> dict[str, dict[str, object]]:
    return {
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes"]},
        "adapter": {"target_modules": ["layer"], "global_rank": RANK},
        "rounds": {
            "num_rounds": 1,
            "min_clients": num_clients,
            "round_deadline_seconds": 7200,
            "lease_ttl_seconds": 180,
            "evaluate_every": 0,
        },
        "training": {"learning_rate": 0.1},
    }


def main() -> None:
    """Parses the arguments, measures, tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.idle", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2000, help="that wait (2000)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of rest before the round opens (30)")
    add_format(parser)
    arguments = parser.parse_args()
    os.nice(5)
    keep_memory_flat()
    with tempfile.TemporaryDirectory(prefix="raflora-idle-") as folder:
        report = asyncio.run(measure(Path(folder), arguments.workers, arguments.seconds))
    tell(report, arguments.format)


if __name__ == "__main__":
    main()
