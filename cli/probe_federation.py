"""What a federation will ask of a worker, for whoever measures before joining: the coordinator says it, or its file."""

import asyncio
from pathlib import Path

from common.errors import Unavailable
from common.settings import load_settings
from common.version import software_version
from coordinator.config import CoordinatorConfig
from coordinator.servicers.greeting import greeting
from worker.client import CoordinatorClient, Credentials
from worker.config import WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import admit
from worker.identity import enrol_key_of
from worker.messages import Welcome
from worker.wire_messages import welcome_of


def asked_in(path: Path) -> Welcome:
    """What stands in the operator's federation.toml. Raises ConfigError."""
    # What overrides this worker's settings in the environment is not meant for them.
    config = load_settings(CoordinatorConfig, path, environ={})
    return welcome_of(greeting(config, config.model.base_model_digest))


async def asked_by_coordinator(config: WorkerConfig, timeout_seconds: float) -> Welcome:
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
                return await client.handshake()
            finally:
                await client.close()
    except TimeoutError:
        why = f"coordinator {config.coordinator.address} cannot be reached: no answer within {timeout_seconds:g} s"
    except Unavailable as error:
        why = str(error)
    raise Unavailable(f"{why}. The operator's settings do as well: --federation federation.toml")
