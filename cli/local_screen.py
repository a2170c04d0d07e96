"""A federation on this machine as it is shown: lines that stay, and on a terminal a region below them that moves.

Without a terminal (a pipe, a CI log) the moving part is left out and the bars follow each round as a line.
"""

from collections.abc import Sequence
from pathlib import Path

from raflora.v1 import status_pb2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cli.evaluation_screen import central_line, eval_loss, headline, value_of
from cli.local_federation import Story
from cli.output import LiveScreen
from cli.screens import Partitions, energy_bar, energy_bars, energy_comparison, joined_line, phase_name
from cli.tables import open_table
from cli.words import NOTHING, counted, human_seconds, plain, rank_range
from common.sizes import human_bytes

_PROGRESS_WIDTH = 30
_BARS_WIDTH = 30
_SHORT_BAR_WIDTH = 8
_PER_SECOND = 8
_METHOD_NAMES = {"raflora": "raFLoRA", "flexlora": "FlexLoRA"}


class LocalScreen(LiveScreen):
    """Tells what happens; an Audience of the federation. Use as a context: it gives the terminal back."""

    def __init__(self, console: Console, logs: Path | None = None) -> None:
        self._live = Live(console=console, refresh_per_second=_PER_SECOND, transient=True)
        super().__init__(console, self._live)
        self._energies: RenderableType = Text()
        self._waited_for = ""
        self._evaluators = 0
        self._logs = logs

    def say(self, *lines: RenderableType) -> None:
        """Lines that stay; a terminal that is too narrow gets them wrapped at words."""
        for line in lines:
            self._console.print(line, soft_wrap=isinstance(line, str | Text) and not self._console.is_terminal)
        self._console.file.flush()

    def quote(self, line: str) -> None:
        """A line that somebody may copy: never broken by us."""
        self._console.print(line, soft_wrap=True)

    def title(self, text: str) -> None:
        """The start of a part."""
        self._energies = Text()
        self.say("", Text(text, style="bold"))

    def waiting(self, sentence: str) -> None:
        """What is waited for, while there is no round to show."""
        self._live.update(Spinner("dots", Text(sentence, style="dim")))
        first_words = sentence.lstrip("0123456789 ")
        if not self._console.is_terminal and first_words != self._waited_for:
            self.say(f"... {sentence}")
        self._waited_for = first_words

    def joined(self, client: status_pb2.ClientSummary) -> None:
        """A worker is here."""
        self._evaluators += client.evaluates_only
        self.say(Text("  ").append(joined_line(client)))

    def begins(self, status: status_pb2.FederationStatus) -> None:
        """All are here."""
        self._waited_for = ""
        if status.method == "raflora" and status.forecast.sentence:
            self.say(Text(f"Forecast from the ranks alone: {plain(status.forecast.sentence)}.", style="cyan"))

    def failed(self, assignment: status_pb2.AssignmentStatus) -> None:
        """A task went wrong; the coordinator decides what comes of it."""
        name, why = plain(assignment.client_id), plain(assignment.last_failure)
        where = "" if self._logs is None else f" ({self._logs / f'{name}.log'})"
        self.say(Text(f"  {name} could not do its task: {why}{where}", style="yellow"))

    def moves(self, status: status_pb2.FederationStatus) -> None:
        """The open round and the newest energies."""
        if status.assignments:
            self._live.update(Group(_progress_line(status), Text(), self._energies))

    def round_ended(self, summary: status_pb2.RoundSummary, status: status_pb2.FederationStatus) -> None:
        """One line, and its energies."""
        self.say(_round_line(summary, status, status.clients_known - self._evaluators))
        if summary.central_metrics:
            self.say(Text("    ").append_text(central_line(summary)))
        if self._console.is_terminal:
            self._energies = energy_bars(summary.partitions, _BARS_WIDTH)
        else:
            self.say(_short_bars(summary.partitions))


def accuracy_table(stories: Sequence[Story]) -> Table:
    """What each site measured of the last global adapter, at its own rank; a column a federation."""
    table = open_table()
    table.add_column("site")
    table.add_column("rank", justify="right")
    for story in stories:
        table.add_column(name_of(story), justify="right")
    measured = [{e.client_id: e for e in story.rounds[-1].evaluations} for story in stories]
    for site in sorted(measured[0].values(), key=lambda evaluation: (evaluation.lora_rank, evaluation.client_id)):
        found = (value_of(by_client[site.client_id].metrics, "accuracy") for by_client in measured)
        table.add_row(plain(site.client_id), str(site.lora_rank), *found)
    return table


def energies(stories: Sequence[Story]) -> RenderableType:
    """The last round's energies: one federation's bars, or two side by side."""
    partitions = [story.rounds[-1].partitions for story in stories]
    if len(stories) == 1:
        return energy_bars(partitions[0], _BARS_WIDTH)
    return energy_comparison(name_of(stories[0]), partitions[0], name_of(stories[1]), partitions[1])


def name_of(story: Story) -> str:
    """The method as papers write it."""
    return _METHOD_NAMES.get(story.method, story.method)


def _progress_line(status: status_pb2.FederationStatus) -> Table:
    """ "round 7/12  ━━━━━━━━╸        training  3 of 5 workers done"; a round is training, then evaluating."""
    workers = len(status.assignments)
    done = [1.0 if a.state == status_pb2.ASSIGNMENT_STATE_DONE else _part_done(a) for a in status.assignments]
    behind = workers if status.phase == status_pb2.PHASE_EVALUATING else 0
    line = Table.grid(padding=(0, 2))
    line.add_row(
        Text(f"round {status.round}/{status.num_rounds}", style="bold"),
        ProgressBar(total=2 * workers, completed=behind + sum(done), width=_PROGRESS_WIDTH),
        Text(phase_name(status.phase), style="green"),
        f"{sum(part == 1.0 for part in done)} of {counted(workers, 'worker')} done",
    )
    return line


def _part_done(assignment: status_pb2.AssignmentStatus) -> float:
    # Never a whole: the update has to travel, too.
    return 0.95 * assignment.step / assignment.total_steps if assignment.total_steps else 0.0


def _round_line(summary: status_pb2.RoundSummary, status: status_pb2.FederationStatus, workers: int) -> Text:
    width = len(str(status.num_rounds))  # all of it fits into 80 columns
    seconds = summary.training_seconds + summary.aggregation_seconds + summary.evaluation_seconds
    return Text.assemble(
        (f"round {summary.round:>{width}}/{status.num_rounds}", "bold"),
        f"  {len(summary.contributions)}/{counted(workers, 'worker')}",
        *_measured(summary),
        ("  up ", "dim"),
        human_bytes(summary.bytes_received),
        ("  down ", "dim"),
        human_bytes(summary.bytes_sent),
        f"  {human_seconds(seconds)}",
    )


def _measured(summary: status_pb2.RoundSummary) -> Sequence[tuple[str, str]]:
    """What the evaluation of a round came to, in a word and a number; nothing if nobody evaluated."""
    name, value = headline(summary)
    loss = eval_loss(summary)
    share = () if value == NOTHING else ((f"  {name.replace('_', ' ')} ", "dim"), (value, "bold green"))
    # Of a language model the loss says more: an answer that is nearly right is wrong.
    is_enough = loss == NOTHING or (bool(share) and name == "accuracy")
    return share if is_enough else (*share, ("  loss ", "dim"), (loss, "bold green"))


def _short_bars(partitions: Partitions) -> Text:
    """All partitions on one line: "1-2 ███ 41 %  3-4 ██ 18 %"."""
    bars = (
        f"{rank_range(p.low, p.high)} {energy_bar(p.energy_share, _SHORT_BAR_WIDTH)} {p.energy_share:>4.0%}"
        for p in partitions
    )
    return Text("    energy in ranks " + "  ".join(bars), style="dim")
