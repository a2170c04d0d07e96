"""`raflora local`: a whole federation on this machine from its settings files, on one screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raflora.v1 import status_pb2
from rich.table import Table
from rich.text import Text

from cli.demo_federation import Story, run_federation
from cli.demo_processes import until_told_to_end
from cli.demo_screen import DemoScreen, energies
from cli.demo_setting import Files
from cli.errors import ExitCode
from cli.output import stdout_console
from cli.words import human_seconds, plain
from common.errors import ConfigError
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from worker.config import WorkerConfig

_SHOWN_METRICS = 4  # columns that fit beside site and rank


async def local(
    federation: Path,
    /,
    *workers: Path,
    logs: Path = Path("runs/local"),
    export_to: Path | None = None,
) -> int:
    """Starts the coordinator of FEDERATION (a toml file) and a worker for each file of WORKERS, and follows them.

    For trying a federation where everything is on one machine; nobody else can reach it. What stands in the files is
    used as it is, but the coordinator takes a free port. Each process writes its log into --logs. With --export-to
    the trained adapter is written into that folder as `raflora export` does. Run again after an interruption it goes
    on where it was.
    """
    config = load_settings(CoordinatorConfig, federation)
    if config.server.identity is not None or config.server.tls is not None:
        raise ConfigError(f"{federation}: raflora local speaks in the clear here; take [server.identity] out")
    names, num_training = _names(workers)
    if num_training < config.rounds.min_clients:
        raise ConfigError(f"{num_training} workers that train, but rounds.min_clients is {config.rounds.min_clients}")
    files = _files(logs, federation, names)
    with DemoScreen(stdout_console()) as screen:
        screen.title(f"{config.name}: {config.rounds.num_rounds} rounds, {len(names)} workers, logs in {logs}")
        story = await until_told_to_end(
            run_federation(config.aggregation.method, files, screen, export_to=export_to),
            lambda: screen.say(f"Interrupted; every process that was started has been ended. Their logs: {logs}"),
        )
        _show(story, screen)
        if export_to is not None:
            screen.say("", f"The adapter, a stock PEFT folder: {export_to}")
    return ExitCode.OK


def _files(logs: Path, federation: Path, workers: Mapping[str, Path]) -> Files:
    logs.mkdir(parents=True, exist_ok=True)
    return Files(logs, federation, workers, ("server.listen=127.0.0.1:0", "log_format=json"))


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


def _show(story: Story, screen: DemoScreen) -> None:
    if not story.rounds:
        screen.say("The federation was over already; take another state_dir for a new one.")
        return
    last = story.rounds[-1]
    if last.evaluations:
        screen.title("The last adapter on each site's test data, at its own rank")
        screen.say(metrics_table(last))
    screen.title("Energy per rank partition after the last round")
    screen.say(energies([story]), "", f"{len(story.rounds)} rounds in {human_seconds(story.total_seconds)}")


def metrics_table(summary: status_pb2.RoundSummary) -> Table:
    """A row a site, a column a metric."""
    names = sorted({name for evaluation in summary.evaluations for name in evaluation.metrics})[:_SHOWN_METRICS]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("site")
    for column in ("rank", "examples", *names):
        table.add_column(column, justify="right")
    for site in sorted(summary.evaluations, key=lambda evaluation: (evaluation.lora_rank, evaluation.client_id)):
        found = (f"{site.metrics[name]:.4f}" if name in site.metrics else "-" for name in names)
        table.add_row(Text(plain(site.client_id)), str(site.lora_rank), str(site.num_examples), *found)
    return table
