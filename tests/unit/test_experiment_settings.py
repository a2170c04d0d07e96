"""What an experiment may say, and that every one that comes with the package says something it may."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import ConfigError
from common.settings import load_settings
from coordinator.aggregation.methods import make_method
from simulation.experiment import Arm, ExperimentConfig

BUILT_IN = sorted((Path(__file__).resolve().parents[2] / "simulation" / "experiments").glob("*.toml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"path": "base", "task": "sequence-classification"},
    "data": {"train": "a.jsonl", "test": "b.jsonl", "labels": ["no", "yes"]},
    "clients": {"count": 4, "ranks": [2, 4], "rank_weights": [3, 1], "per_round": 2},
    "rounds": {"num_rounds": 3},
    "training": {"learning_rate": 0.1},
    "arms": [{"name": "raflora"}],
}


def small(**changed: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.model_validate(SMALL | {k: SMALL.get(k, {}) | v for k, v in changed.items()})


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_what_comes_with_the_package_is_accepted_in_every_arm_and_without_a_gpu(path: Path) -> None:
    experiment = load_settings(ExperimentConfig, path, environ={})
    assert experiment.name == path.stem
    for variant in (experiment, experiment.on_cpu()):
        for arm in variant.arms:
            assert max(variant.for_arm(arm).clients.ranks) >= 1
            make_method(arm.options)


def test_an_arm_of_one_rank_has_clients_of_that_rank_alone() -> None:
    clients = small().for_arm(Arm(name="all 2", rank=2)).clients
    assert (clients.ranks, clients.rank_weights, clients.count) == ((2,), (), 4)


def test_an_arm_may_have_settings_of_its_own() -> None:
    arm = Arm(name="hot", set={"training.learning_rate": 0.5, "clients.alpha": 9.0})
    changed = small().for_arm(arm)
    assert (changed.training.learning_rate, changed.clients.alpha) == (0.5, 9.0)
    assert small().training.learning_rate == 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clints.alpha": 1.0}, "arm 'a': clints.alpha: an arm may set what is in model, data, clients, rounds, "),
        ({"seeds": [7]}, "arm 'a': seeds: an arm may set what is in model, data, clients, rounds, training, such as"),
        ({"tuning.learning_rates": [0.1]}, "arm 'a': tuning.learning_rates: an arm may set what is in model, data, "),
        ({"clients": {"alpha": 1.0}}, "arm 'a': clients: an arm may set what is in .*; the rest is the same for all"),
        ({"clients.alpha.beta": 1.0}, "arm 'a': clients.alpha.beta: there is no such section"),
        ({"clients.alpa": 1.0}, "arm 'a': clients.alpa: there is no such key; did you mean alpha?"),
        ({"clients.per_round": 9}, "arm 'a': clients: per_round 9, but there are 4 clients"),
    ],
)
def test_a_setting_that_an_arm_cannot_have_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        small().for_arm(Arm(name="a", set=changes))


def test_a_variant_for_a_cpu_may_also_have_other_seeds() -> None:
    variant = ExperimentConfig.model_validate(SMALL | {"without_gpu": {"seeds": [9], "rounds.num_rounds": 1}}).on_cpu()
    assert (variant.seeds, variant.rounds.num_rounds) == ((9,), 1)


@pytest.mark.parametrize(
    ("section", "changes", "complaint"),
    [
        ("clients", {"rank_weights": [1]}, "rank_weights"),
        ("clients", {"partition": "natural"}, "group_column or groups_file"),
        ("data", {"labels": []}, "labels or labels_file"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        small(**{section: changes})


def test_two_arms_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="same name"):
        ExperimentConfig.model_validate(SMALL | {"arms": [{"name": "a"}, {"name": "a"}]})


def test_a_wrong_key_of_an_arm_is_told_with_the_right_ones(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    text = (Path(BUILT_IN[0])).read_text(encoding="utf-8")
    path.write_text(text.replace("[[arms]]", "[[arms]]\nfloor = 0.3", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"arms.0.floor: there is no such key; (did you mean|known: .*weight_floor)"):
        load_settings(ExperimentConfig, path, environ={})
