"""Rounds without training: a hundred clients on connections of their own, each with a whole worker's day a round.

In the first half of a round each polls, downloads its slice, announces, uploads and submits an update of some hundred
bytes; the coordinator inspects, merges and publishes. In the second half nothing but the round itself is left: each
polls and submits an evaluation. Every submission is durable before it is answered. A half lasts from its first task to
the first task of the next half. One process plays all clients, beside the coordinator's.
"""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from raflora.v1 import federation_pb2 as pb

from benchmarks.load.clients import Client, Payload, closing, make_payload
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.usage import usage_of
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout

_SPEC = AdapterSpec((ModuleShape("layer.0", 4, 4),), ())
_RANK = 2


class Course:
    """When the first client had its task of each half round, and what the coordinator had used by then."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, str], tuple[float, float]] = {}  # wall and CPU seconds

    def begins(self, number: int, half: str, pid: int) -> bool:
        """Notes the first task of a half; whether it is the first."""
        is_first = (number, half) not in self._begun
        if is_first:
            self._begun[number, half] = (time.perf_counter(), usage_of(pid).cpu_seconds)
        return is_first

    def seconds(self, half: str) -> list[float]:
        """Of every such half but the first round's, which connects, starts processes and fills caches."""
        return [later[0] - earlier[0] for earlier, later in self._steps(half)]

    def cpu_seconds(self, half: str) -> list[float]:
        """Of the coordinator, likewise."""
        return [later[1] - earlier[1] for earlier, later in self._steps(half)]

    def _steps(self, half: str) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        in_order = list(self._begun.items())  # as they came
        steps = pairwise(in_order)
        return [(earlier, later) for ((number, name), earlier), (_, later) in steps if name == half and number > 1]


async def measure(folder: Path, num_clients: int, num_rounds: int, progress: Callable[[str], None]) -> Course:
    """So many measured rounds in an empty folder."""
    layout, course = Layout(_SPEC, _RANK), Course()
    last = num_rounds + 2  # an unmeasured one before, and one whose first task ends the last measured one
    (folder / "payloads").mkdir()
    payloads = [
        [make_payload(folder / "payloads" / f"{i}-{k}", layout, i * last + k) for k in range(last)]
        for i in range(num_clients)
    ]
    async with (
        CoordinatorProcess(folder / "coordinator", _settings(num_clients, last)) as coordinator,
        closing([Client(coordinator.address, f"client-{i:03}", _RANK) for i in range(num_clients)]) as clients,
    ):
        for client in clients:
            await client.join(_SPEC)

        def begins(task: pb.Task) -> None:
            half = "evaluate" if task.kind == pb.TASK_KIND_EVALUATE else "train"
            if course.begins(task.round, half, coordinator.pid):
                progress(f"empty round {task.round} of {num_clients} clients")

        await asyncio.gather(*(_work(c, p, begins) for c, p in zip(clients, payloads, strict=True)))
    return course


async def _work(client: Client, payloads: list[Payload], begins: Callable[[pb.Task], None]) -> None:
    while True:
        answer = await client.poll()
        if answer.finished:
            return
        if answer.HasField("task"):
            begins(answer.task)
            outcome = await _do(client, answer.task, payloads[answer.task.round - 1])
            assert outcome == pb.SUBMIT_OUTCOME_ACCEPTED, outcome


async def _do(client: Client, task: pb.Task, payload: Payload) -> "pb.SubmitOutcome":
    if task.kind == pb.TASK_KIND_EVALUATE:
        return await client.evaluate(task)
    await client.download(task)
    await client.upload(task, payload)
    return await client.submit(task, payload)


def _settings(num_clients: int, num_rounds: int) -> dict[str, dict[str, object]]:
    return {
        "model": {"base_model": "none", "task": "sequence-classification", "labels": ["no", "yes"]},
        "adapter": {"target_modules": ["layer"], "global_rank": _RANK},
        "rounds": {"num_rounds": num_rounds, "min_clients": num_clients, "quorum": num_clients, "evaluate_every": 1},
        "training": {"learning_rate": 0.1},
    }
