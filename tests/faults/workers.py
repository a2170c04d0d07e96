"""Real workers of a real coordinator: the agent in this process or in one of its own, the trainer without torch.

As a program it is a worker: `python tests/faults/workers.py ADDRESS FOLDER NAME`.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tiny_trainer
from coordinators import config_of

from coordinator.config import CoordinatorConfig
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.contact import Clock
from worker.run import run_worker, work

TRAINER = (sys.executable, tiny_trainer.__file__)
RANK = 4


def tiny_federation(folder: Path, **changes: Any) -> CoordinatorConfig:
    """One round of one client, of what the trainer without torch trains."""
    changes = {"rounds__min_clients": 1, "rounds__num_rounds": 1, **changes}
    return config_of(folder, adapter__global_rank=RANK, adapter__modules_to_save=["head"], **changes)


def worker_config(address: str, folder: Path, name: str) -> WorkerConfig:
    """A worker with its state and its trainer's mishaps in this folder."""
    folder.mkdir(exist_ok=True)
    return WorkerConfig(
        name=name,
        rank=RANK,
        state_dir=folder / "state",
        coordinator=CoordinatorAddress(address=address, rpc_timeout_seconds=10),
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train="none"),
    )


@asynccontextmanager
async def working(address: str, folder: Path, name: str, clock: Clock = Clock()) -> AsyncIterator[asyncio.Task[None]]:
    """An agent in this process; its task."""
    config = worker_config(address, folder, name)
    config.state_dir.mkdir(exist_ok=True)
    task = asyncio.create_task(work(config, TRAINER, clock))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def start_worker(address: str, folder: Path, name: str) -> "subprocess.Popen[str]":
    """An agent in a process of its own; its lines come out of stdout."""
    command = [sys.executable, __file__, address, str(folder), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def mishap(folder: Path, *what: str) -> None:
    """What the trainer of this folder should do wrong next."""
    folder.mkdir(exist_ok=True)
    (folder / "mishaps").write_text("".join(f"{one}\n" for one in what))


if __name__ == "__main__":
    import worker.run

    worker.run.work.__defaults__ = (TRAINER, *(worker.run.work.__defaults__ or ())[1:])
    asyncio.run(run_worker(worker_config(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
