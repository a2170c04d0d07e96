"""What a federation will ask of a worker, for whoever measures before joining: the coordinator says it, or its file."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from common.errors import Unavailable
from common.settings import load_settings
from common.version import PROTOCOL, software_version
from coordinator.config import CoordinatorConfig
from worker.client import CoordinatorClient, Credentials
from worker.config import WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import admit
from worker.identity import enrol_key_of
from worker.messages import ModelRequest, Welcome

DEFAULT_MEMORY_SHARE = 0.9  # as the operator's settings have it


@dataclass(frozen=True)
class Asked:
    """What the operator decides."""

    welcome: Welcome
    levels: tuple[int, ...] = ()  # if the operator's policy has some and they are known here
    memory_share: float = DEFAULT_MEMORY_SHARE


def asked_in(path: Path) -> Asked:
    """What stands in the operator's federation.toml. Raises ConfigError."""
    # What overrides this worker's settings in the environment is not meant for them.
    config = load_settings(CoordinatorConfig, path, environ={})
    model = ModelRequest(
        base_model=config.model.base_model,
        base_model_digest=config.model.base_model_digest,
        task=config.model.task,
        labels=config.model.labels,
        target_modules=config.adapter.target_modules,
        modules_to_save=config.adapter.modules_to_save,
        global_rank=config.adapter.global_rank,
        seed=config.rounds.seed,
    )
    training = config.training
    welcome = Welcome(PROTOCOL, config.name, model, training.batch_size, training.lora_dropout)
    return Asked(welcome, tuple(sorted(set(config.ranks.levels))), config.ranks.memory_share)


async def asked_by_coordinator(config: WorkerConfig, timeout_seconds: float) -> Asked:
    """What the coordinator says to a handshake; with a join token this worker comes in first, as it would at work.

    Raises Unavailable, and whatever the coordinator refuses.
    """
    clock = Clock()
    try:
        async with asyncio.timeout(timeout_seconds):
            admission = await admit(config, Contact(config.state_dir, clock), clock)
            who = Credentials(admission.client_id, enrol_key_of(config.state_dir), software_version())
            client = CoordinatorClient(admission.where, who)
            try:
                return Asked(await client.handshake())
            finally:
                await client.close()
    except TimeoutError:
        why = f"coordinator {config.coordinator.address} cannot be reached: no answer within {timeout_seconds:g} s"
    except Unavailable as error:
        why = str(error)
    raise Unavailable(f"{why}. The operator's settings do as well: --federation federation.toml")
