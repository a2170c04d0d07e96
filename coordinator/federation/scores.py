"""How well the published adapters do: evaluations as means, which round's adapter is the best, and when to stop.

Pure. The federated score is that of the clients that train, each at its own rank; the central one is the evaluators'.
Both weight by the num_examples that were evaluated; nothing here ever weighs an update. docs/best-adapter.md tells it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum, isfinite, isnan, nan

from coordinator.federation.state import Best, Evaluation, RoundRecord, Stopping

_SHOWN = 8  # names of metrics in a sentence


@dataclass(frozen=True)
class Score:
    """What some evaluations come to together."""

    clients: int
    num_examples: int
    metrics: Mapping[str, float]  # by name; each over those who told it, weighted by num_examples


@dataclass(frozen=True)
class Scores:
    """A round's evaluation; a part that nobody evaluated has no clients and no metrics."""

    federated: Score
    by_rank: tuple[tuple[int, Score], ...]  # the federated score of each rank, ascending
    central: Score


def scores_of(record: RoundRecord) -> Scores:
    """What the evaluation of a round came to."""
    own = [(rank, result) for _, rank, result in record.evaluations if not result.is_central]
    return Scores(
        federated=_score(result for _, result in own),
        by_rank=tuple((level, _score(e for rank, e in own if rank == level)) for level in sorted({r for r, _ in own})),
        central=_score(result for _, _, result in record.evaluations if result.is_central),
    )


def counted_value(record: RoundRecord, stopping: Stopping) -> float:
    """The metric that counts; NaN if nobody whose metrics count told it."""
    return _counted(record, stopping).metrics.get(stopping.metric, nan)


def best_after(best: Best | None, record: RoundRecord, stopping: Stopping) -> Best | None:
    """The best adapter once this round is evaluated. The earlier of two that are equal stays; NaN changes nothing."""
    value = counted_value(record, stopping)
    if isnan(value):
        return best
    if best is not None and _counts_alike(best, stopping) and not _is_better(value, best.value, stopping):
        return replace(best, evaluations_since=best.evaluations_since + 1)
    return Best(
        round=record.number,
        adapter_digest=record.adapter_digest,
        value=value,
        metric=stopping.metric,
        is_larger_better=stopping.is_larger_better,
        is_central=stopping.is_central,
    )


def reason_to_stop(best: Best | None, stopping: Stopping) -> str:
    """Why further rounds are not worth it, in a sentence; empty as long as they are."""
    if best is None or not _counts_alike(best, stopping) or not 0 < stopping.patience <= best.evaluations_since:
        return ""
    noun = "evaluation" if best.evaluations_since == 1 else "evaluations"
    return (
        f"no improvement of {best.metric} for {best.evaluations_since} {noun}; "
        f"best {best.value:.4g} in round {best.round}"
    )


def reason_not_counted(record: RoundRecord, stopping: Stopping) -> str:
    """Why an evaluation that took place does not count, in a sentence; empty if it does, or if nobody evaluated."""
    if not stopping.metric or not record.evaluations or not isnan(counted_value(record, stopping)):
        return ""
    counted = _counted(record, stopping)
    if not counted.clients and stopping.is_central:
        return "evaluation.source is central, but no evaluator took part"
    if not counted.clients:
        return "evaluation.source is federated, but only evaluators took part"
    names = sorted(counted.metrics)
    told = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"evaluation.metric {stopping.metric!r} was not among {told or '(no metric at all)'}"


def _counted(record: RoundRecord, stopping: Stopping) -> Score:
    return _score(result for _, _, result in record.evaluations if result.is_central == stopping.is_central)


def _counts_alike(best: Best, stopping: Stopping) -> bool:
    """Whether values of today can be held against the best one: the operator may have changed what counts."""
    asked = (stopping.metric, stopping.is_larger_better, stopping.is_central)
    return (best.metric, best.is_larger_better, best.is_central) == asked


def _is_better(value: float, best: float, stopping: Stopping) -> bool:
    gain = value - best if stopping.is_larger_better else best - value
    return gain > stopping.min_delta


def _score(evaluations: Iterable[Evaluation]) -> Score:
    results = tuple(evaluations)
    names = sorted({name for result in results for name in result.metrics})
    means = {name: _mean(name, results) for name in names}
    return Score(
        clients=len(results),
        num_examples=sum(result.num_examples for result in results),
        metrics={name: mean for name, mean in means.items() if isfinite(mean)},
    )


def _mean(name: str, results: Iterable[Evaluation]) -> float:
    told = [(e.metrics[name], e.num_examples) for e in results if isfinite(e.metrics.get(name, nan))]
    total = sum(num_examples for _, num_examples in told)
    # Exact before it is rounded once: the order of the clients' names must not decide which of two rounds is better.
    return fsum(value * num_examples for value, num_examples in told) / total if total else nan
