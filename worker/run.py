"""Starts one worker from its settings and ends it in an orderly way. Never imports torch."""

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from common.errors import Revoked
from common.logs import set_up_logs
from common.version import software_version
from worker.agent import Agent
from worker.assignment import Means
from worker.certificates import identity_in
from worker.client import CoordinatorClient, Credentials
from worker.config import WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import Admission, Keeper, admit, keeper_of
from worker.identity import client_id_of, enrol_key_of, holding
from worker.measurement import check_rank
from worker.policy_file import with_policy_file
from worker.supervisor import DEFAULT_COMMAND, TrainerProcess
from worker.tracking import Course, trackers_of

log = structlog.get_logger()


async def run_worker(config: WorkerConfig) -> None:
    """Runs a worker until the federation is over or SIGTERM comes.

    Raises the errors of common.errors that end a worker; the command line turns them into an exit status.
    """
    # A worker with a certificate learns its name when it comes in; until then its lines have none.
    has_name = config.coordinator.tls is not None or config.coordinator.insecure or not _may_come_in(config)
    named = {"client": client_id_of(config.name)} if has_name else {}
    set_up_logs(config.log_format, config.log_level, **named)
    with holding(config.state_dir):
        await work(config)


async def work(config: WorkerConfig, trainer_command: Sequence[str] = DEFAULT_COMMAND, clock: Clock = Clock()) -> None:
    """The same in a state folder that is already held, with another trainer or clock."""
    config = with_policy_file(config)
    check_rank(config)
    contact, where = Contact(config.state_dir, clock), config.coordinator
    try:
        admission = await _unless_terminated(admit(config, contact, clock))
        try:
            await _work_as(admission, config, trainer_command, clock)
        except Revoked as error:
            if admission.identity is None or not (where.join_token or where.join_token_file):
                raise
            log.warning(f"{error}; coming in again with the join token")
            admission = await _unless_terminated(admit(config, contact, clock, anew=True))
            await _work_as(admission, config, trainer_command, clock)
    except _Terminated:
        log.info("terminated")


def _may_come_in(config: WorkerConfig) -> bool:
    where = config.coordinator
    return bool(where.join_token or where.join_token_file) or identity_in(config.state_dir).is_complete


class _Terminated(Exception):
    """SIGTERM came before there was anybody to say goodbye to."""


async def _unless_terminated(coming_in: Coroutine[Any, Any, Admission]) -> Admission:
    """The admission. Raises _Terminated."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(coming_in)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await asyncio.wait({task})
        if task.cancelled():
            raise _Terminated
        return task.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        task.cancel()


async def _work_as(admission: Admission, config: WorkerConfig, trainer_command: Sequence[str], clock: Clock) -> None:
    structlog.contextvars.bind_contextvars(client=admission.client_id)
    trackers = trackers_of(config, admission.client_id)
    who = Credentials(admission.client_id, enrol_key_of(config.state_dir), software_version())
    client = CoordinatorClient(admission.where, who)
    trainer = TrainerProcess(config.policy.max_task_seconds, trainer_command, config.launch)
    contact = Contact(config.state_dir, clock)
    agent = Agent(Means(config, client, trainer, contact, clock, Course(trackers)))
    try:
        await _until_terminated(agent, trainer, keeper_of(admission, client, contact, clock))
    finally:
        await trainer.stop()
        await client.close()
        await asyncio.to_thread(trackers.close)


async def _until_terminated(agent: Agent, trainer: TrainerProcess, keeper: Keeper | None) -> None:
    """Runs the agent; when SIGTERM or a cancellation ends it, the coordinator is told."""
    loop = asyncio.get_running_loop()
    working = asyncio.create_task(_beside(keeper, agent))

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


async def _beside(keeper: Keeper | None, agent: Agent) -> None:
    """Runs the agent to its end; if there are no certificates to go on with, that ends it too."""
    tasks = [asyncio.create_task(agent.run())]
    if keeper is not None:
        tasks.append(asyncio.create_task(keeper.keep()))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
