"""Which experiment a command line means: a file, or one that comes with the package by its name.

Reads settings only; torch is never loaded here.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from common.errors import ConfigError
from common.settings import environment_keys, load_settings
from simulation.experiment import ExperimentConfig
from simulation.schedule import first_plans

BUILT_IN = Path(__file__).parent.parent / "simulation" / "experiments"
RESULTS = Path("runs")

# Of one optimizer step on one core, measured once on a busy machine: an order of magnitude, not a promise.
_SECONDS_A_STEP = {"features": 0.003, "layers": 0.2, "images": 0.015, "model": 1.5}
_SECONDS_A_TASK = 0.05  # whatever the steps: setting up the Trainer
_CLASSIC_EXAMPLES = 10_000  # of a data set whose size is not known before it is read


@dataclass(frozen=True)
class Wanted:
    """What of an experiment is to be run, beyond its file."""

    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()
    data: Path | None = None
    overrides: tuple[str, ...] = ()  # KEY=VALUE


@dataclass(frozen=True)
class Chosen:
    """An experiment, and where its file lies."""

    config: ExperimentConfig
    folder: Path
    decided: tuple[str, ...] = ()  # keys that the command line or the environment has decided

    @property
    def on_cpu(self) -> "Chosen":
        """The variant for a machine without a GPU."""
        others = {key: value for key, value in self.config.without_gpu.items() if key not in self.decided}
        return replace(self, config=self.config.model_copy(update={"without_gpu": others}).on_cpu())


def built_in_names() -> tuple[str, ...]:
    """Of the experiments that come with the package."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.toml")))


def file_of(name: str) -> Path:
    """The file that a path or a name means. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    if name in built_in_names():
        return BUILT_IN / f"{name}.toml"
    known = ", ".join(built_in_names())
    raise ConfigError(f"{name}: there is no such file, and no experiment of that name comes with raflora ({known})")


def choose(name: str, wanted: Wanted = Wanted()) -> Chosen:
    """The experiment with everything that the command line changes. Raises ConfigError."""
    path = file_of(name)
    config = load_settings(ExperimentConfig, path, overrides=wanted.overrides)
    changes: dict[str, object] = {}
    if wanted.seeds:
        changes["seeds"] = list(wanted.seeds)
    if wanted.arms:
        known = [arm.name for arm in config.arms]
        unknown = [arm for arm in wanted.arms if arm not in known]
        if unknown:
            raise ConfigError(f"--arms {unknown[0]}: the arms of {path.stem} are {', '.join(known)}")
        changes["arms"] = [arm.model_dump() for arm in config.arms if arm.name in wanted.arms]
    if wanted.data is not None:
        if not wanted.data.is_dir():
            raise ConfigError(f"--data {wanted.data}: there is no such folder")
        changes["data"] = config.data.model_dump() | {"folder": wanted.data.absolute()}
    try:
        config = ExperimentConfig.model_validate(config.model_dump() | changes)
        first_plans(config)  # an arm's own settings are looked at here, before anything is loaded
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    decided = (*environment_keys(), *changes, *(override.partition("=")[0] for override in wanted.overrides))
    return Chosen(config, path.absolute().parent, decided)


def check_files(chosen: Chosen) -> None:
    """Raises ConfigError, with what to do, if a file of the data is not there; a hub's data set is not asked for."""
    from simulation.text_data import DataPlace  # noqa: PLC0415 - loads the trainer's side
    from worker.trainer.data import FILE_KINDS  # noqa: PLC0415

    for arm in chosen.config.arms:
        seen = chosen.config.for_arm(arm)
        place = DataPlace(seen.data, chosen.folder)
        named: dict[str, str | Path | None] = {"data.train": seen.data.train, "data.test": seen.data.test}
        named = {key: name for key, name in named.items() if Path(str(name)).suffix in FILE_KINDS}
        named |= {"data.labels_file": seen.data.labels_file, "clients.groups_file": seen.clients.groups_file}
        for key, name in named.items():
            try:
                if name is not None:
                    place.find(Path(name), key)
            except ConfigError as error:
                raise ConfigError(f"{error}; name the folder with --data (docs/experiments.md: Data)") from None


def number_of_runs(experiment: ExperimentConfig) -> int:
    """All stages together; those of "best" that equal one of "same" are counted, too."""
    best = len(experiment.arms) * len(experiment.seeds) if experiment.tuning.learning_rates else 0
    return len(first_plans(experiment)) + best


def jobs_for(experiment: ExperimentConfig) -> int:
    """Processes where nobody says how many: one a core that this process may use, no more than there are runs."""
    return max(1, min(len(os.sched_getaffinity(0)), number_of_runs(experiment)))


def rough_seconds(experiment: ExperimentConfig) -> float:
    """About how long all runs take one after the other on one core; texts that must be encoded come on top."""
    model, data, clients, training = experiment.model, experiment.data, experiment.clients, experiment.training
    if model.class_name_head:
        kind = "layers" if model.trained_layers else "features"
    else:
        kind = "images" if data.train == "digits" else "model"
    examples = (data.max_train or _CLASSIC_EXAMPLES) / clients.count
    steps = training.local_steps or math.ceil(training.local_epochs * examples / training.batch_size)
    task_seconds = _SECONDS_A_TASK + steps * _SECONDS_A_STEP[kind]
    return number_of_runs(experiment) * experiment.rounds.num_rounds * clients.per_round * task_seconds
