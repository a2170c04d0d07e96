"""From tidy rows to what a table shows: per arm and stage means with their spread over seeds. Pure.

A mean is taken over the finished runs; how many did not finish always stands beside it. Accuracies are of the test
split after the last round, never of an earlier one. Nothing here rounds, formats or draws.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from coordinator.aggregation.method import MethodOptions
from coordinator.warnings import runs_away
from simulation.experiment import Arm, ExperimentConfig
from simulation.population import rank_counts
from simulation.results import PartitionRow, Results, RoundRow, RunKey, RunRow
from simulation.schedule import BEST, FINISHED, SAME

EARLY_ROUNDS = (1, 12)  # at which the energy is reported beside the last round's
NOT_MEASURED = "diverged: the last evaluation was not finite"
MIN_SEEDS = 3  # fewer never make a difference clear

# Student's t, two-sided at 95 %, by degrees of freedom; between two entries the one before, which is the stricter.
_STUDENT_95: Mapping[int, float] = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228},
    **{12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980},
}


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

    @property
    def margin(self) -> float:
        """Half the width of Student's 95 % interval of the mean; infinite for fewer than three seeds."""
        if self.n < MIN_SEEDS:
            return math.inf
        degrees = self.n - 1
        return _STUDENT_95[max(known for known in _STUDENT_95 if known <= degrees)] * self.standard_error

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside Student's 95 % interval of the mean."""
        return abs(self.mean) > self.margin

    def is_within(self, bound: float) -> bool:
        """Whether that interval lies between minus and plus the bound."""
        return abs(self.mean) + self.margin < bound


@dataclass(frozen=True)
class Census:
    """What an experiment's settings say of an arm."""

    set: str = ""  # its own settings in words; empty: the experiment's. Only arms with equal ones are rivals
    clients_of_rank: Mapping[int, int] | None = None  # None: the experiment is not known
    is_plain: bool = True  # the method with all its options at their defaults


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
    census: Census
    finished: int  # runs
    lost: tuple[str, ...]  # one reason a run that did not finish: "diverged: ..." or "stopped: ..."
    accuracy: Spread  # of the global adapter at its full rank
    own_ranks: Spread  # mean over all clients of the accuracy of the slice that each receives
    own_ranks_of_seed: Mapping[int, float]
    accuracy_at_rank: Mapping[int, Spread]
    slice_of_seed: Mapping[int, Mapping[int, float]]  # [rank][seed], what accuracy_at_rank sums up
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

    @property
    def level(self) -> int:
        """The one rank that all clients have; 0 for several. Methods are rivals only at equal levels."""
        return self.global_rank if self.is_reference else 0

    @property
    def diverged(self) -> int:
        """Runs whose numbers were finite no more."""
        return sum(reason.startswith("diverged") for reason in self.lost)


@dataclass(frozen=True)
class Difference:
    """An arm's accuracy less another's, seed by seed."""

    arm: str
    baseline: str
    difference: Spread  # as a share: 0.01 is one point
    wins: int  # seeds in which the arm is above
    at_own_ranks: Spread  # the same of the accuracies at the clients' own ranks

    @property
    def is_clear(self) -> bool:
        """Whether Student's 95 % interval of the paired differences leaves out zero, over at least three seeds."""
        return self.difference.is_clear


def spread_of(values: Iterable[float]) -> Spread:
    """Mean and standard deviation; what is not finite was not measured."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return Spread(math.nan, math.nan, 0)
    return Spread(fmean(found), stdev(found) if len(found) > 1 else math.nan, len(found))


def summarise(results: Results, experiment: ExperimentConfig | None = None) -> tuple[ArmSummary, ...]:
    """One summary for each arm of the stages "same" and "best", in the experiment's order; others follow as they came.

    Without an experiment all arms count as of one setting, and accuracies at the clients' own ranks are not known.
    """
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for run in results.runs:
        if run.key.stage in (SAME, BEST):
            groups.setdefault((run.key.stage, run.key.arm), []).append(run)
    arms = {arm.name: arm for arm in experiment.arms} if experiment else {}
    order = {arm: index for index, arm in enumerate(arms)}
    ordered = sorted(groups, key=lambda at: (at[0] != SAME, order.get(at[1], len(order))))
    census = {name: _census(experiment, arm) for name, arm in arms.items()} if experiment else {}
    views = _views(results)
    return tuple(_summary([(run, views[run.key]) for run in groups[at]], census.get(at[1], Census())) for at in ordered)


def differences(summaries: Sequence[ArmSummary], baseline: str) -> tuple[Difference, ...]:
    """Every other arm against the baseline, over the seeds that both finished; the summaries are of one stage."""
    base = next(each for each in summaries if each.arm == baseline)
    return tuple(difference(other, base) for other in summaries if other.arm != baseline)


def difference(arm: ArmSummary, base: ArmSummary) -> Difference:
    """The one less the other, over the seeds that both finished."""
    gaps = _paired(arm.accuracy_of_seed, base.accuracy_of_seed)
    own = _paired(arm.own_ranks_of_seed, base.own_ranks_of_seed)
    return Difference(arm.arm, base.arm, spread_of(gaps), sum(gap > 0 for gap in gaps), spread_of(own))


def difference_at_rank(arm: ArmSummary, base: ArmSummary, rank: int) -> Spread:
    """The same for the slices of one rank."""
    return spread_of(_paired(arm.slice_of_seed.get(rank, {}), base.slice_of_seed.get(rank, {})))


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]


def rivals_of(summaries: Sequence[ArmSummary]) -> tuple[ArmSummary, ...]:
    """Who may lead among arms of one setting: several ranks, measured, and no run lost."""
    return tuple(each for each in summaries if not each.is_reference and each.accuracy.n and not each.lost)


def energy_above(partitions: Iterable[PartitionRow], smallest_rank: int) -> float:
    """The share of one round's energy above the smallest rank; from the partitions, which keep what 1 - rho rounds."""
    return math.fsum(row.energy_share for row in partitions if row.low >= smallest_rank)


def is_running_away(rounds: Sequence[RoundRow]) -> bool:
    """Whether a coordinator would at any round have said that the global adapter seems to diverge.

    Such a run may still finish; healthy ones grow by a third to a half in ten rounds, with a falling loss.
    """
    norms, losses = [row.norm for row in rounds], [row.train_loss for row in rounds]
    return any(runs_away(norms[:end], losses[:end]) for end in range(1, len(rounds) + 1))


@dataclass
class _View:
    """One run's rows, gathered in one pass over all of them."""

    rounds: list[RoundRow]
    above: dict[int, list[PartitionRow]]
    test: dict[int, dict[int, float]]  # [round][rank]

    def final(self, run: RunRow) -> Mapping[int, float]:
        """After the run's last round; empty if that was not evaluated, whatever was before."""
        return self.test.get(run.rounds, {})


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


def _census(experiment: ExperimentConfig, arm: Arm) -> Census:
    clients = experiment.for_arm(arm).clients
    clients_of_rank: dict[int, int] = {}
    for rank, count in zip(clients.ranks, rank_counts(clients.ranks, clients.rank_weights, clients.count), strict=True):
        clients_of_rank[rank] = clients_of_rank.get(rank, 0) + count
    words = ", ".join(f"{key} = {value}" for key, value in sorted(arm.set.items()))
    return Census(words, clients_of_rank, arm.options == MethodOptions(arm.method))


def _summary(runs: Sequence[tuple[RunRow, _View]], census: Census) -> ArmSummary:
    first = runs[0][0]
    finished = [(run, view) for run, view in runs if run.status == FINISHED and run.global_rank in view.final(run)]
    last = [view.rounds[-1] for _, view in finished if view.rounds]
    ranks = sorted({rank for run, view in finished for rank in view.final(run)})
    full_rank = {run.key.seed: view.final(run)[run.global_rank] for run, view in finished}
    slices = {
        rank: {run.key.seed: view.final(run)[rank] for run, view in finished if rank in view.final(run)}
        for rank in ranks
    }
    own_ranks = {run.key.seed: _at_own_ranks(view.final(run), census.clients_of_rank) for run, view in finished}
    own_ranks = {seed: accuracy for seed, accuracy in own_ranks.items() if math.isfinite(accuracy)}
    return ArmSummary(
        stage=first.key.stage,
        arm=first.key.arm,
        method=first.method,
        learning_rate=first.key.learning_rate,
        decay=first.key.decay,
        smallest_rank=first.smallest_rank,
        global_rank=first.global_rank,
        census=census,
        finished=len(finished),
        lost=tuple(_why(run) for run, view in runs if (run, view) not in finished),
        accuracy=spread_of(full_rank.values()),
        own_ranks=spread_of(own_ranks.values()),
        own_ranks_of_seed=own_ranks,
        accuracy_at_rank={rank: spread_of(of_seed.values()) for rank, of_seed in slices.items()},
        slice_of_seed=slices,
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


def _why(run: RunRow) -> str:
    return NOT_MEASURED if run.status == FINISHED else run.status


def _at_own_ranks(final: Mapping[int, float], clients_of_rank: Mapping[int, int] | None) -> float:
    """The mean over all clients; nan if a rank that somebody has was not evaluated."""
    held = {rank: count for rank, count in (clients_of_rank or {}).items() if count}
    if not held or not set(held) <= set(final):
        return math.nan
    return sum(count * final[rank] for rank, count in held.items()) / sum(held.values())


def _energies(finished: Sequence[tuple[RunRow, _View]]) -> Mapping[int, Spread]:
    num_rounds = max((run.rounds for run, _ in finished), default=0)
    wanted = sorted({number for number in (*EARLY_ROUNDS, num_rounds) if 1 <= number <= num_rounds})
    return {
        number: spread_of(
            energy_above(view.above[number], run.smallest_rank) for run, view in finished if number in view.above
        )
        for number in wanted
    }
