"""From tidy rows to what a table shows: per arm and stage means with their spread over seeds. Pure.

A mean is taken over the finished runs; how many diverged always stands beside it. Accuracies are of the test split
after the last round. Nothing here rounds, formats or draws.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from simulation.results import PartitionRow, Results, RoundRow, RunKey, RunRow
from simulation.schedule import BEST, FINISHED, SAME

EARLY_ROUNDS = (1, 12)  # at which the energy is reported beside the last round's
_WINDOW = 10  # rounds; the first ones do not count, for every norm grows from nothing
_SMOOTHED = 3  # rounds of training loss: each round has another cohort


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; nan where nothing was measured."""

    mean: float
    sd: float  # of a single seed, n - 1 in the denominator; nan for fewer than two
    n: int

    @property
    def standard_error(self) -> float:
        """Of the mean, from the seeds alone: the test sample's own error is not in it."""
        return self.sd / math.sqrt(self.n) if self.n else math.nan


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one stage."""

    stage: str
    arm: str
    method: str
    learning_rate: float
    decay: str
    smallest_rank: int
    global_rank: int
    finished: int  # runs
    diverged: tuple[str, ...]  # one reason a run that did not finish
    accuracy: Spread  # of the global adapter at its full rank
    accuracy_at_rank: Mapping[int, Spread]
    accuracy_of_seed: Mapping[int, float]
    rho: Spread
    effective_rank: Spread
    energy_above: Mapping[int, Spread]  # share above the smallest rank; the rounds 1, 12 and the last
    rounds: int
    norm: Spread  # of the last global update
    running_away: int  # finished runs whose norm kept doubling while the loss rose
    download_bytes: float  # mean over finished runs
    upload_bytes: float
    seconds: float

    @property
    def is_reference(self) -> bool:
        """Whether all clients have the same rank."""
        return self.smallest_rank == self.global_rank


@dataclass(frozen=True)
class Difference:
    """An arm's accuracy less another's, seed by seed."""

    arm: str
    baseline: str
    difference: Spread  # as a share: 0.01 is one point
    wins: int  # seeds in which the arm is above

    @property
    def is_clear(self) -> bool:
        """Whether the mean is more than two of its standard errors from zero, over at least three seeds."""
        spread = self.difference
        return spread.n >= 3 and abs(spread.mean) > 2 * spread.standard_error


def spread_of(values: Iterable[float]) -> Spread:
    """Mean and standard deviation; what is not finite was not measured."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return Spread(math.nan, math.nan, 0)
    return Spread(fmean(found), stdev(found) if len(found) > 1 else math.nan, len(found))


def summarise(results: Results, arms: Sequence[str] = ()) -> tuple[ArmSummary, ...]:
    """One summary for each arm of the stages "same" and "best", in this order of arms; others follow as they came."""
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for run in results.runs:
        if run.key.stage in (SAME, BEST):
            groups.setdefault((run.key.stage, run.key.arm), []).append(run)
    order = {arm: index for index, arm in enumerate(arms)}
    ordered = sorted(groups, key=lambda at: (at[0] != SAME, order.get(at[1], len(order))))
    views = _views(results)
    return tuple(_summary([(run, views[run.key]) for run in groups[at]]) for at in ordered)


def differences(summaries: Sequence[ArmSummary], baseline: str) -> tuple[Difference, ...]:
    """Every other arm against the baseline, over the seeds that both finished; the summaries are of one stage."""
    base = next(each for each in summaries if each.arm == baseline)
    found = []
    for other in summaries:
        if other.arm != baseline:
            seeds = sorted(set(other.accuracy_of_seed) & set(base.accuracy_of_seed))
            gaps = [other.accuracy_of_seed[seed] - base.accuracy_of_seed[seed] for seed in seeds]
            found.append(Difference(other.arm, baseline, spread_of(gaps), sum(gap > 0 for gap in gaps)))
    return tuple(found)


def default_baseline(summaries: Sequence[ArmSummary]) -> str:
    """The rank-agnostic average (FlexLoRA) where it is among the arms, or else the first arm."""
    flexlora = [each.arm for each in summaries if each.method == "flexlora" and not each.is_reference]
    return (flexlora or [summaries[0].arm])[0]


def energy_above(partitions: Iterable[PartitionRow], smallest_rank: int) -> float:
    """The share of one round's energy above the smallest rank; from the partitions, which keep what 1 - rho rounds."""
    return math.fsum(row.energy_share for row in partitions if row.low >= smallest_rank)


def is_running_away(rounds: Sequence[RoundRow]) -> bool:
    """Whether the norm more than doubled within ten rounds, after the first ten, while the training loss rose.

    Such a run may still finish; healthy ones grow by a third to a half in ten rounds, with a falling loss.
    """
    losses = [fmean(row.train_loss for row in rounds[max(0, i - _SMOOTHED + 1) : i + 1]) for i in range(len(rounds))]
    return any(
        rounds[i].norm > 2 * rounds[i - _WINDOW].norm and losses[i] > losses[i - _WINDOW]
        for i in range(2 * _WINDOW - 1, len(rounds))
    )


@dataclass
class _View:
    """One run's rows, gathered in one pass over all of them."""

    rounds: list[RoundRow]
    above: dict[int, list[PartitionRow]]
    test: dict[int, dict[int, float]]  # [round][rank]

    @property
    def final(self) -> Mapping[int, float]:
        return self.test[max(self.test)] if self.test else {}


def _views(results: Results) -> Mapping[RunKey, _View]:
    views = {run.key: _View([], {}, {}) for run in results.runs}
    for round_row in results.rounds:
        if round_row.key in views:
            views[round_row.key].rounds.append(round_row)
    for partition in results.partitions:
        if partition.key in views:
            views[partition.key].above.setdefault(partition.round, []).append(partition)
    for accuracy in results.accuracy:
        if accuracy.key in views and accuracy.split == "test":
            views[accuracy.key].test.setdefault(accuracy.round, {})[accuracy.rank] = accuracy.accuracy
    for view in views.values():
        view.rounds.sort(key=lambda row: row.round)
    return views


def _summary(runs: Sequence[tuple[RunRow, _View]]) -> ArmSummary:
    first = runs[0][0]
    finished = [(run, view) for run, view in runs if run.status == FINISHED]
    last = [view.rounds[-1] for _, view in finished if view.rounds]
    ranks = sorted({rank for _, view in finished for rank in view.final})
    full_rank = {run.key.seed: view.final[run.global_rank] for run, view in finished if run.global_rank in view.final}
    return ArmSummary(
        stage=first.key.stage,
        arm=first.key.arm,
        method=first.method,
        learning_rate=first.key.learning_rate,
        decay=first.key.decay,
        smallest_rank=first.smallest_rank,
        global_rank=first.global_rank,
        finished=len(finished),
        diverged=tuple(run.status for run, _ in runs if run.status != FINISHED),
        accuracy=spread_of(full_rank.values()),
        accuracy_at_rank={
            rank: spread_of(view.final[rank] for _, view in finished if rank in view.final) for rank in ranks
        },
        accuracy_of_seed=full_rank,
        rho=spread_of(row.rho for row in last),
        effective_rank=spread_of(row.effective_rank for row in last),
        energy_above=_energies(finished),
        rounds=max((run.rounds for run, _ in runs), default=0),
        norm=spread_of(row.norm for row in last),
        running_away=sum(is_running_away(view.rounds) for _, view in finished),
        download_bytes=spread_of(run.download_bytes for run, _ in finished).mean,
        upload_bytes=spread_of(run.upload_bytes for run, _ in finished).mean,
        seconds=spread_of(run.seconds for run, _ in finished).mean,
    )


def _energies(finished: Sequence[tuple[RunRow, _View]]) -> Mapping[int, Spread]:
    num_rounds = max((run.rounds for run, _ in finished), default=0)
    wanted = sorted({number for number in (*EARLY_ROUNDS, num_rounds) if 1 <= number <= num_rounds})
    return {
        number: spread_of(
            energy_above(view.above[number], run.smallest_rank) for run, view in finished if number in view.above
        )
        for number in wanted
    }
