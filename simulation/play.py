"""One run on the real model: what `raflora simulate` does again and again."""

from pathlib import Path

from coordinator.config import BaseModelConfig
from simulation.local_work import LocalWork
from simulation.prepare import Prepared
from simulation.results import RunRow
from simulation.run import Material, OnProgress, play_on
from simulation.schedule import RunPlan
from simulation.torch_work import load_work


def play(
    run: RunPlan,
    prepared: Prepared,
    folder: Path,
    on_progress: OnProgress = lambda _: None,
    work: LocalWork | None = None,
) -> RunRow:
    """Plays one run to its end, or reads it if it is finished; its rows lie in the folder afterwards.

    `work` is a model that an earlier run of the same `prepared` has loaded (`load_work`), to be used again. Raises
    what `play_on` raises, and ModelError.
    """
    return play_on(run, material_from(run, prepared, work), folder, on_progress)


def material_from(run: RunPlan, prepared: Prepared, work: LocalWork | None = None) -> Material:
    """What all runs on this data and model are made of."""
    # The manifest's task is one of those that a coordinator knows, and these are they.
    model = BaseModelConfig.model_validate(
        {"base_model": run.experiment.model.path, "task": prepared.task, "labels": prepared.labels}
    )
    return Material(
        model=model,
        target_modules=prepared.target_modules,
        modules_to_save=prepared.modules_to_save,
        train_labels=prepared.train_labels.tolist(),
        train_groups=prepared.train_groups,
        contents=prepared.contents,
        work=lambda rank: load_work(prepared, lora_rank=rank) if work is None else work,
    )
