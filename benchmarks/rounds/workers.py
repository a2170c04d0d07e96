"""Workers without a model in a process of their own, round after round, one round an order.

`python -m benchmarks.rounds.workers ADDRESS FOLDER WORKERS MODULES` answers every line of its input with one of JSON:
`prepare SEED` writes the updates that training would have left on disk, `round` plays one round. They speak through
the worker's own client, downloads and uploads: slice fetched, checked and on disk, update hashed, sent and submitted,
and then a poll until the next round's task is there, which it is once the round before is merged and published.
"""

import asyncio
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from benchmarks.load.clients import BASE_MODEL
from benchmarks.rounds.shapes import RANK, spec_of
from common.adapter import AdapterSpec
from common.codec import Layout
from common.memory import keep_memory_flat
from common.version import PROTOCOL
from worker import uploads
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.contact import Clock, Contact
from worker.downloads import Slices
from worker.messages import Blob, Enrolment, Outcome, RankProfile, Task, Update

_NUM_EXAMPLES = 100
_MAGNITUDE = 1e-2
_RPC_SECONDS = 120.0  # founding a federation of 50 MB on a busy machine


@dataclass
class Member:
    """One worker that holds a task."""

    client: CoordinatorClient
    contact: Contact
    slices: Slices
    update: Path
    task: Task

    def prepare(self, spec: AdapterSpec, seed: int) -> None:
        """Writes the update of the task at hand: other numbers for another seed, so nothing is known from before."""
        layout = Layout(spec, self.task.lora_rank)
        count = (layout.size_bytes - len(layout.header)) // np.dtype(np.float32).itemsize
        numbers = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * np.float32(_MAGNITUDE)
        self.update.write_bytes(layout.header + numbers.tobytes())

    async def play(self) -> None:
        """From the task at hand to the next one."""
        await self.slices.fetch(self.task.adapter)
        blob = await asyncio.to_thread(_blob_of, self.update)
        await uploads.send(uploads.Upload(self.update, blob, self.task.lease_token), self.client, self.contact)
        outcome = await self.client.submit_update(Update(self.task, blob, _NUM_EXAMPLES, {}, 0.0))
        assert outcome is Outcome.ACCEPTED, outcome
        self.task = await next_task(self.client)


async def next_task(client: CoordinatorClient) -> Task:
    """The first task that comes."""
    while True:
        polled = await client.poll_task()
        if polled.tasks:
            return polled.tasks[0]
        assert not polled.is_finished, "the federation has ended"


async def serve(address: str, folder: Path, num_workers: int, spec: AdapterSpec) -> None:
    """Until the input ends."""
    clients = [await _join(address, f"worker-{i:04}", spec) for i in range(num_workers)]
    tasks = await asyncio.gather(*map(next_task, clients))
    members = [_member(folder / f"worker-{i:04}", *held) for i, held in enumerate(zip(clients, tasks, strict=True))]
    _answer(ready=True)
    while order := (await asyncio.to_thread(sys.stdin.readline)).split():
        if order[0] == "prepare":
            for i, member in enumerate(members):
                member.prepare(spec, int(order[1]) * num_workers + i)
            _answer(ready=True)
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(member.play() for member in members))
            _answer(wall_seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
    for client in clients:
        await client.close()


async def _join(address: str, client_id: str, spec: AdapterSpec) -> CoordinatorClient:
    client = CoordinatorClient(
        CoordinatorAddress(address=address, rpc_timeout_seconds=_RPC_SECONDS),
        Credentials(client_id, f"key-of-{client_id}", "0"),
    )
    await client.join(Enrolment(PROTOCOL, RankProfile(RANK, "cpu", 0, _NUM_EXAMPLES), BASE_MODEL, spec))
    return client


def _member(home: Path, client: CoordinatorClient, task: Task) -> Member:
    home.mkdir()
    contact = Contact(home, Clock())
    return Member(client, contact, Slices(home / "slices", client, contact), home / "update.safetensors", task)


def _blob_of(path: Path) -> Blob:
    with path.open("rb") as file:
        return Blob(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _answer(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    # What a worker says to people must not stand among the answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    keep_memory_flat()
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), spec_of(int(sys.argv[4]))))
