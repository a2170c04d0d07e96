"""The federation as a person sees it: from status messages to rich renderables.

Pure functions; nothing here prints, reads a clock or knows a connection. Strings from the wire always pass `plain`.
All verbs share them.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from raflora.v1 import status_pb2
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from cli.evaluation_screen import best_line, eval_loss, evaluation_lines, headline
from cli.tables import open_table
from cli.words import NOTHING, counted, decimals, human_seconds, percent, plain, rank_range
from common.sizes import human_bytes

BAR_WIDTH = 40
_STEPS_WIDTH = 16
_COMPARISON_WIDTH = 24
_ID_WIDTH = 24  # of a client's name, before it is folded
_REASON_WIDTH = 40  # at least, or the reason is not shown
_ANY_WIDTH = 10_000  # asks what a table would like to have
_FULL, _SLIVER = "█", "▏"

Partitions = Sequence[status_pb2.RankPartition]


def status_screen(status: status_pb2.FederationStatus, notice: str = "") -> Group:
    """Everything at a glance; `notice` is about the connection, not the federation ("reconnecting ...")."""
    parts: list[RenderableType] = [federation_header(status)]
    parts += [Text(f"! {plain(warning)}", style="yellow") for warning in status.warnings]
    if notice:
        parts.append(Text(notice, style="bold yellow"))
    if status.assignments:
        parts += [Text(), assignments_table(status.assignments)]
    if status.HasField("last_round"):
        last = status.last_round
        title = f"Energy per rank partition after round {last.round}"
        parts += [Text(), Text(title, style="bold"), energy_bars(last.partitions), spectrum_line(last)]
        parts += [round_line(last, status.num_rounds), *evaluation_lines(last)]
    if status.HasField("best"):
        parts.append(best_line(status))
    parts += [Text(), traffic_line(status)]
    if status.security:
        is_open = status.security.startswith("INSECURE")
        parts.append(Text(f"Connections: {plain(status.security)}", style="bold red" if is_open else "dim"))
    if status.forecast.sentence:
        parts.append(Text(f"Forecast: {plain(status.forecast.sentence)}", style="cyan"))
    return Group(*parts)


def federation_header(status: status_pb2.FederationStatus) -> Text:
    """Two lines: what federation this is, and where it stands."""
    about = [plain(status.federation), plain(status.task), plain(status.base_model), plain(status.method)]
    if status.global_rank:
        about.append(f"global rank {status.global_rank}")
    header = Text(" · ".join(word for word in about if word), style="bold")
    header.append("\n")
    header.append(standing_line(status))
    return header


def standing_line(status: status_pb2.FederationStatus) -> Text:
    """ "round 3/20  training  2 of 3 updates, quorum 2, deadline in 42 s"."""
    line = Text(f"round {status.round}/{status.num_rounds}  ", style="not bold")
    line.append(phase_name(status.phase), style="green")
    if status.paused:
        line.append("  paused", style="bold yellow")
    if status.explanation:
        line.append(f"  {plain(status.explanation)}")
    return line


def phase_name(phase: status_pb2.Phase) -> str:
    """PHASE_WAITING_FOR_CLIENTS -> "waiting for clients"; a number that this version does not know stays one."""
    if phase not in status_pb2.Phase.values():
        return f"phase {phase}"
    return status_pb2.Phase.Name(phase).removeprefix("PHASE_").replace("_", " ").lower()


def assignments_table(assignments: Iterable[status_pb2.AssignmentStatus]) -> Table:
    """The open round: one row a client, with a bar of its steps."""
    table = _table("client", ">rank", "activity", "progress", ">loss", ">silent", "last failure")
    for assignment in assignments:
        silent = human_seconds(assignment.silent_seconds)
        table.add_row(
            plain(assignment.client_id),
            str(assignment.lora_rank),
            _activity(assignment),
            _steps(assignment),
            decimals(assignment.train_loss) if assignment.step else NOTHING,
            Text(f"{silent} late", style="red") if assignment.late else silent,
            Text(plain(assignment.last_failure), style="red"),
        )
    return table


def energy_bars(partitions: Partitions, width: int = BAR_WIDTH) -> Group:
    """One bar a rank partition; a full bar is all of the energy. "1-2   ████  41.0 %  5 clients"."""
    names = [rank_range(p.low, p.high) for p in partitions]
    longest = max(map(len, names), default=0)
    return Group(
        *(
            Text.assemble(
                f"{name:>{longest}}  ",
                (energy_bar(partition.energy_share, width), _colour(partition)),
                f"  {percent(partition.energy_share):>7}  {_owners(partition)}",
            )
            for name, partition in zip(names, partitions, strict=True)
        )
    )


def energy_bar(share: float, width: int) -> str:
    """A bar of exactly `width` cells; whatever is above zero shows at least a sliver."""
    if not math.isfinite(share):
        return " " * width
    cells = round(min(max(share, 0.0), 1.0) * width)
    drawn = _FULL * cells if cells or share <= 0 else _SLIVER
    return drawn.ljust(width)


def energy_comparison(left_title: str, left: Partitions, right_title: str, right: Partitions) -> Table:
    """Two methods' energies side by side, partition by partition; the two must have the same partitions."""
    table = _table(">ranks", left_title, ">", right_title, ">")
    for one, other in zip(left, right, strict=True):
        table.add_row(
            rank_range(one.low, one.high),
            Text(energy_bar(one.energy_share, _COMPARISON_WIDTH), style="green"),
            percent(one.energy_share),
            Text(energy_bar(other.energy_share, _COMPARISON_WIDTH), style="red"),
            percent(other.energy_share),
        )
    return table


def spectrum_line(summary: status_pb2.RoundSummary) -> Text:
    """How the energy is spread, in one line."""
    return Text(
        f"rho {summary.rho:.3f} (share within the smallest rank)  effective rank {summary.effective_rank:.1f}  "
        f"99 % of the energy in {counted(summary.rank_99, 'direction')}  "
        f"{percent(summary.energy_lost)} lost by truncation"
    )


def round_line(summary: status_pb2.RoundSummary, num_rounds: int) -> Text:
    """A finished round in one line."""
    width = len(str(num_rounds))
    name, value = headline(summary)
    return Text.assemble(
        (f"round {summary.round:>{width}}/{num_rounds}", "bold"),
        (f"  {name} ", "dim"),
        (value, "bold green"),
        ("  loss ", "dim"),
        eval_loss(summary),
        ("  rho ", "dim"),
        f"{summary.rho:.3f}",
        ("  effective rank ", "dim"),
        f"{summary.effective_rank:.1f}",
        ("  up ", "dim"),
        human_bytes(summary.bytes_received),
        ("  down ", "dim"),
        human_bytes(summary.bytes_sent),
        ("  in ", "dim"),
        human_seconds(summary.training_seconds + summary.aggregation_seconds + summary.evaluation_seconds),
    )


def joined_line(client: status_pb2.ClientSummary) -> Text:
    """A worker that has joined: name, rank, examples, what one download costs it."""
    granted = f"rank {client.lora_rank}"
    if client.max_rank != client.lora_rank:
        granted += f" of {client.max_rank}"
    return Text.assemble(
        (plain(client.client_id), "bold"),
        f" joined: {granted}, {counted(client.num_examples, 'example')}, ",
        f"adapter {human_bytes(client.slice_bytes)}, {plain(client.device) or 'unknown device'}",
    )


def traffic_line(status: status_pb2.FederationStatus) -> Text:
    """Who is here and what has moved since the coordinator started."""
    return Text(
        f"{status.clients_connected} of {counted(status.clients_known, 'client')} connected  "
        f"adapter bytes: up {human_bytes(status.bytes_received)}, down {human_bytes(status.bytes_sent)}  "
        f"coordinator {plain(status.software_version)} up {human_seconds(status.uptime_seconds)}"
    )


def rounds_table(summaries: Iterable[status_pb2.RoundSummary]) -> Table:
    """Finished rounds; contributors stand as ranks:clients, seconds as training + aggregation + evaluation."""
    table = _table(
        ">round", ">accuracy", ">loss", ">rho", ">effective rank", "contributors", ">up", ">down", ">seconds"
    )
    for summary in summaries:
        table.add_row(
            str(summary.round),
            headline(summary)[1],
            eval_loss(summary),
            f"{summary.rho:.3f}",
            f"{summary.effective_rank:.1f}",
            " ".join(f"{rank_range(p.low, p.high)}:{p.contributors}" for p in summary.partitions),
            human_bytes(summary.bytes_received),
            human_bytes(summary.bytes_sent),
            f"{summary.training_seconds:.1f} + {summary.aggregation_seconds:.1f} + {summary.evaluation_seconds:.1f}",
        )
    return table


def clients_table(clients: Iterable[status_pb2.ClientSummary]) -> RenderableType:
    """Every client that ever joined; where the screen is narrow, less of each."""
    return _ClientsTable(tuple(clients))


@dataclass(frozen=True)
class _ClientsTable:
    """As many columns as there is room for: why it has its rank becomes whose decision it was, then others go."""

    clients: tuple[status_pb2.ClientSummary, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        left_out: set[str] = set()
        for name in ("why this rank", "slice", "memory", "silent", "device", "largest"):
            table = self._without(left_out)
            if console.measure(table, options=options.update(width=_ANY_WIDTH)).minimum <= options.max_width:
                break
            left_out.add(name)
        else:
            table = self._without(left_out)
        yield table

    def _without(self, left_out: Container[str]) -> Table:
        rows = [_client_cells(client) for client in self.clients] or [_client_cells(status_pb2.ClientSummary())]
        shown = [name for name in rows[0] if name.removeprefix(">") not in left_out]
        if "why this rank" in shown:
            shown.remove("granted by")
        table = _table(*shown)
        longest_id = max((len(client.client_id) for client in self.clients), default=0)
        widths = {"client": min(longest_id, _ID_WIDTH), "why this rank": _REASON_WIDTH}
        for column in table.columns:
            column.min_width = widths.get(str(column.header))
            column.no_wrap = column.no_wrap or column.header in ("membership", "granted by")
        for cells in rows[: len(self.clients)]:
            table.add_row(*(cells[name] for name in shown))
        return table


def _client_cells(client: status_pb2.ClientSummary) -> Mapping[str, str | Text]:
    """One client's row, by heading."""
    return {
        "client": plain(client.client_id),
        ">rank": str(client.lora_rank),
        ">largest": str(client.max_rank),
        "membership": Text(plain(client.membership), style="green" if client.membership == "active" else "yellow"),
        ">examples": str(client.num_examples),
        ">rounds": str(client.rounds_contributed),
        "device": plain(client.device),
        ">memory": human_bytes(client.memory_bytes) if client.memory_bytes else NOTHING,
        ">slice": human_bytes(client.slice_bytes),
        ">silent": human_seconds(client.silent_seconds),
        "granted by": _granted_by(client.rank_reason),
        "why this rank": plain(client.rank_reason) or NOTHING,
        "last failure": Text(plain(client.last_failure), style="red"),
    }


def _granted_by(rank_reason: str) -> str:
    """Whose decision a rank was: the first word of the reason is the policy's."""
    if not rank_reason:
        return NOTHING
    word = plain(rank_reason).replace(":", " ").split()[0]
    return "operator" if word == "set" else word


def _table(*headings: str) -> Table:
    """An open table; a heading that begins with > is a column of numbers."""
    table = open_table()
    for heading in headings:
        numbers = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if numbers else "left", no_wrap=numbers)
    return table


def _activity(assignment: status_pb2.AssignmentStatus) -> str:
    match assignment.state:
        case status_pb2.ASSIGNMENT_STATE_WORKING:
            return plain(assignment.activity) or "working"
        case status_pb2.ASSIGNMENT_STATE_DONE:
            return "done"
        case status_pb2.ASSIGNMENT_STATE_FAILED:
            return f"failed ({counted(assignment.failures, 'time')})"
        case _:
            return "waiting"


def _steps(assignment: status_pb2.AssignmentStatus) -> str:
    if not assignment.total_steps:
        return ""
    drawn = energy_bar(assignment.step / assignment.total_steps, _STEPS_WIDTH)
    return f"{drawn.replace(' ', '░')} {assignment.step}/{assignment.total_steps}"


def _owners(partition: status_pb2.RankPartition) -> str:
    if partition.contributors:
        return counted(partition.contributors, "client")
    return f"nobody for {counted(partition.rounds_uncovered, 'round')}"


def _colour(partition: status_pb2.RankPartition) -> str:
    return "green" if partition.contributors else "yellow"
