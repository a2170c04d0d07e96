"""How far a simulation is: bars that move on a terminal, a line for each finished run anywhere else.

An Audience of the runner; knows rich, knows neither processes nor files.
"""

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.output import LiveScreen
from cli.words import NOTHING, counted, human_seconds, percent, plain
from simulation.results import RunKey, RunRow
from simulation.run import Progress as RunProgress
from simulation.runner import name_of
from simulation.schedule import FINISHED, TUNING, RunPlan

_PER_SECOND = 4
_NAME_WIDTH = 44
_STEP_BAR_WIDTH = 20


class SimulationScreen(LiveScreen):
    """Use as a context: it gives the terminal back."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._live = Live(console=console, refresh_per_second=_PER_SECOND, transient=True)
        super().__init__(console, self._live)
        self._encoding = self._progress.add_task("preparing model and data", total=None, left="", visible=False)
        self._runs = self._progress.add_task("runs", total=0, left="", visible=False)
        self._running: dict[RunKey, tuple[RunPlan, RunProgress | None]] = {}
        self._done = 0
        self._wanted = 0
        self._started = time.monotonic()
        self._told_percent = -1

    def say(self, line: str | Text) -> None:
        """A line that stays."""
        self._console.print(line, soft_wrap=True)
        self._console.file.flush()

    def planned(self, plans: Sequence[RunPlan], already: int) -> None:
        """What is to be done now."""
        kept = f", {already} of them finished before" if already else ""
        self.say(f"{counted(len(plans), 'run')}{kept}")
        self._wanted += len(plans) - already
        self._progress.update(self._runs, total=self._wanted, visible=self._wanted > 0)
        self._draw()

    def preparing(self, done: int, total: int) -> None:
        """On a terminal a bar; elsewhere a line at the start and one every quarter."""
        self._progress.update(self._encoding, completed=done, total=total or None, visible=True)
        if total:
            self._progress.update(self._encoding, description="encoding texts")
        quarter = 4 * done // total if total else -1
        if not self._console.is_terminal and (not total or quarter != self._told_percent):
            self.say(f"... encoding texts, {done} of {total}" if total else "... preparing model and data")
        self._told_percent = quarter
        self._draw()

    def started(self, plan: RunPlan) -> None:
        """A new line among those that move."""
        if not self._running and not self._done:
            self._started = time.monotonic()
        self._progress.update(self._encoding, visible=False)
        self._running[plan.key] = plan, None
        self._draw()

    def moved(self, plan: RunPlan, progress: RunProgress) -> None:
        """Its line."""
        self._running[plan.key] = plan, progress
        self._draw()

    def finished(self, plan: RunPlan, row: RunRow, accuracy: float) -> None:
        """A line that stays, and one less that moves."""
        self._end(plan)
        reached = f"{_measure(plan)} {percent(accuracy)}" if math.isfinite(accuracy) else "accuracy not measured"
        of = f"[{self._done}/{self._wanted}]"
        line = Text.assemble((of, "dim"), f" {plain(name_of(plan))}: ", (reached, "bold green"))
        line.append(f", {row.rounds} rounds in {human_seconds(row.seconds)}")
        if row.status != FINISHED:
            line.append(f"  {plain(row.status)}", style="bold yellow")
        self.say(line)

    def failed(self, plan: RunPlan, sentence: str) -> None:
        """Likewise."""
        self._end(plan)
        self.say(Text(f"{plain(name_of(plan))}: failed: {plain(sentence)}", style="red"))

    def _end(self, plan: RunPlan) -> None:
        self._running.pop(plan.key, None)
        self._done += 1
        self._progress.update(self._runs, completed=self._done)
        self._draw()

    def _draw(self) -> None:
        if not self._console.is_terminal:
            return
        self._progress.update(self._runs, left=self._time_left())
        lines = Table.grid(padding=(0, 2))
        for plan, progress in self._running.values():
            lines.add_row(*_running_line(plan, progress))
        self._live.update(Group(self._progress, lines))

    def _time_left(self) -> str:
        """From the finished runs and the rounds of those that go on."""
        parts = [p.round / p.num_rounds for _, p in self._running.values() if p is not None and p.num_rounds]
        done = self._done + sum(parts)
        if done <= 0:
            return ""
        left = (time.monotonic() - self._started) / done * max(0.0, self._wanted - done)
        return f"about {human_seconds(left)} left"


def _measure(plan: RunPlan) -> str:
    return "validation accuracy" if plan.key.stage == TUNING else "accuracy"


def _running_line(plan: RunPlan, progress: RunProgress | None) -> tuple[Text, ...]:
    name = plain(name_of(plan))
    if len(name) > _NAME_WIDTH:
        name = f"{name[: _NAME_WIDTH - 1]}…"
    if progress is None:
        return (Text(f"  {name}"), Text("loading the model", style="dim"))
    part = progress.round + (progress.clients_done / progress.clients if progress.clients else 0.0)
    cells = min(_STEP_BAR_WIDTH, int(_STEP_BAR_WIDTH * part / max(1, progress.num_rounds)))
    bar = Text("█" * cells, style="green").append("░" * (_STEP_BAR_WIDTH - cells), style="dim")
    reached = percent(progress.accuracy) if math.isfinite(progress.accuracy) else NOTHING
    return (
        Text(f"  {name}"),
        bar,
        Text(f"round {progress.round}/{progress.num_rounds}"),
        Text(f"accuracy {reached}", style="green"),
    )
