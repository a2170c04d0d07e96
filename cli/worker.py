"""`raflora worker`: runs one worker of one site until the federation is finished."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cli.checks import Verdict
from cli.checks_machine import check_data, check_model
from common.errors import ConfigError
from common.failpoints import arm_as_planned
from common.memory import keep_memory_flat
from common.settings import failpoints_plan, load_settings
from worker.config import WorkerConfig
from worker.run import run_worker


async def worker(
    *,
    config: Annotated[Path | None, Parameter(help="The settings file; `raflora config worker` lists the keys.")] = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")] = (),
) -> None:
    """Trains this site's data at this site's rank, for the coordinator that the settings name."""
    keep_memory_flat()  # of this process, the agent; the trainer is another one and decides for itself
    arm_as_planned(failpoints_plan())
    settings = load_settings(WorkerConfig, config, overrides=set_)
    # Before anybody is asked: a worker that cannot load must not use a join token up.
    for check in (check_model(settings.model), *check_data(settings.data)):
        if check.verdict is Verdict.FAILED:
            raise ConfigError(f"{check.name}: {check.found}; {check.advice}")
    await run_worker(settings)
