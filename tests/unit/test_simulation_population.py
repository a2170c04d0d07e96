"""Who takes part: every example with exactly one client, ranks in exact numbers, all from the seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from simulation.experiment import ClientsSection
from simulation.partition import natural_partition, shard_partition
from simulation.population import SimulatedClient, make_population, rank_counts

LABELS = [n % 10 for n in range(600)]
GROUPS = [("bank", "travel", "home", "work")[n % 4] for n in range(600)]


def clients_of(**changes: object) -> ClientsSection:
    return ClientsSection.model_validate(
        {"count": 12, "ranks": [4, 8, 16], "per_round": 4, "groups_file": "groups.json"} | changes
    )


def population_of(seed: int = 0, validation: float = 0.1, **changes: object) -> tuple[SimulatedClient, ...]:
    return make_population(LABELS, GROUPS, clients_of(**changes), validation=validation, seed=seed)


@given(
    partition=st.sampled_from(["dirichlet", "shards", "natural", "iid"]),
    count=st.integers(1, 30),
    alpha=st.floats(0.05, 50),
    shards=st.integers(1, 4),
    validation=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_example_is_somebodys_and_nobody_has_too_few(
    *, partition: str, count: int, alpha: float, shards: int, validation: float, seed: int
) -> None:
    clients = clients_of(partition=partition, count=count, alpha=alpha, shards_per_client=shards, per_round=1)
    population = make_population(LABELS, GROUPS, clients, validation=validation, seed=seed)
    held = np.concatenate([np.concatenate([c.train, c.validation]) for c in population])
    assert np.array_equal(np.sort(held), np.arange(600))
    assert min(c.train.size + c.validation.size for c in population) >= clients.min_examples
    assert all(c.num_examples >= 1 and bool(c.validation.size) == (validation > 0) for c in population)
    assert [c.client_id for c in population] == sorted(c.client_id for c in population)


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0.01),
    count=st.integers(1, 1000),
)
def test_ranks_are_dealt_in_exact_numbers(weights: list[float], count: int) -> None:
    counts = rank_counts(range(len(weights)), weights, count)
    assert sum(counts) == count
    for found, weight in zip(counts, weights, strict=True):
        assert abs(found - count * weight / sum(weights)) <= 1 + 1e-9
        assert found == 0 or weight > 0


def test_what_is_left_goes_to_the_largest_remainder() -> None:
    assert rank_counts([4, 8, 16, 32, 64], [4, 2, 2, 1, 1], 40) == (16, 8, 8, 4, 4)
    assert rank_counts([4, 8, 16], [], 40) == (14, 13, 13)
    assert rank_counts([4, 8], [1, 3], 5) == (1, 4)


def test_a_population_follows_its_seed_alone() -> None:
    def fingerprint(seed: int) -> list[tuple[int, list[int], list[int]]]:
        return [(c.rank, c.train.tolist(), c.validation.tolist()) for c in population_of(seed)]

    assert fingerprint(3) == fingerprint(3)
    assert fingerprint(3) != fingerprint(4)


def test_more_data_affords_more_rank_if_it_is_ordered_so() -> None:
    population = population_of(rank_order="by-examples", alpha=0.3)
    by_examples = sorted(population, key=lambda c: c.train.size + c.validation.size)
    assert [c.rank for c in by_examples] == [4] * 4 + [8] * 4 + [16] * 4
    assert Counter(c.rank for c in population_of(rank_weights=[1, 0, 2])) == {4: 4, 16: 8}


def test_no_validation_part_if_none_is_wanted() -> None:
    assert all(c.validation.size == 0 for c in population_of(validation=0.0))


def test_clients_of_a_natural_group_hold_only_its_examples() -> None:
    population = population_of(partition="natural", count=10)
    groups = [{GROUPS[index] for index in [*c.train, *c.validation]} for c in population]
    assert all(len(found) == 1 for found in groups)
    # Ten clients over four groups of one size: the first two by name have one more.
    assert Counter(next(iter(found)) for found in groups) == {"bank": 3, "home": 3, "travel": 2, "work": 2}


def test_fewer_clients_than_groups_hold_whole_groups() -> None:
    parts = natural_partition(GROUPS, 3, seed=1)
    assert sorted(part.size for part in parts) == [150, 150, 300]


def test_a_group_that_is_too_small_is_named() -> None:
    with pytest.raises(InvalidRequest, match="group 'tiny' gives a client 1 examples"):
        natural_partition([*GROUPS, "tiny", "tiny"], 10, seed=0, at_least=2)


def test_a_client_sees_no_more_labels_than_its_shards_can_hold() -> None:
    parts = shard_partition(LABELS, 30, shards_per_client=2, seed=0)
    assert max(len({LABELS[index] for index in part}) for part in parts) <= 2
    assert {part.size for part in parts} == {20}


@pytest.mark.parametrize("partition", ["dirichlet", "shards", "natural", "iid"])
def test_too_few_examples_are_refused(partition: str) -> None:
    with pytest.raises(InvalidRequest, match="partition"):
        population_of(partition=partition, min_examples=100)


def test_natural_needs_groups() -> None:
    with pytest.raises(InvalidRequest, match="no groups"):
        make_population(LABELS, None, clients_of(partition="natural"), validation=0.1, seed=0)
