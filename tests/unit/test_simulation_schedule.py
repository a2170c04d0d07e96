"""Which runs an experiment consists of, and how each arm chooses its rate."""

import pytest
from simulated_rows import accuracy_row, run_row

from simulation.experiment import ExperimentConfig
from simulation.results import Results, RunKey
from simulation.schedule import Choice, best_plans, choices_of, first_plans, twin_of

FIXED = {
    "name": "tiny",
    "seeds": [0, 1],
    "model": {"path": "digits", "task": "image-classification"},
    "data": {"train": "digits", "test": "digits"},
    "clients": {"count": 4, "ranks": [2, 4], "per_round": 2},
    "rounds": {"num_rounds": 3},
    "training": {"learning_rate": 0.01},
}


def experiment(**changes: object) -> ExperimentConfig:
    arms = [{"name": "ours"}, {"name": "low", "method": "flexlora", "rank": 2}]
    return ExperimentConfig.model_validate(FIXED | {"arms": arms} | changes)


def tuned(**changes: object) -> ExperimentConfig:
    tuning = {"learning_rates": [0.01, 0.1], "decays": ["linear"], "seeds": [100, 101]}
    return experiment(tuning=tuning | changes)


def scores(*found: tuple[str, float, int, float], diverged: tuple[tuple[str, float, int], ...] = ()) -> Results:
    """(arm, rate, seed, validation accuracy) as the rows of tuning runs."""
    results = Results()
    for arm, rate, seed, accuracy in found:
        key = RunKey("tuning", arm, rate, "linear", seed)
        status = "diverged: nan" if (arm, rate, seed) in diverged else "finished"
        results += Results(
            runs=(run_row(key, status=status),), accuracy=(accuracy_row(key, accuracy, split="validation"),)
        )
    return results


def test_without_tuning_every_arm_runs_once_a_seed() -> None:
    plans = first_plans(experiment())
    assert [(plan.key.stage, plan.key.arm, plan.key.seed) for plan in plans] == [
        ("same", "ours", 0),
        ("same", "low", 0),
        ("same", "ours", 1),
        ("same", "low", 1),
    ]


def test_an_arm_sees_the_experiment_with_its_own_settings() -> None:
    arms = [{"name": "hot", "set": {"training.learning_rate": 0.5, "clients.alpha": 9.0}}, {"name": "low", "rank": 2}]
    hot, low = first_plans(experiment(arms=arms, seeds=[0]))
    assert (hot.key.learning_rate, hot.experiment.training.learning_rate, hot.experiment.clients.alpha) == (
        0.5,
        0.5,
        9.0,
    )
    assert low.experiment.clients.ranks == (2,)


def test_every_arm_is_tuned_on_the_same_grid_and_on_other_seeds() -> None:
    grids = {}
    for plan in first_plans(tuned()):
        if plan.key.stage == "tuning":
            grids.setdefault(plan.key.arm, set()).add((plan.key.learning_rate, plan.key.seed))
            assert plan.experiment.training.learning_rate == plan.key.learning_rate
    assert grids["ours"] == grids["low"] == {(0.01, 100), (0.01, 101), (0.1, 100), (0.1, 101)}


def test_the_best_mean_over_the_tuning_seeds_is_chosen() -> None:
    # 0.1 has the best single seed, 0.01 the better mean.
    rows = scores(("ours", 0.01, 100, 0.6), ("ours", 0.01, 101, 0.6), ("ours", 0.1, 100, 0.7), ("ours", 0.1, 101, 0.4))
    assert choices_of(tuned(), rows) == (Choice("ours", 0.01, "linear", 0.6, at_the_edge=True),)


def test_a_rate_that_diverged_once_loses() -> None:
    rows = scores(
        *(("ours", 0.01, 100, 0.2), ("ours", 0.01, 101, 0.2), ("ours", 0.1, 100, 0.9), ("ours", 0.1, 101, 0.9)),
        diverged=(("ours", 0.1, 101),),
    )
    assert choices_of(tuned(), rows)[0].learning_rate == 0.01


def test_the_smaller_rate_wins_a_tie() -> None:
    rows = scores(*(("ours", rate, seed, 0.5) for rate in (0.1, 0.01) for seed in (100, 101)))
    assert choices_of(tuned(), rows)[0].learning_rate == 0.01


def test_nothing_is_chosen_while_runs_of_the_grid_are_missing() -> None:
    rows = scores(("ours", 0.01, 100, 0.6), ("ours", 0.01, 101, 0.6), ("ours", 0.1, 100, 0.7))
    assert choices_of(tuned(), rows) == ()


def test_the_test_split_never_chooses() -> None:
    rows = scores(*(("ours", rate, seed, 0.5) for rate in (0.1, 0.01) for seed in (100, 101)))
    key = RunKey("tuning", "ours", 0.1, "linear", 100)
    assert choices_of(tuned(), rows + Results(accuracy=(accuracy_row(key, 0.99, round=9),)))[0].learning_rate == 0.01


def test_a_choice_inside_the_grid_is_not_at_its_edge() -> None:
    wide = tuned(learning_rates=[0.001, 0.01, 0.1], seeds=[100])
    rows = scores(("ours", 0.001, 100, 0.1), ("ours", 0.01, 100, 0.6), ("ours", 0.1, 100, 0.2))
    assert not choices_of(wide, rows)[0].at_the_edge


@pytest.mark.parametrize(("rate", "is_repeated"), [(0.01, False), (0.1, True)])
def test_a_best_run_that_equals_the_same_one_has_it_as_twin(rate: float, is_repeated: bool) -> None:
    plans = first_plans(tuned())
    best = best_plans(tuned(), [Choice("ours", rate, "linear", 0.6, at_the_edge=False)])
    assert [plan.key for plan in best] == [RunKey("best", "ours", rate, "linear", seed) for seed in (0, 1)]
    assert [twin_of(plan, plans) is None for plan in best] == [is_repeated, is_repeated]
