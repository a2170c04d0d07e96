"""A site that is about to join a federation with certificates: settings, clocks that only sleeping moves, tokens."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinators import settings_of
from identities import Identities

from coordinator.config import CoordinatorConfig
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import Admission, admit

DAY = 86_400.0


class Killed(BaseException):
    """Stands for kill -9 at a failpoint."""


@dataclass
class SteppedClock:
    """Time passes only by sleeping; the test holds a sleep to look around."""

    at: float = field(default_factory=time.time)
    pauses: list[float] = field(default_factory=list)
    before_sleep: Callable[[], Any] = lambda: None

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.before_sleep()
        self.at += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.at, sleep=self.sleep, chance=lambda: 0.5, wall_time=lambda: self.at)


def federation(folder: Path, identities: Identities, **changes: Any) -> CoordinatorConfig:
    changes = {"rounds__num_rounds": 1, "rounds__min_clients": 1, "adapter__global_rank": 4, **changes}
    settings = settings_of(folder / "federation", server__identity=identities.settings(), **changes)
    settings["adapter"].update(target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    return CoordinatorConfig.model_validate(settings)


def worker(folder: Path, name: str = "gpu1", **where: Any) -> WorkerConfig:
    return WorkerConfig(
        name=name,
        rank=4,
        state_dir=folder / "state",
        coordinator=CoordinatorAddress(rpc_timeout_seconds=5, **where),
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train="none"),
    )


async def come_in(config: WorkerConfig, clock: Clock = Clock(), *, anew: bool = False) -> Admission:
    config.state_dir.mkdir(exist_ok=True)
    return await admit(config, Contact(config.state_dir, clock), clock, anew=anew)


def client_of(admission: Admission) -> CoordinatorClient:
    return CoordinatorClient(admission.where, Credentials(admission.client_id, "key", "0"))


def token_at(identities: Identities, address: str, site: str = "clinic-a", **how: Any) -> str:
    workers, again = how.get("workers", 1), how.get("again", False)
    return identities.issuer.invite(site, workers=workers, days=how.get("days", 7.0), again=again, address=address)[
        1
    ].text
