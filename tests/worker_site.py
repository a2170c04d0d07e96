"""A worker's site for tests: a real agent and trainer process that are not running yet, and their coordinator."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny_trainer
from raflora.v1 import federation_pb2 as pb
from scripted_coordinator import MANIFEST_DIGEST, Script, ScriptedCoordinator

from common.adapter import initial_adapter
from common.codec import Layout, decode, encode
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, SitePolicy, WorkerConfig
from worker.contact import Clock, pause_seconds
from worker.run import work

TRAINER = (sys.executable, tiny_trainer.__file__)
RANK = 4
SLICE = encode(initial_adapter(tiny_trainer.SPEC, RANK, seed=7))
SLICE_DIGEST = hashlib.sha256(SLICE).hexdigest()
TRAINED = encode(tiny_trainer.trained(decode(SLICE, Layout(tiny_trainer.SPEC, RANK), "slice")))
TRAINED_DIGEST = hashlib.sha256(TRAINED).hexdigest()


class InstantClock:
    """Every pause ends at once, unless the test holds it; all are written down."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []
        self.backed_off = asyncio.Event()  # a call has failed
        self.stands_still = False

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if self.stands_still:
            await asyncio.Event().wait()
        self.seconds += seconds
        if seconds == pause_seconds(failures=1, chance=0.5):
            self.backed_off.set()
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.seconds, sleep=self.sleep, chance=lambda: 0.5, wall_time=lambda: 1e9)


@dataclass
class Site:
    """A worker that is not running yet, and the coordinator it will find."""

    coordinator: ScriptedCoordinator
    folder: Path
    time: InstantClock

    @property
    def script(self) -> Script:
        return self.coordinator.script

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def has_trainer(self) -> bool:
        pid = (self.folder / "pid").read_text()
        return Path(f"/proc/{pid}").exists()

    def mishaps(self, *what: str) -> None:
        (self.folder / "mishaps").write_text("".join(f"{one}\n" for one in what))

    def config(self, policy: SitePolicy = SitePolicy()) -> WorkerConfig:
        return WorkerConfig(
            name="ada",
            rank=RANK,
            state_dir=self.state_dir,
            coordinator=CoordinatorAddress(address=f"127.0.0.1:{self.coordinator.port}", rpc_timeout_seconds=5),
            model=ModelConfig(path=str(self.folder)),
            data=DataConfig(train="none"),
            policy=policy,
        )

    async def work(self, policy: SitePolicy = SitePolicy()) -> None:
        self.state_dir.mkdir(exist_ok=True)
        await work(self.config(policy), TRAINER, self.time.clock)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.work())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def scripted_site(folder: Path) -> AsyncIterator[Site]:
    """A site whose coordinator listens already and has the slice."""
    coordinator = ScriptedCoordinator(Script(blobs={SLICE_DIGEST: SLICE}))
    await coordinator.start()
    yield Site(coordinator, folder, InstantClock())
    await coordinator.stop()


def train(lease_token: int = 1, *, learning_rate: float = 0.1, content: bytes = SLICE) -> pb.Task:
    return pb.Task(
        kind=pb.TASK_KIND_TRAIN,
        round=lease_token,
        attempt=1,
        lease_token=lease_token,
        lora_rank=RANK,
        scaling=1.0,
        adapter=pb.BlobReference(digest=hashlib.sha256(content).hexdigest(), size_bytes=len(content)),
        manifest_digest=MANIFEST_DIGEST,
        plan=pb.TrainingPlan(learning_rate=learning_rate, local_steps=2, batch_size=4),
    )


def evaluate(lease_token: int = 2) -> pb.Task:
    task = train(lease_token)
    task.kind = pb.TASK_KIND_EVALUATE
    return task
