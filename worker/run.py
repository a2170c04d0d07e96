"""Starts one worker from its settings and ends it in an orderly way. Never imports torch."""

import asyncio
import signal
from collections.abc import Sequence

import structlog

from common.logs import set_up_logs
from common.version import software_version
from worker.agent import Agent
from worker.assignment import Means
from worker.client import CoordinatorClient, Credentials
from worker.config import WorkerConfig
from worker.contact import Clock, Contact
from worker.identity import client_id_of, enrol_key_of, holding
from worker.supervisor import DEFAULT_COMMAND, TrainerProcess

log = structlog.get_logger()


async def run_worker(config: WorkerConfig) -> None:
    """Runs a worker until the federation is over or SIGTERM comes.

    Raises the errors of common.errors that end a worker; the command line turns them into an exit status.
    """
    client_id = client_id_of(config.name)
    set_up_logs(config.log_format, config.log_level, client=client_id)
    with holding(config.state_dir):
        await work(config)


async def work(config: WorkerConfig, trainer_command: Sequence[str] = DEFAULT_COMMAND, clock: Clock = Clock()) -> None:
    """The same in a state folder that is already held, with another trainer or clock."""
    client_id = client_id_of(config.name)
    client = CoordinatorClient(
        config.coordinator, Credentials(client_id, enrol_key_of(config.state_dir), software_version())
    )
    trainer = TrainerProcess(config.policy.max_task_seconds, trainer_command)
    contact = Contact(config.state_dir, clock)
    agent = Agent(Means(config, client, trainer, contact, clock))
    try:
        await _until_terminated(agent, trainer)
    finally:
        await trainer.stop()
        await client.close()


async def _until_terminated(agent: Agent, trainer: TrainerProcess) -> None:
    """Runs the agent; when SIGTERM or a cancellation ends it, the coordinator is told."""
    loop = asyncio.get_running_loop()
    working = asyncio.create_task(agent.run())

    def terminate() -> None:
        trainer.kill()  # nothing will be trained any more, so nobody waits for its next step
        working.cancel()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        await asyncio.wait({working})
        if not working.cancelled():
            return working.result()
        log.info("terminated")
        await agent.leave()
    except asyncio.CancelledError:
        terminate()
        await asyncio.gather(working, return_exceptions=True)
        await agent.leave()
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
