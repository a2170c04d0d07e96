"""Which runs an experiment consists of. Pure: settings and rows in, plans out; nothing here trains.

Stage "same": every arm with every seed at the experiment's own rate and schedule. With a [tuning] section every arm
first runs the same grid on seeds of its own (stage "tuning"); what does best on the clients' validation parts is the
arm's choice, and every arm runs with every seed at its choice (stage "best"). Test examples never choose.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from common.errors import ConfigError
from coordinator.aggregation.methods import make_method
from simulation.experiment import Arm, ExperimentConfig
from simulation.results import Results, RunKey

SAME, TUNING, BEST = "same", "tuning", "best"
FINISHED = "finished"


@dataclass(frozen=True)
class RunPlan:
    """One federation that is to be run."""

    key: RunKey
    arm: Arm
    experiment: ExperimentConfig  # as this arm sees it, with the rate and schedule of the key


@dataclass(frozen=True)
class Choice:
    """The rate and schedule at which an arm did best on the validation parts."""

    arm: str
    learning_rate: float
    decay: str
    validation_accuracy: float  # mean over the tuning seeds
    at_the_edge: bool  # of the grid: a wider one might have found better


def first_plans(experiment: ExperimentConfig) -> tuple[RunPlan, ...]:
    """What can run without knowing any result: the stages "same" and "tuning". Seeds turn slowest.

    Raises ConfigError for seeds or rates that would be run twice, for tuning on a seed that is reported, and for an
    arm that cannot be run.
    """
    check_seeds(experiment)
    check_arms(experiment)
    plans = [_same(experiment, arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    plans += [
        _plan(experiment, arm, RunKey(TUNING, arm.name, rate, decay, seed))
        for seed in experiment.tuning.seeds
        for arm in experiment.arms
        for decay in experiment.tuning.decays
        for rate in experiment.tuning.learning_rates
    ]
    return tuple(plans)


def check_seeds(experiment: ExperimentConfig) -> None:
    """Raises ConfigError for a seed, rate or schedule that is named twice: the same run is no second observation."""
    tuning = experiment.tuning
    named: tuple[tuple[str, Sequence[object]], ...] = (
        ("seeds", experiment.seeds),
        ("tuning.seeds", tuning.seeds),
        ("tuning.learning_rates", tuning.learning_rates),
        ("tuning.decays", tuning.decays),
    )
    for key, values in named:
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise ConfigError(f"{key}: {twice[0]} is named twice, and the same run again shows nothing new")
    both = sorted(set(experiment.seeds) & set(tuning.seeds)) if tuning.learning_rates else []
    if both:
        raise ConfigError(
            f"seed {both[0]} is both in seeds and in tuning.seeds: what is reported must not have been tuned on"
        )


def check_arms(experiment: ExperimentConfig) -> None:
    """Raises ConfigError for an arm whose method or settings do not exist, or that has nothing to be tuned on."""
    for arm in experiment.arms:
        try:
            make_method(arm.options)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None
        if experiment.tuning.learning_rates and experiment.for_arm(arm).data.validation == 0.0:
            raise ConfigError("tuning is judged on the clients' validation parts: set data.validation above 0")


def choices_of(experiment: ExperimentConfig, results: Results) -> tuple[Choice, ...]:
    """Each arm's choice; an arm is missing while runs of its grid are, for a choice among fewer is no even tuning."""
    scores = _scores(results)
    grid: list[tuple[float, str]] = [
        (rate, decay) for decay in experiment.tuning.decays for rate in experiment.tuning.learning_rates
    ]
    chosen = []
    for arm in experiment.arms:
        found = {at: _seed_scores(scores, arm.name, at, experiment.tuning.seeds) for at in grid}
        if grid and all(found.values()):
            chosen.append(_choice(arm.name, found))
    return tuple(chosen)


def best_plans(experiment: ExperimentConfig, choices: Iterable[Choice]) -> tuple[RunPlan, ...]:
    """The stage "best", also those runs that equal one of "same"; see `twin_of`."""
    arms = {arm.name: arm for arm in experiment.arms}
    return tuple(
        _plan(experiment, arms[each.arm], RunKey(BEST, each.arm, each.learning_rate, each.decay, seed))
        for seed in experiment.seeds
        for each in choices
    )


def twin_of(plan: RunPlan, plans: Iterable[RunPlan]) -> RunPlan | None:
    """The run of stage "same" among the plans that a "best" one would only repeat."""
    same = replace(plan.key, stage=SAME)
    return next((other for other in plans if plan.key.stage == BEST and other.key == same), None)


def _same(experiment: ExperimentConfig, arm: Arm, seed: int) -> RunPlan:
    training = experiment.for_arm(arm).training
    return _plan(experiment, arm, RunKey(SAME, arm.name, training.learning_rate, training.decay, seed))


def _plan(experiment: ExperimentConfig, arm: Arm, key: RunKey) -> RunPlan:
    seen = experiment.for_arm(arm)
    training = seen.training.model_copy(update={"learning_rate": key.learning_rate, "decay": key.decay})
    return RunPlan(key, arm, seen.model_copy(update={"training": training}))


Score = float  # validation accuracy; minus infinity for a run that did not finish


def _scores(results: Results) -> Mapping[RunKey, Score]:
    """The validation accuracy of every tuning run after its last round at the global rank."""
    last: dict[RunKey, float] = {}
    runs = {run.key: run for run in results.runs if run.key.stage == TUNING}
    for row in results.accuracy:
        run = runs.get(row.key)
        if run and row.split == "validation" and row.rank == run.global_rank and row.round == run.rounds:
            last[row.key] = row.accuracy
    lost = -math.inf
    return {key: last.get(key, lost) if run.status == FINISHED else lost for key, run in runs.items()}


def _seed_scores(
    scores: Mapping[RunKey, Score], arm: str, at: tuple[float, str], seeds: Sequence[int]
) -> tuple[Score, ...]:
    """One score a seed; empty if one is missing."""
    keys = [RunKey(TUNING, arm, *at, seed) for seed in seeds]
    return tuple(scores[key] for key in keys) if all(key in scores for key in keys) else ()


def _choice(arm: str, found: Mapping[tuple[float, str], tuple[Score, ...]]) -> Choice:
    means = {at: fmean(scores) for at, scores in found.items()}
    # The smaller rate wins a tie, and also where everything diverged.
    at = max(means, key=lambda each: (means[each], -each[0]))
    rates = sorted({rate for rate, _ in found})
    at_the_edge = len(rates) > 1 and at[0] in (rates[0], rates[-1])
    return Choice(arm, *at, means[at], at_the_edge)
