"""How well the adapter does, as a person sees it: federated, by rank, central, and which round was the best.

Pure functions from status messages to rich renderables; everything fits 80 columns.
"""

from collections.abc import Iterable, Mapping, Sequence

from raflora.v1 import status_pb2
from rich.table import Table
from rich.text import Text

from cli.tables import open_table
from cli.words import NOTHING, counted, decimals, percent, plain

_SHARES = frozenset({"accuracy", "accuracy_norm", "exact_match", "token_accuracy"})  # between 0 and 1
_HEADLINES = ("accuracy", "exact_match")  # the first of them that was measured
_LOSS = "eval_loss"
_MOST_LEVELS = 8  # of ranks in one line


def headline(summary: status_pb2.RoundSummary) -> tuple[str, str]:
    """The name and the value of the share of right answers that the clients measured; "-" if they measured none."""
    if not summary.federated_metrics:  # of a coordinator that does not tell them
        is_measured = any(not evaluation.central for evaluation in summary.evaluations)
        return "accuracy", percent(summary.accuracy) if is_measured else NOTHING
    name = _share_in(summary.federated_metrics) or "accuracy"
    return name, value_of(summary.federated_metrics, name)


def eval_loss(summary: status_pb2.RoundSummary) -> str:
    """The clients' loss; "-" if they measured none."""
    if not summary.federated_metrics:
        is_measured = any(not evaluation.central for evaluation in summary.evaluations)
        return decimals(summary.eval_loss) if is_measured else NOTHING
    return value_of(summary.federated_metrics, _LOSS)


def value_of(metrics: Mapping[str, float], name: str) -> str:
    """One metric as people read it, wherever they do: a share in percent, else decimals; "-" if it was not measured."""
    if name not in metrics:
        return NOTHING
    return percent(metrics[name]) if name in _SHARES else decimals(metrics[name])


def evaluation_lines(summary: status_pb2.RoundSummary) -> list[Text]:
    """What the round's line does not say: each rank's score if there are several, and the evaluators'."""
    lines = []
    if len(summary.rank_levels) > 1:
        name = _common_name(summary.rank_levels)
        more = ", ..." if len(summary.rank_levels) > _MOST_LEVELS else ""
        lines.append(Text.assemble((f"{name} by rank  ", "dim"), _levels(summary.rank_levels, name) + more))
    if summary.central_metrics:
        lines.append(central_line(summary))
    return lines


def central_line(summary: status_pb2.RoundSummary) -> Text:
    """What the evaluators measured."""
    return Text.assemble(("central  ", "dim"), _all_of(summary.central_metrics))


def best_line(status: status_pb2.FederationStatus) -> Text:
    """Which adapter is the best so far, in what, and how long the federation goes on without a better one."""
    best = status.best
    metric = plain(best.metric)
    value = value_of({metric: best.value}, metric)
    since = f"{counted(best.evaluations_since, 'evaluation')} since"
    left = f"{best.evaluations_since} of {best.patience} without a better one" if best.patience else since
    return Text.assemble(
        ("best  ", "dim"),
        (f"round {best.round}", "bold"),
        f", {plain(best.source)} {metric} ",
        (value, "bold green"),
        f", {left}",
    )


def evaluations_table(summaries: Iterable[status_pb2.RoundSummary]) -> Table | None:
    """A row for every evaluated round; None if no round has more to say than the table of rounds."""
    evaluated = [summary for summary in summaries if summary.evaluations]
    if not any(len(s.rank_levels) > 1 or s.central_metrics for s in evaluated):
        return None
    table = open_table()
    for heading in ("evaluated", "federated", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("by rank", "central"):
        table.add_column(heading)
    for summary in evaluated:
        name = _common_name(summary.rank_levels)
        table.add_row(
            str(summary.round),
            headline(summary)[1],
            eval_loss(summary),
            _levels(summary.rank_levels, name) or NOTHING,
            _all_of(summary.central_metrics) or NOTHING,
        )
    return table


def _common_name(levels: Sequence[status_pb2.RankLevelSummary]) -> str:
    """What the ranks are compared in: a share of right answers if one was measured, else the loss."""
    told = {name for level in levels for name in level.metrics}
    return next((name for name in _HEADLINES if name in told), _LOSS)


def _levels(levels: Sequence[status_pb2.RankLevelSummary], name: str) -> str:
    shown = levels[:_MOST_LEVELS]
    return ", ".join(f"{level.lora_rank}: {value_of(level.metrics, name)}" for level in shown)


def _all_of(metrics: Mapping[str, float]) -> str:
    """The share of right answers and the loss; whatever else there is if there is neither."""
    names = [name for name in (_share_in(metrics), _LOSS) if name in metrics] or sorted(metrics)[:2]
    return ", ".join(f"{plain(name)} {value_of(metrics, name)}" for name in names)


def _share_in(metrics: Mapping[str, float]) -> str:
    return next((name for name in _HEADLINES if name in metrics), "")
