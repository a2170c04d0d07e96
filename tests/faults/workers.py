"""Real workers of a real coordinator: the agent in this process or in one of its own, the trainer without torch.

As a program it is a worker: `python -m faults.workers ADDRESS FOLDER NAME`, in the folder of the tests.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import tiny_trainer
from coordinators import config_of

from coordinator.config import CoordinatorConfig
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.contact import Clock
from worker.identity import holding
from worker.run import work

TRAINER = (sys.executable, tiny_trainer.__file__)
TESTS = Path(__file__).resolve().parents[1]
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


@contextmanager
def worker_process(address: str, folder: Path, name: str) -> "Iterator[subprocess.Popen[str]]":
    """An agent in a process of its own, killed at the end if it still runs; its lines come out of stdout."""
    command = [sys.executable, "-m", "faults.workers", address, str(folder), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TESTS) as process:
        try:
            yield process
        finally:
            process.kill()


def mishap(folder: Path, *what: str) -> None:
    """What the trainer of this folder should do wrong next."""
    folder.mkdir(exist_ok=True)
    (folder / "mishaps").write_text("".join(f"{one}\n" for one in what))


async def main(address: str, folder: str, name: str) -> None:
    """What `raflora worker` does, with the trainer without torch."""
    config = worker_config(address, Path(folder), name)
    with holding(config.state_dir):
        await work(config, TRAINER)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
