"""`raflora coordinator`: runs the coordinator of one federation until a signal."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cli.export_origin import origin_of_published, write_origin
from common.descriptors import raise_limit
from common.failpoints import arm_as_planned
from common.logs import set_up_logs
from common.memory import keep_memory_flat
from common.settings import failpoints_plan, load_settings
from common.transfer import sweep_parts
from coordinator.config import CoordinatorConfig
from coordinator.server import run_coordinator
from worker.peft_format import write_peft_folder

if TYPE_CHECKING:
    from coordinator.publishing import PublishedAdapter

_BEST_FOLDER = "best"  # within export_dir, whose own files are the newest adapter's


async def coordinator(
    *,
    config: Annotated[
        Path | None, Parameter(help="The settings file; `raflora config coordinator` lists the keys.")
    ] = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")] = (),
) -> None:
    """Opens rounds, hands out rank slices, merges what comes back; a restart goes on where it was."""
    arm_as_planned(failpoints_plan())
    settings = load_settings(CoordinatorConfig, config, overrides=set_)
    keep_memory_flat()
    raise_limit()
    set_up_logs(settings.log_format, settings.log_level, role="coordinator", federation=settings.name)
    folder = settings.export_dir
    await run_coordinator(
        settings,
        on_published=partial(_export, folder) if folder else None,
        on_best=partial(_export, folder / _BEST_FOLDER) if folder else None,
    )


def _export(folder: Path, published: "PublishedAdapter") -> None:
    """An adapter as a stock PEFT folder, in place of the one before; `raflora export --from` goes on from it."""
    manifest = published.manifest
    sweep_parts(folder)  # of an export that a crash interrupted
    write_peft_folder(
        folder,
        published.adapter,
        scaling=1.0,
        base_model=manifest.model.base_model,
        task=manifest.model.task,
        modules_to_save=manifest.adapter.modules_to_save,
    )
    write_origin(folder, origin_of_published(published))
