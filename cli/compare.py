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
from cli.experiments import RESULTS, Wanted, choose
from cli.output import stdout_console
from cli.simulate import (
    CACHE,
    Arms,
    Cache,
    Data,
    Jobs,
    Overrides,
    Seeds,
    carry_out,
    failures_text,
    settled,
    stderr_console,
)
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
    png: Annotated[Path | None, Parameter(help="Where the pictures go; else pictures/ beside the page.")] = None,
    results: Annotated[Path | None, Parameter(help="Where an experiment is simulated; else runs/NAME.")] = None,
    jobs: Jobs = None,
    data: Data = None,
    seeds: Seeds = (),
    arms: Arms = (),
    set_: Overrides = (),
    cache: Cache = CACHE,
    format: Literal["text", "json"] = "text",
) -> int:
    """Compares the arms of an experiment: a table, one HTML page that opens anywhere, and pictures.

    Each EXPERIMENT is a folder that `raflora simulate` wrote, or an experiment's file or name, which is simulated
    first (into runs/NAME, with the options of `raflora simulate`; the exit code is 1 if a run failed). Tables show
    mean, standard deviation and number of seeds, at the global rank and at the clients' own ranks, and each arm's
    difference to --baseline, paired by seed.
    """
    if not experiments:
        raise ConfigError("raflora compare: name a results folder, an experiment's file or its name")
    if len(experiments) > 1 and not (out is None and png is None and results is None):
        raise ConfigError(f"--out, --png and --results are for one experiment, but {len(experiments)} are named")
    if find_spec("matplotlib") is None:
        raise ConfigError('raflora compare needs matplotlib: pip install "raflora[science]"')
    console = stdout_console() if format == "text" else stderr_console()
    told, failed = [], False
    for name in experiments:
        if Path(name).is_dir():
            if seeds or arms or set_ or results is not None or jobs is not None or data is not None or cache != CACHE:
                raise ConfigError(
                    f"{name}: holds results; --results, --jobs, --data, --seeds, --arms, --set and --cache are for "
                    "what is to be simulated"
                )
            compared = _read(Path(name), baseline)
        else:
            chosen = choose(name, Wanted(seeds, arms, data, set_))
            _check_baseline(chosen.config, baseline)
            chosen = settled(chosen)
            folder = results or RESULTS / chosen.config.name
            outcome = carry_out(chosen, folder, cache, jobs, console)
            compared = _Compared(chosen.config, outcome, folder, baseline)
        page = out or compared.folder / REPORT_FILE
        pictures = png or page.parent / PICTURES_FOLDER
        _write(compared, page, pictures)
        told.append(_told(compared, page, pictures, console))
        failed = failed or bool(compared.outcome.failures)
    if format == "json":
        print(json.dumps(told[0] if len(told) == 1 else told, allow_nan=False))
    return ExitCode.FAILED if failed else ExitCode.OK


def _read(folder: Path, baseline: str) -> _Compared:
    from simulation.runner import read_outcome  # noqa: PLC0415 - loads the coordinator's storage

    experiment, outcome = read_outcome(folder)
    _check_baseline(experiment, baseline)
    if not outcome.results.runs:
        raise ConfigError(f"{folder}: no run is finished yet; `raflora simulate` goes on where it was")
    return _Compared(experiment, outcome, folder, baseline)


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
    if compared.outcome.failures:
        console.print(failures_text(compared.outcome))
    console.print(f"\nReport:   {page}\nPictures: {pictures}", soft_wrap=True)
    files = {"folder": str(compared.folder), "report": str(page), "pictures": str(pictures)}
    return files | outcome_json(compared.experiment, compared.outcome, compared.baseline)
