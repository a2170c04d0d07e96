"""One case of `growth`: a coordinator process, and so many clients that play rounds against it."""

import asyncio
import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from raflora.v1 import federation_pb2 as pb

from benchmarks.load.clients import Client, Payload, closing, observing
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.growth_cases import SIDE, Case
from benchmarks.load.report import MIB
from benchmarks.load.usage import forget_peak, usage_of, watching
from benchmarks.programs import tree_cpu_seconds
from common.adapter import Array
from common.codec import Layout, name_of_lora_A, name_of_lora_B

_AT_ONCE = 64  # clients that transfer at one time: this machine is both sides
_MOVED = 0.3


@dataclass(frozen=True)
class Played:
    """What one round took, until every client held the next task."""

    seconds: float
    coordinator_cpu_seconds: float  # with its helper processes
    clients_cpu_seconds: float
    peak_mib: float  # the coordinator's largest resident set
    own_mib: float  # of it, without mapped files; sampled
    helpers_mib: float  # that of its helper processes together


@dataclass(frozen=True)
class Row:
    """One case; times are medians of the rounds, memory is the largest."""

    case: Case
    rounds: int
    seconds: float
    merge_seconds: float  # of the round, as the coordinator tells it
    coordinator_cpu_seconds: float
    clients_cpu_seconds: float
    peak_mib: float
    own_mib: float
    helpers_mib: float
    idle_mib: float  # the coordinator before the first client
    joining_seconds: float  # all of them, until each holds its first task


async def measure(folder: Path, case: Case, num_rounds: int) -> Row:
    """The whole case in an empty folder; one round more is played first and not counted."""
    async with CoordinatorProcess(folder, _settings(case)) as coordinator:
        idle_mib = usage_of(coordinator.pid).rss_bytes / MIB
        clients = [Client(coordinator.address, f"client-{i:06}", case.rank_of(i)) for i in range(case.clients)]
        async with closing(clients), observing(coordinator.address) as observer:
            started = time.monotonic()
            tasks = await _first_tasks(clients, case)
            joining_seconds = time.monotonic() - started
            played = []
            for number in range(num_rounds + 1):
                payloads = await asyncio.to_thread(_payloads, folder, case, number)
                tasks, last = await _round(coordinator.pid, clients, tasks, payloads)
                played.append(last)
            summaries = await observer.rounds(after=1)
    return Row(
        case=case,
        rounds=num_rounds,
        merge_seconds=statistics.median(summary.aggregation_seconds for summary in summaries),
        idle_mib=idle_mib,
        joining_seconds=joining_seconds,
        **_together(played[1:]),
    )


def _together(played: Sequence[Played]) -> dict[str, float]:
    medians = ("seconds", "coordinator_cpu_seconds", "clients_cpu_seconds")
    largest = ("peak_mib", "own_mib", "helpers_mib")
    return {
        **{name: statistics.median(getattr(one, name) for one in played) for name in medians},
        **{name: max(getattr(one, name) for one in played) for name in largest},
    }


async def _first_tasks(clients: list[Client], case: Case) -> "list[pb.Task]":
    turns = asyncio.Semaphore(_AT_ONCE)

    async def join(client: Client) -> None:
        async with turns:
            await client.join(case.spec)

    await clients[0].join(case.spec)  # it founds the federation
    await asyncio.gather(*(join(client) for client in clients[1:]))
    return await asyncio.gather(*(client.task() for client in clients))


async def _round(
    pid: int, clients: list[Client], tasks: "list[pb.Task]", payloads: list[Payload]
) -> "tuple[list[pb.Task], Played]":
    """The next tasks, and what it took to come to them."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def work(client: Client, task: pb.Task, payload: Payload) -> pb.Task:
        async with turns:
            await client.download(task)
            await client.upload(task, payload)
            outcome = await client.submit(task, payload)
            assert outcome == pb.SUBMIT_OUTCOME_ACCEPTED, outcome
        return await client.task()

    forget_peak(pid)
    started, coordinator, own = time.monotonic(), tree_cpu_seconds(pid), time.process_time()
    async with watching(pid) as peaks:
        following = await asyncio.gather(*map(work, clients, tasks, payloads))
    return following, Played(
        seconds=time.monotonic() - started,
        coordinator_cpu_seconds=tree_cpu_seconds(pid) - coordinator,
        clients_cpu_seconds=time.process_time() - own,
        peak_mib=usage_of(pid).peak_bytes / MIB,
        own_mib=peaks.anonymous_bytes / MIB,
        helpers_mib=peaks.children_rss_bytes / MIB,
    )


def _payloads(folder: Path, case: Case, number: int) -> list[Payload]:
    """Every client's update of a round: its slice of one adapter with a falling spectrum, moved at random by a third.

    Factors of nothing but noise are the hardest to merge, and no training makes such: their spectrum does not fall.
    """
    home = folder / "payloads"
    home.mkdir(exist_ok=True)
    common = _common(case)
    return [
        _payload(home / f"{i:06}", Layout(case.spec, case.rank_of(i)), common, (number, i)) for i in range(case.clients)
    ]


def _common(case: Case) -> dict[str, Array]:
    """The adapter that all have learnt: singular values about 1/i."""
    rng, rank = np.random.default_rng(case.modules), case.global_rank
    tensors: dict[str, Array] = {}
    for module in case.spec.modules:
        A = rng.standard_normal((rank, module.in_features), dtype=np.float32)
        B = rng.standard_normal((module.out_features, rank), dtype=np.float32)
        tensors[name_of_lora_A(module.name)] = A / np.float32(module.in_features**0.5)
        tensors[name_of_lora_B(module.name)] = (B / np.arange(1, rank + 1) / SIDE**0.5).astype(np.float32)
    return tensors


def _payload(path: Path, layout: Layout, common: Mapping[str, Array], seed: tuple[int, int]) -> Payload:
    rng, parts = np.random.default_rng(seed), [layout.header]
    for name, shape in layout.shapes.items():
        mine = common[name][: shape[0], : shape[1]]
        spread = np.float32(_MOVED * float(np.sqrt(np.mean(mine * mine))))
        parts.append((mine + spread * rng.standard_normal(shape, dtype=np.float32)).tobytes())
    content = b"".join(parts)
    path.write_bytes(content)
    return Payload(path, hashlib.sha256(content).hexdigest(), len(content))


def _settings(case: Case) -> dict[str, dict[str, object]]:
    return {
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes"]},
        "adapter": {"target_modules": ["layer"], "global_rank": case.global_rank},
        "rounds": {
            "num_rounds": 1000,
            "min_clients": case.clients,
            "round_deadline_seconds": 7200,
            "lease_ttl_seconds": 3600,
            "evaluate_every": 0,
        },
        "store": {"keep_rounds": 1},
        "limits": {"changes": 1_000_000},  # nobody trains here, so rounds follow each other faster than in life
        "training": {"learning_rate": 0.1},
    }
