"""How well the published adapters do: evaluations as means, which round's adapter is the best, and when to stop.

Pure. The federated score is that of the clients that train, each at its own rank; the central one is the evaluators'.
Both weight by the num_examples that were evaluated; nothing here ever weighs an update. docs/best-adapter.md tells it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import fsum, isfinite, isnan, nan

from coordinator.federation.state import Best, Evaluation, RoundRecord, Stopping

MAX_NAMES = 64  # of metrics that are reported: the names are the clients', who may tell others in every round
_SHOWN = 8  # names of metrics in a sentence


@dataclass(frozen=True)
class Score:
    """What some evaluations come to together."""

    clients: int
    num_examples: int
    metrics: Mapping[str, float]  # by name; each over those who told it, weighted by num_examples


@dataclass(frozen=True)
class Scores:
    """A round's evaluation; a part that nobody evaluated has no clients and no metrics.

    Of more than MAX_NAMES metrics those that most clients told are here, of equals the first by name.
    """

    federated: Score
    by_rank: tuple[tuple[int, Score], ...]  # the federated score of each rank, ascending
    central: Score


def scores_of(record: RoundRecord) -> Scores:
    """What the evaluation of a round came to."""
    own: list[Evaluation] = []
    central: list[Evaluation] = []
    by_rank: dict[int, list[Evaluation]] = defaultdict(list)
    for _, rank, result in record.evaluations:
        if result.is_central:
            central.append(result)
        else:
            own.append(result)
            by_rank[rank].append(result)
    names = _reported(own)
    return Scores(
        federated=_score(own, names),
        by_rank=tuple((rank, _score(by_rank[rank], names)) for rank in sorted(by_rank)),
        central=_score(central, _reported(central)),  # apart: who trains must not crowd the evaluators' names out
    )


def counted_value(record: RoundRecord, stopping: Stopping) -> float:
    """The metric that counts; NaN if nobody whose metrics count told it."""
    told = ((e.metrics.get(stopping.metric, nan), e.num_examples) for e in _counting(record, stopping))
    mean = _mean([pair for pair in told if isfinite(pair[0])])
    return mean if isfinite(mean) else nan


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
    counting = _counting(record, stopping)
    if not counting and stopping.is_central:
        return "evaluation.source is central, but no evaluator took part"
    if not counting:
        return "evaluation.source is federated, but only evaluators took part"
    names = sorted(_reported(counting))
    told = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"evaluation.metric {stopping.metric!r} was not among {told or '(no metric at all)'}"


def _counting(record: RoundRecord, stopping: Stopping) -> list[Evaluation]:
    return [result for _, _, result in record.evaluations if result.is_central == stopping.is_central]


def _counts_alike(best: Best, stopping: Stopping) -> bool:
    """Whether values of today can be held against the best one: the operator may have changed what counts."""
    asked = (stopping.metric, stopping.is_larger_better, stopping.is_central)
    return (best.metric, best.is_larger_better, best.is_central) == asked


def _is_better(value: float, best: float, stopping: Stopping) -> bool:
    gain = value - best if stopping.is_larger_better else best - value
    return gain > stopping.min_delta


def _reported(evaluations: Sequence[Evaluation]) -> Set[str]:
    """The names that a report has room for."""
    told = Counter(name for e in evaluations for name, value in e.metrics.items() if isfinite(value))
    return set(sorted(told, key=lambda name: (-told[name], name))[:MAX_NAMES])


def _score(evaluations: Sequence[Evaluation], names: Set[str]) -> Score:
    told: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for evaluation in evaluations:
        for name, value in evaluation.metrics.items():
            if name in names and isfinite(value):
                told[name].append((value, evaluation.num_examples))
    means = {name: _mean(told[name]) for name in sorted(told)}
    return Score(
        clients=len(evaluations),
        num_examples=sum(evaluation.num_examples for evaluation in evaluations),
        metrics={name: mean for name, mean in means.items() if isfinite(mean)},
    )


def _mean(told: Sequence[tuple[float, int]]) -> float:
    """Of values with the num_examples that they weigh; NaN of none."""
    total = sum(num_examples for _, num_examples in told)
    # Exact before it is rounded once: the order of the clients' names must not decide which of two rounds is better.
    return fsum(value * num_examples for value, num_examples in told) / total if total else nan
