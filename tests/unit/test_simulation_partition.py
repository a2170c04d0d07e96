"""Unequal data, dealt out fairly: nothing lost, nothing twice, the same every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest
from simulation.partition import dirichlet_partition, skewed_sample

LABELS = [n % 10 for n in range(500)]


@given(clients=st.integers(1, 20), alpha=st.floats(0.01, 100), seed=st.integers(0, 2**32), at_least=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_every_example_goes_to_exactly_one_client(clients: int, alpha: float, seed: int, at_least: int) -> None:
    parts = dirichlet_partition(LABELS, clients, alpha=alpha, seed=seed, at_least=at_least)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(500))
    assert min(part.size for part in parts) >= at_least


def test_a_partition_follows_its_seed_alone() -> None:
    one, again, other = (dirichlet_partition(LABELS, 5, alpha=1.0, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def largest_share(indices: np.ndarray) -> float:
    counts = np.bincount(np.asarray(LABELS)[indices], minlength=10)
    return float(counts.max() / counts.sum())


def test_a_small_alpha_is_a_skewed_mixture_and_a_large_one_is_not() -> None:
    skewed = dirichlet_partition(LABELS, 5, alpha=0.05, seed=0)
    even = dirichlet_partition(LABELS, 5, alpha=1000.0, seed=0)
    assert np.mean([largest_share(p) for p in skewed]) > 0.3
    assert np.mean([largest_share(p) for p in even]) < 0.15


@pytest.mark.parametrize(("clients", "alpha", "at_least"), [(0, 1.0, 1), (3, 0.0, 1), (501, 1.0, 1), (10, 1.0, 51)])
def test_what_cannot_be_divided_is_refused(clients: int, alpha: float, at_least: int) -> None:
    with pytest.raises(InvalidRequest, match=r"partition: 500 examples"):
        dirichlet_partition(LABELS, clients, alpha=alpha, seed=0, at_least=at_least)


def test_a_name_alone_decides_a_sample() -> None:
    one, again, other = (skewed_sample(LABELS, name, count=100, alpha=0.5, seed=0) for name in ("ada", "ada", "bob"))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert (np.unique(one).size, largest_share(one) > 0.15) == (100, True)


def test_a_sample_is_at_most_everything() -> None:
    assert np.array_equal(skewed_sample(LABELS, "ada", count=9999, alpha=0.1, seed=0), np.arange(500))
