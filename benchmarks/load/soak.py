"""A federation that never ends, with seeded trouble every few seconds: does anything grow? `make soak`

Workers are killed and stalled, uploads broken off and spoiled, clients join and leave, observers come and go, and the
coordinator is killed or ended now and then and started again on the same state folder. Every few seconds its memory,
handles, threads, files and journal are counted; at the end straight lines are laid through them, and every update that
was acknowledged is looked up in the journal. `--figure FILE` draws the samples (needs matplotlib).
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from benchmarks.load.clients import Client, observing
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.report import Report, add_format, setting_of, tell
from benchmarks.load.soak_verdicts import Sample, check_promises, draw, figures_of, sample_disk
from benchmarks.load.soak_workers import RANKS, SPEC, Ledger, Worker
from benchmarks.load.usage import usage_of
from common.memory import keep_memory_flat

LEASE_SECONDS = 4.0
_SAMPLE_SECONDS = 2.0
_TROUBLE_SECONDS = 2.0  # on average
_LIFE_SECONDS = 120.0  # of a coordinator, on average
_FLAPPING_NAMES = 20  # of clients that come and go; the journal keeps every name for ever


@dataclass
class Soak:
    """The running federation and what was seen of it."""

    coordinator: CoordinatorProcess
    workers: list[Worker]
    ledger: Ledger
    chance: random.Random
    began: float = field(default_factory=time.monotonic)
    life_began: float = field(default_factory=time.monotonic)
    lives: int = 1
    rounds: int = 0
    samples: list[Sample] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    is_restarting: bool = False


async def run(folder: Path, arguments: argparse.Namespace) -> Report:
    """The whole soak in an empty folder."""
    ledger, started = Ledger(), time.monotonic()
    async with CoordinatorProcess(folder, _settings(arguments.workers)) as coordinator:
        workers = [Worker(coordinator.address, i, folder, ledger) for i in range(arguments.workers)]
        soak = Soak(coordinator, workers, ledger, random.Random(arguments.seed))  # noqa: S311 - repeatable, not secret
        soak.start_seconds.append(time.monotonic() - started)
        for worker in workers:
            worker.start()
        try:
            async with asyncio.timeout(arguments.minutes * 60), asyncio.TaskGroup() as group:
                group.create_task(_sample(soak))
                group.create_task(_restart_now_and_then(soak))
                group.create_task(_make_trouble(soak, group))
        except TimeoutError:
            pass  # the time is up, as was asked for
        finally:
            await asyncio.gather(*(worker.kill() for worker in workers))
        if soak.is_restarting:
            await coordinator.start()
        await coordinator.stop()
        await _time_a_start(soak)
        await coordinator.stop()
    promises = check_promises(coordinator.state / "journal.sqlite", "federation", ledger.acknowledged)
    if arguments.figure is not None:
        with suppress(ImportError):
            draw(soak.samples, arguments.figure)
    return Report(
        title=f"soak of {arguments.minutes:g} min, seed {arguments.seed}, {arguments.workers} workers",
        setting=setting_of(
            troubles=dict(sorted(ledger.troubles.items())),
            refusals=dict(sorted(ledger.refusals.items())),
            evaluations=ledger.evaluations,
        ),
        figures=figures_of(soak.samples, promises, soak.start_seconds),
    )


# ---------------------------------------------------------------- looking


async def _sample(soak: Soak) -> None:
    while True:
        async with observing(soak.coordinator.address) as observer:
            with suppress(grpc.aio.AioRpcError, OSError):  # it may be just then that it is restarted
                while True:
                    status = await observer.look()
                    soak.rounds = max(soak.rounds, status.last_round.round)
                    if not soak.is_restarting:
                        soak.samples.append(await _sample_of(soak))
                        _say(soak)
                    await asyncio.sleep(_SAMPLE_SECONDS)
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _sample_of(soak: Soak) -> Sample:
    now = time.monotonic()
    usage = usage_of(soak.coordinator.pid)
    disk_bytes, journal_bytes, blobs = await asyncio.to_thread(sample_disk, soak.coordinator.state)
    life_seconds = now - soak.life_began
    return Sample(now - soak.began, soak.lives, life_seconds, soak.rounds, usage, disk_bytes, journal_bytes, blobs)


def _say(soak: Soak) -> None:
    if len(soak.samples) % 15 == 0:
        last = soak.samples[-1]
        print(
            f"{last.at_seconds / 60:5.1f} min  round {last.rounds}  {last.usage.rss_bytes >> 20} MiB  "
            f"{last.usage.handles} files  {last.usage.threads} threads  journal {last.journal_bytes >> 10} KiB  "
            f"{soak.ledger.troubles.total()} troubles",
            file=sys.stderr,
            flush=True,
        )


# ---------------------------------------------------------------- trouble


async def _restart_now_and_then(soak: Soak) -> None:
    while True:
        await asyncio.sleep(soak.chance.uniform(0.5, 1.5) * _LIFE_SECONDS)
        soak.is_restarting = True
        if soak.chance.random() < 0.5:
            soak.ledger.troubles["coordinator killed"] += 1
            await soak.coordinator.kill()
        else:
            soak.ledger.troubles["coordinator ended"] += 1
            await soak.coordinator.stop()
        await _time_a_start(soak)


async def _time_a_start(soak: Soak) -> None:
    soak.is_restarting = True
    started = time.monotonic()
    await soak.coordinator.start()
    soak.start_seconds.append(time.monotonic() - started)
    soak.lives, soak.life_began, soak.is_restarting = soak.lives + 1, time.monotonic(), False


async def _make_trouble(soak: Soak, group: asyncio.TaskGroup) -> None:
    kinds: dict[str, Callable[[Soak], Awaitable[None]]] = {
        "worker killed": _kill_worker,
        "worker stalled": _stall_worker,
        "upload broken off": _break_off,
        "update spoiled": _spoil,
        "client came and went": _flap,
        "observer came and went": _watch,
    }
    while True:
        await asyncio.sleep(soak.chance.uniform(0.0, 2.0) * _TROUBLE_SECONDS)
        kind = soak.chance.choice(sorted(kinds))
        soak.ledger.troubles[kind] += 1
        group.create_task(_troubled(kinds[kind], soak))


async def _troubled(trouble: Callable[[Soak], Awaitable[None]], soak: Soak) -> None:
    with suppress(grpc.aio.AioRpcError):  # the coordinator may have its own trouble
        await trouble(soak)


async def _kill_worker(soak: Soak) -> None:
    worker = soak.chance.choice(soak.workers)
    await worker.kill()
    await asyncio.sleep(1.0)
    worker.start()


async def _stall_worker(soak: Soak) -> None:
    worker = soak.chance.choice(soak.workers)
    worker.stall()
    await asyncio.sleep(2 * LEASE_SECONDS)
    worker.go_on()


async def _break_off(soak: Soak) -> None:
    soak.chance.choice(soak.workers).breaks_off_next = True


async def _spoil(soak: Soak) -> None:
    soak.chance.choice(soak.workers).spoils_next = True


async def _flap(soak: Soak) -> None:
    client = Client(soak.coordinator.address, f"flapping-{soak.chance.randrange(_FLAPPING_NAMES):02}", RANKS[0])
    try:
        await client.join(SPEC)
        await client.poll(0.2)
        await client.leave()
    finally:
        await client.close()


async def _watch(soak: Soak) -> None:
    async with observing(soak.coordinator.address) as observer:
        call = observer.watch(5.0)
        async for _ in call:
            break
        call.cancel()  # in the middle, as when a terminal is closed


def _settings(num_workers: int) -> dict[str, dict[str, object]]:
    return {
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes", "perhaps"]},
        "adapter": {"target_modules": ["layer"], "modules_to_save": ["classifier"], "global_rank": max(RANKS)},
        "rounds": {
            "num_rounds": 100_000,
            "min_clients": max(2, num_workers // 3),
            "quorum": 0.5,
            "round_deadline_seconds": 2.0,
            "lease_ttl_seconds": LEASE_SECONDS,
            "evaluate_every": 20,
            "max_attempts": 1_000_000,
            "max_failures": 1_000,
        },
        "training": {"learning_rate": 0.1, "decay": "constant"},
    }


def main() -> None:
    """Parses the arguments, runs the soak, tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the troubles (1)")
    parser.add_argument("--workers", type=int, default=12, help="that train without end (12)")
    parser.add_argument("--figure", type=Path, help="a picture of the samples, PNG or SVG")
    add_format(parser)
    arguments = parser.parse_args()
    os.nice(5)
    keep_memory_flat()
    with tempfile.TemporaryDirectory(prefix="raflora-soak-") as folder:
        report = asyncio.run(run(Path(folder), arguments))
    tell(report, arguments.format)


if __name__ == "__main__":
    main()
