"""`raflora local`: a whole federation on this machine from its settings files, on one screen."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveFloat
from raflora.v1 import status_pb2
from rich.table import Table
from rich.text import Text

from cli.errors import ExitCode
from cli.evaluation_screen import best_line, value_of
from cli.local_federation import Files, Story, run_federation
from cli.local_processes import until_told_to_end
from cli.local_screen import LocalScreen, energies
from cli.output import Format, stderr_console, stdout_console
from cli.tables import open_table
from cli.words import counted, human_seconds, plain
from common.errors import ConfigError
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from worker.config import WorkerConfig

_SHOWN_METRICS = 4  # columns that fit beside site and rank


@dataclass(frozen=True)
class Places:
    """Where what a federation leaves behind goes."""

    logs: Path
    adapter: Path | None


async def local(
    federation: Annotated[Path, Parameter(help="federation.toml, as `raflora coordinator` takes it.")],
    /,
    *workers: Annotated[Path, Parameter(name="WORKERS", help="A worker.toml for each site, as `raflora worker` has.")],
    logs: Annotated[Path, Parameter(help="The folder that gets a log of each process.")] = Path("runs/local"),
    export_to: Annotated[Path | None, Parameter(help="Write the trained adapter there, as `raflora export` does.")] = (
        None
    ),
    join_seconds: Annotated[
        PositiveFloat, Parameter(help="Give up when nobody has joined for so long; a model may have to be fetched.")
    ] = 1800.0,
    set_: Annotated[
        tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides a key of FEDERATION; repeatable.")
    ] = (),
    format: Annotated[
        Format, Parameter(help="json: the last round on standard output, the screen on standard error.")
    ] = "table",
) -> int:
    """Starts the coordinator of FEDERATION and a worker for each file of WORKERS here, and follows them.

    For trying a federation where everything is on one machine; nobody else can reach it. What stands in the files is
    used as it is, but the coordinator takes a free port. Relative paths in them begin at the working directory. Run
    again after an interruption it goes on where it was.
    """
    config = load_settings(CoordinatorConfig, federation, overrides=set_)
    if config.server.identity is not None or config.server.tls is not None:
        raise ConfigError(f"{federation}: raflora local speaks in the clear here; take [server.identity] out")
    if not workers:
        raise ConfigError(f"no workers: after {federation} give a worker.toml for each site")
    names, num_training = _names(workers)
    if num_training < config.rounds.min_clients:
        raise ConfigError(f"{num_training} workers that train, but rounds.min_clients is {config.rounds.min_clients}")
    files, places = _files(logs, federation, names, set_), Places(logs, export_to)
    with LocalScreen(stdout_console() if format == "table" else stderr_console(), logs) as screen:
        screen.title(f"{config.name}: {config.rounds.num_rounds} rounds, {len(names)} workers, logs in {logs}")
        story = await until_told_to_end(
            run_federation(config.aggregation.method, files, screen, export_to=export_to, join_seconds=join_seconds),
            lambda: screen.say(f"Interrupted; every process that was started has been ended. Their logs: {logs}"),
        )
        _show(story, screen)
        if lacks_evaluations(config, story):
            screen.say("", f"No evaluation succeeded, so nobody knows how good the adapter is; why: {logs}/*.log")
        if export_to is not None:
            screen.say("", f"The adapter, a stock PEFT folder: {export_to}")
    if format == "json":
        print(json.dumps(as_json(config.name, story, places), indent=2, allow_nan=False))
    return ExitCode.OK


def _files(logs: Path, federation: Path, workers: Mapping[str, Path], overrides: Sequence[str]) -> Files:
    logs.mkdir(parents=True, exist_ok=True)
    return Files(logs, federation, workers, (*overrides, "server.listen=127.0.0.1:0", "log_format=json"))


def _names(files: Sequence[Path]) -> tuple[Mapping[str, Path], int]:
    """The workers' files by name, and how many of them train. Names and state folders must differ: ConfigError."""
    named: dict[str, Path] = {}
    states: dict[Path, Path] = {}
    num_training = 0
    for file in files:
        config = load_settings(WorkerConfig, file)
        if not config.name:
            raise ConfigError(f"{file}: a name is needed, because all workers are on one machine")
        other = named.get(config.name) or states.get(config.state_dir.absolute())
        if other is not None:
            raise ConfigError(f"{file}: has the name or the state_dir of {other}; give every worker its own")
        named[config.name] = states[config.state_dir.absolute()] = file
        num_training += not config.evaluator
    return named, num_training


def lacks_evaluations(config: CoordinatorConfig, story: Story) -> bool:
    """Whether evaluations were due in the rounds that were followed and none came."""
    every, last = config.rounds.evaluate_every, config.rounds.num_rounds
    due = [one for one in story.rounds if every and (one.round % every == 0 or one.round == last)]
    return bool(due) and not any(one.evaluations for one in due)


def _show(story: Story, screen: LocalScreen) -> None:
    if not story.rounds:
        screen.say("The federation was over already; take another state_dir for a new one.")
        return
    last = story.rounds[-1]
    if last.evaluations:
        screen.title("The last adapter on each site's test data, at its own rank")
        screen.say(metrics_table(last))
    screen.title("Energy per rank partition after the last round")
    rounds = counted(len(story.rounds), "round")
    screen.say(
        energies([story]), "", f"{rounds} in {human_seconds(story.total_seconds)}; {plain(story.ending.explanation)}"
    )
    if story.ending.HasField("best"):
        screen.say(best_line(story.ending))


def metrics_table(summary: status_pb2.RoundSummary) -> Table:
    """A row a site, a column a metric."""
    names = sorted({name for evaluation in summary.evaluations for name in evaluation.metrics})[:_SHOWN_METRICS]
    table = open_table()
    table.add_column("site")
    for column in ("rank", "examples", *map(plain, names)):
        table.add_column(column, justify="right")
    for site in _by_rank(summary):
        found = (value_of(site.metrics, name) for name in names)
        table.add_row(Text(plain(site.client_id)), str(site.lora_rank), str(site.num_examples), *found)
    return table


def as_json(federation: str, story: Story, places: Places) -> dict[str, Any]:
    """The last round for machines: each site's metrics and the energies; a federation that was over has no round."""
    last = story.rounds[-1] if story.rounds else status_pb2.RoundSummary()
    return {
        "federation": federation,
        "method": story.method,
        "seconds": round(story.total_seconds, 1),
        "rounds": len(story.rounds),  # that were followed: not those of an earlier run
        "last_round": last.round,
        "adapter_digest": last.adapter_digest,
        "sites": [
            {
                "site": site.client_id,
                "rank": site.lora_rank,
                "num_examples": site.num_examples,
                "central": site.central,
                "metrics": _finite(site.metrics),
            }
            for site in _by_rank(last)
        ],
        "federated_metrics": _finite(last.federated_metrics),
        "central_metrics": _finite(last.central_metrics),
        "energies": [
            {"low": p.low, "high": p.high, "energy_share": p.energy_share, "contributors": p.contributors}
            for p in last.partitions
        ],
        "logs": str(places.logs),
        "adapter": None if places.adapter is None else str(places.adapter),
    }


def _by_rank(summary: status_pb2.RoundSummary) -> list[status_pb2.EvaluationSummary]:
    return sorted(summary.evaluations, key=lambda evaluation: (evaluation.lora_rank, evaluation.client_id))


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """What JSON has no number for is null."""
    return {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
