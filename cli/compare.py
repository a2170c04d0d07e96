"""`raflora compare`: what an experiment's arms came to, as a table, one HTML page and pictures."""

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from cli.errors import ExitCode
from cli.experiments import RESULTS, Chosen, Wanted, choose
from cli.output import stdout_console
from cli.simulate import CACHE, Arms, Cache, Data, Jobs, Overrides, Seeds, carry_out, settled, stderr_console
from common.errors import ConfigError
from common.version import software_version
from simulation.schedule import TUNING

if TYPE_CHECKING:
    from simulation.experiment import ExperimentConfig
    from simulation.runner import Outcome

REPORT_FILE = "report.html"
PICTURES_FOLDER = "pictures"


@dataclass(frozen=True)
class _Compared:
    """An experiment with its results, and where they lie."""

    experiment: "ExperimentConfig"
    outcome: "Outcome"
    folder: Path
    baseline: str


def compare(
    *experiments: str,
    baseline: Annotated[str, Parameter(help="The arm that others are compared with; else FlexLoRA's average.")] = "",
    out: Annotated[Path | None, Parameter(help="The page; else report.html in the results' folder.")] = None,
    png: Annotated[Path | None, Parameter(help="Where the pictures go; else pictures/ in the results' folder.")] = None,
    jobs: Jobs = 1,
    data: Data = None,
    seeds: Seeds = (),
    arms: Arms = (),
    set_: Overrides = (),
    cache: Cache = CACHE,
    format: Literal["text", "json"] = "text",
) -> int:
    """Compares the arms of an experiment: a table, one HTML page that opens anywhere, and pictures.

    Each EXPERIMENT is a folder that `raflora simulate` wrote, or an experiment's file or name, which is simulated
    first (into runs/NAME, with the options of `raflora simulate`). Tables show mean, standard deviation and number of
    seeds, and each arm's difference to --baseline, paired by seed.
    """
    if not experiments:
        raise ConfigError("raflora compare: name a results folder, an experiment's file or its name")
    if len(experiments) > 1 and (out is not None or png is not None):
        raise ConfigError(f"--out and --png are for one experiment, but {len(experiments)} are named")
    if find_spec("matplotlib") is None:
        raise ConfigError('raflora compare needs matplotlib: pip install "raflora[science]"')
    console = stdout_console() if format == "text" else stderr_console()
    told = []
    for name in experiments:
        if Path(name).is_dir():
            if seeds or arms or set_:
                raise ConfigError(f"{name}: holds results; --seeds, --arms and --set are for what is to be simulated")
            compared = _read(Path(name), baseline)
        else:
            compared = _simulated(
                settled(choose(name, Wanted(seeds, arms, data, set_))), baseline, cache, jobs, console
            )
        page, pictures = out or compared.folder / REPORT_FILE, png or compared.folder / PICTURES_FOLDER
        _write(compared, page, pictures)
        told.append(_told(compared, page, pictures, console))
    if format == "json":
        print(json.dumps(told[0] if len(told) == 1 else told, allow_nan=False))
    return ExitCode.OK


def _read(folder: Path, baseline: str) -> _Compared:
    from simulation.runner import read_outcome  # noqa: PLC0415 - loads the coordinator's storage

    experiment, outcome = read_outcome(folder)
    _check_baseline(experiment, baseline)
    if not outcome.results.runs:
        raise ConfigError(f"{folder}: no run is finished yet; `raflora simulate` goes on where it was")
    return _Compared(experiment, outcome, folder, baseline)


def _simulated(chosen: Chosen, baseline: str, cache: Path, jobs: int, console: Console) -> _Compared:
    _check_baseline(chosen.config, baseline)
    folder = RESULTS / chosen.config.name
    return _Compared(chosen.config, carry_out(chosen, folder, cache, jobs, console), folder, baseline)


def _check_baseline(experiment: "ExperimentConfig", baseline: str) -> None:
    names = [arm.name for arm in experiment.arms]
    if baseline and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: the arms of {experiment.name} are {', '.join(names)}")


def _write(compared: _Compared, page: Path, pictures: Path) -> None:
    """The page and the pictures."""
    from simulation.report.figures import draw_all  # noqa: PLC0415 - matplotlib
    from simulation.report.plotting import write_png  # noqa: PLC0415
    from simulation.report.render import Report, render  # noqa: PLC0415
    from simulation.runner import missing_runs, name_of  # noqa: PLC0415

    experiment, outcome = compared.experiment, compared.outcome
    report = Report(
        experiment=experiment,
        results=outcome.results,
        choices=outcome.choices,
        baseline=compared.baseline,
        made_with=f"raflora {software_version()}, Python {platform.python_version()}, "
        f"{datetime.now(UTC).date().isoformat()}",
        missing=tuple(name_of(plan) for plan in missing_runs(experiment, outcome)),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(report), encoding="utf-8")
    stages = {run.key.stage for run in outcome.results.runs} - {TUNING}
    for stage in sorted(stages):
        for picture in draw_all(outcome.results.of_stage(stage), [arm.name for arm in experiment.arms]):
            write_png(picture, pictures / f"{stage}-{picture.name}.png")


def _told(compared: _Compared, page: Path, pictures: Path, console: Console) -> dict[str, Any]:
    """Shows it, and returns it for machines."""
    from cli.simulation_tables import findings_screen, outcome_json, outcome_screen  # noqa: PLC0415

    console.print(outcome_screen(compared.experiment, compared.outcome, compared.baseline))
    console.print(findings_screen(compared.experiment, compared.outcome, compared.baseline))
    console.print(f"\nReport:   {page}\nPictures: {pictures}", soft_wrap=True)
    files = {"folder": str(compared.folder), "report": str(page), "pictures": str(pictures)}
    return files | outcome_json(compared.experiment, compared.outcome, compared.baseline)
