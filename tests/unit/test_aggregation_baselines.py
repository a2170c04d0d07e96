"""Every rival against its equation in the dense reference, and the identities that tie the methods to each other."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from aggregation_cases import (
    FLEXLORA,
    RAFLORA,
    Federation,
    assert_alive,
    assert_same,
    effect,
    federations,
    fitting,
    global_module,
    merge,
    product,
    quick,
    untrained,
)
from dense_reference import (
    Client,
    Matrix,
    Shrink,
    average_of_changes,
    factor_mean_error,
    fedit,
    ffa_lora,
    flexlora,
    flora,
    florist_rank,
    hetlora,
    hetlora_rank,
    raflora,
    rb_lora,
    rb_lora_as_published,
    replication,
    truncated,
)
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import Adapter, Factors
from common.errors import AdapterMismatch
from coordinator.aggregation.method import MethodOptions, Shrinkage
from coordinator.aggregation.methods import make_method
from coordinator.aggregation.methods.hetlora import pruned_rank
from coordinator.aggregation.methods.raflora import raflora_weights

FEDIT = MethodOptions("fedit")
HETLORA = MethodOptions("hetlora")
FLORA = MethodOptions("flora")
FFA_LORA = MethodOptions("ffa-lora")
FEDEX_LORA = MethodOptions("fedex-lora")
RB_LORA = MethodOptions("rb-lora")
REPLICATION = MethodOptions("replication")
FLORIST = MethodOptions("florist")


# --- Each method is its equation


@quick
@given(federations(), st.sampled_from([(FEDIT, fedit), (HETLORA, hetlora), (REPLICATION, replication)]))
def test_a_factor_mean_is_the_mean_of_both_factors(f: Federation, method: tuple) -> None:  # type: ignore[type-arg]
    options, reference = method
    B, A = reference(f.clients, f.rank)
    factors = merge(f, options).factors
    covered = max(f.ranks)
    np.testing.assert_allclose(factors.lora_B, B, atol=2e-6 * np.abs(B).max())
    np.testing.assert_allclose(factors.lora_A[:covered], A[:covered], atol=2e-6 * np.abs(A).max())
    assert not A[covered:].any()  # the reference has zeros there, we the previous rows: no product tells them apart


@quick
@given(federations())
def test_rb_lora_is_the_factor_mean_of_every_partition(f: Federation) -> None:
    B, A = rb_lora(f.clients, f.rank)
    published_B, published_A = rb_lora_as_published(f.clients, f.rank)
    np.testing.assert_allclose(published_B, B, atol=1e-12 * max(1.0, np.abs(B).max()))
    np.testing.assert_allclose(published_A, A, atol=1e-12 * max(1.0, np.abs(A).max()))
    merged = merge(f, RB_LORA)
    found = product(merged.factors)
    assert np.linalg.norm(found - B @ A) <= 2e-6 * np.linalg.norm(B) * np.linalg.norm(A)
    assert merged.energy_lost == 0.0
    assert_alive(merged.factors)


@quick
@given(federations())
def test_floras_stack_is_flexloras_average(f: Federation) -> None:
    merged = merge(f, FLORA)
    B, A = flora(f.clients)
    assert merged.base_change is not None
    assert merged.base_change.rank == sum(f.ranks) == B.shape[1]
    assert_same(product(merged.base_change), B @ A, f)
    assert_same(product(merged.base_change), flexlora(f.clients), f)
    assert not merged.factors.lora_B.any()
    assert not merged.singular_values.any()


def test_flora_starts_every_round_anew_and_reproducibly() -> None:
    rng = np.random.default_rng(3)
    previous = global_module(rng, 12, 9, 4)
    update = Factors(rng.standard_normal((2, 9)), rng.standard_normal((12, 2)))
    rounds = [previous]
    for _ in range(3):
        rounds.append(make_method(FLORA).merge(rounds[-1], [update], [1]).factors)
        assert_alive(rounds[-1])
    for before, after in pairwise(rounds):
        assert np.linalg.norm(after.lora_A - before.lora_A) > 0.5
    again = make_method(FLORA).merge(previous, [update, update], [3, 4]).factors
    assert again.lora_A.tobytes() == rounds[1].lora_A.tobytes()


@quick
@given(federations())
def test_ffa_lora_is_the_mean_of_lora_B_over_the_frozen_lora_A(f: Federation) -> None:
    f = fitting(f, FFA_LORA)
    merged = merge(f, FFA_LORA)
    assert merged.factors.lora_A.tobytes() == f.previous.lora_A.tobytes()
    assert_same(product(merged.factors), ffa_lora(f.clients, f.PA), f)
    assert_same(product(merged.factors), truncated(flexlora(f.clients), f.rank), f)
    assert_same(product(merged.factors), product(merge(f, FLEXLORA).factors), f)


@pytest.mark.parametrize(("factor", "is_refused"), [(1 + 2**-9, False), (1 - 2**-9, False), (1.01, True)])
def test_ffa_lora_refuses_a_trained_lora_A_but_not_a_rounded_one(factor: float, is_refused: bool) -> None:
    previous = global_module(np.random.default_rng(4), 12, 9, 4)
    rows = previous.lora_A[:2].copy()
    rows[1, 3] *= np.float32(factor)
    update = Factors(rows, np.ones((12, 2)))
    if is_refused:
        with pytest.raises(AdapterMismatch, match="an update of rank 2 has trained lora_A, which ffa-lora freezes"):
            make_method(FFA_LORA).merge(previous, [update], [1])
    else:
        assert (
            make_method(FFA_LORA).merge(previous, [update], [1]).factors.lora_A.tobytes() == previous.lora_A.tobytes()
        )


@quick
@given(federations())
def test_fedex_lora_is_fedit_and_the_base_takes_what_that_lacks(f: Federation) -> None:
    merged = merge(f, FEDEX_LORA)
    B, A = fedit(f.clients, f.rank)
    size = f.scale() + np.linalg.norm(B) * np.linalg.norm(A)
    assert merged.base_change is not None
    assert np.linalg.norm(product(merged.base_change) - (flexlora(f.clients) - B @ A)) <= 2e-6 * size
    assert np.linalg.norm(effect(merged) - flexlora(f.clients)) <= 2e-6 * size
    plain = merge(f, FEDIT)
    assert merged.factors.lora_B.tobytes() == plain.factors.lora_B.tobytes()
    assert merged.factors.lora_A.tobytes() == plain.factors.lora_A.tobytes()


@quick
@given(federations(), st.sampled_from([0.3, 0.8, 0.99]))
def test_florist_keeps_the_least_rank_with_enough_energy(f: Federation, threshold: float) -> None:
    W = flexlora(f.clients)
    rank = florist_rank(W, threshold, f.rank)
    merged = merge(f, replace(FLORIST, energy_threshold=threshold))
    assert_same(product(merged.factors), truncated(W, rank), f)
    assert np.count_nonzero(merged.singular_values) == np.linalg.matrix_rank(truncated(W, rank))
    lost = np.linalg.norm(W - truncated(W, rank)) ** 2
    assert merged.energy_lost == pytest.approx(lost, rel=1e-6, abs=1e-12 * f.scale() ** 2)
    assert_alive(merged.factors)


def test_florist_by_hand() -> None:
    # Singular values 4, 2, 2, 1: energies 16, 4, 4, 1 of 25; three directions are what the global rank holds.
    previous = global_module(np.random.default_rng(6), 7, 5, 3)
    one = Factors(np.eye(2, 5), np.eye(7, 2) * [8.0, 4.0])
    other = Factors(np.eye(2, 5, k=2), np.eye(7, 2, k=-2) * [4.0, 2.0])
    kept = {}
    for threshold in (0.6, 0.65, 0.9, 0.97, 1.0):
        merged = make_method(replace(FLORIST, energy_threshold=threshold)).merge(previous, [one, other], [5, 5])
        kept[threshold] = (np.count_nonzero(merged.singular_values), round(merged.energy_lost, 5))
    assert kept == {0.6: (1, 9.0), 0.65: (2, 5.0), 0.9: (3, 1.0), 0.97: (3, 1.0), 1.0: (3, 1.0)}


@quick
@given(federations())
def test_florist_without_a_threshold_is_flexlora(f: Federation) -> None:
    merged, plain = merge(f, replace(FLORIST, energy_threshold=1.0)), merge(f, FLEXLORA)
    assert np.array_equal(merged.factors.lora_B, plain.factors.lora_B)
    assert np.array_equal(merged.factors.lora_A, plain.factors.lora_A)
    assert merged.energy_lost == plain.energy_lost


# --- What stands in the base


def rounds_without_training(f: Federation, options: MethodOptions, count: int) -> np.ndarray:
    """What clients compute with after so many rounds of nothing: the adapter, and all that was added to the base."""
    base = np.zeros_like(product(f.previous))
    for _ in range(count):
        merged = merge(untrained(f), options)
        base += effect(merged) - product(merged.factors)
        f = replace(f, previous=merged.factors)
    return product(f.previous) + base


@pytest.mark.parametrize("count", [1, 2, 6])
@quick
@given(f=federations())
def test_what_stands_in_the_base_is_damped_once_and_never_again(count: int, f: Federation) -> None:
    q = np.array([sum(c.num_examples for c in f.clients if c.rank > i) for i in range(f.rank)]) / sum(f.num_examples)
    left = {"flora": q, "fedex-lora": (q + q ** (2 * count)) / (1 + q), "flexlora": q**count}
    for name, factor in left.items():
        found = rounds_without_training(f, MethodOptions(name), count)
        np.testing.assert_allclose(found, (f.PB * factor) @ f.PA, atol=1e-5, err_msg=name)


def test_an_index_that_half_of_the_examples_own_keeps_half_in_flora_and_a_third_in_fedex_lora() -> None:
    rng = np.random.default_rng(5)
    previous = global_module(rng, 12, 10, 6)
    small, large = (Client(np.zeros((12, rank)), np.zeros((rank, 10)), 10) for rank in (2, 6))
    f = Federation(previous, (small, large), seed=5)
    for name, left in (("flora", 1 / 2), ("fedex-lora", 1 / 3), ("flexlora", 0.0), ("fedit", 0.0)):
        found = rounds_without_training(f, MethodOptions(name), 24)
        expected = f.PB @ np.diag([1.0, 1.0, left, left, left, left]) @ f.PA
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


# --- What ties them together


@quick
@given(federations(equal_ranks=True))
def test_with_equal_ranks_nobody_is_padded(f: Federation) -> None:
    plain = merge(f, FEDIT)
    for options in (REPLICATION, RB_LORA):
        size = np.linalg.norm(plain.factors.lora_B.astype(float)) * np.linalg.norm(plain.factors.lora_A.astype(float))
        assert np.linalg.norm(product(merge(f, options).factors) - product(plain.factors)) <= 2e-6 * size


@quick
@given(federations(equal_ranks=True))
def test_what_factor_means_lack_are_the_cross_terms(f: Federation) -> None:
    lacking = flexlora(f.clients) - product(merge(f, FEDIT).factors)
    assert_same(lacking, factor_mean_error(f.clients), f)


@quick
@given(federations())
def test_replication_with_two_levels_is_the_factor_mean_of_every_partition_above_the_lower(f: Federation) -> None:
    low, high = min(f.ranks), max(f.ranks)
    f = replace(f, clients=tuple(c for c in f.clients if c.rank in (low, high)))
    B, A = rb_lora(f.clients, f.rank)
    factors = merge(f, REPLICATION).factors
    np.testing.assert_allclose(factors.lora_B, B, atol=2e-6 * np.abs(B).max())
    np.testing.assert_allclose(factors.lora_A[:high], A[:high], atol=2e-6 * np.abs(A).max())


def test_hetlora_weighs_by_norms_and_not_by_examples() -> None:
    # Norms 6 and 2 (scaling 2 and 1 times 3 and 2): three quarters and a quarter, whatever the examples.
    one = Client(np.eye(7, 1) * 3.0, np.eye(1, 5), num_examples=1, scaling=2.0)
    other = Client(np.eye(7, 1, k=-1), np.eye(1, 5, k=1) * 2.0, num_examples=100)
    f = Federation(global_module(np.random.default_rng(8), 7, 5, 2), (one, other), seed=8)
    factors = merge(f, HETLORA).factors
    np.testing.assert_allclose(factors.lora_B[:, 0], [4.5, 0.25, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(factors.lora_A[0], [0.75, 0.5, 0, 0, 0], rtol=1e-6)


def test_hetlora_without_any_update_keeps_the_directions() -> None:
    previous = global_module(np.random.default_rng(9), 7, 5, 3, trained=False)
    silent = Factors(previous.lora_A[:2], np.zeros((7, 2)))
    factors = make_method(HETLORA).merge(previous, [silent, silent], [3, 4]).factors
    assert not factors.lora_B.any()
    assert factors.lora_A.tobytes() == previous.lora_A.tobytes()


# --- HetLoRA's pruning


@quick
@given(federations(), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.5, 0.99, 1.01, 2.0]))
def test_a_client_prunes_if_its_tail_shrank(f: Federation, share: float, change: float) -> None:
    before = f.clients[0]
    tail = np.arange(before.rank) >= np.floor(share * before.rank)
    after = replace(before, B=before.B * np.where(tail, change, 1.0 / change))
    adapters = [Adapter({"m": Factors(c.A, c.B)}, {}) for c in (before, after)]
    assert pruned_rank(adapters[0], adapters[1], share) == hetlora_rank(before, after, share)


def test_all_modules_decide_about_the_rank_together() -> None:
    def adapter(first: float, second: float) -> Adapter:
        tail = np.diag([1.0, 1.0, 1.0, 1.0])
        return Adapter({"a": Factors(np.eye(4), tail * first), "b": Factors(np.eye(4), tail * second)}, {})

    assert pruned_rank(adapter(1.0, 1.0), adapter(1.5, 0.4), prune_share=0.5) == 2
    assert pruned_rank(adapter(1.0, 1.0), adapter(1.5, 0.6), prune_share=0.5) == 4
    assert pruned_rank(adapter(1.0, 1.0), adapter(0.1, 0.1), prune_share=0.2) == 4  # floor(0.8) is no rank
    assert pruned_rank(adapter(0.0, 0.0), adapter(1.0, 1.0), prune_share=0.5) == 4  # the first round


# --- Shrinkage


def lam_of(shrinkage: Shrinkage, kappa: float) -> Shrink:
    return {
        "weight-floor": lambda q, n_eff: 1.0,  # noqa: ARG005 (the paper)
        "sqrt-share": lambda q, n_eff: q**0.5,  # noqa: ARG005
        "share": lambda q, n_eff: q,  # noqa: ARG005
        "effective-owners": lambda q, n_eff: n_eff / (n_eff + kappa),  # noqa: ARG005
    }[shrinkage]


POLICIES = st.sampled_from(
    [
        MethodOptions("raflora"),
        MethodOptions("raflora", shrinkage="sqrt-share"),
        MethodOptions("raflora", shrinkage="share"),
        MethodOptions("raflora", shrinkage="effective-owners"),
        MethodOptions("raflora", shrinkage="effective-owners", kappa=0.0),
        MethodOptions("raflora", shrinkage="effective-owners", kappa=2.5),
    ]
)


def dense_with(f: Federation, options: MethodOptions) -> Matrix:
    return raflora(f.clients, f.PB, f.PA, shrink=lam_of(options.shrinkage, options.kappa))


@quick
@given(federations(), POLICIES)
def test_shrinkage_moves_every_partition_by_lam_towards_its_owners(f: Federation, options: MethodOptions) -> None:
    assert_same(product(merge(f, options).factors), truncated(dense_with(f, options), f.rank), f)


@quick
@given(federations(), POLICIES)
def test_what_owners_do_not_take_stays_with_the_previous(f: Federation, options: MethodOptions) -> None:
    weights = raflora_weights(f.ranks, f.num_examples, f.rank, shrinkage=options.shrinkage, kappa=options.kappa)
    np.testing.assert_allclose(weights.previous + weights.updates.sum(axis=0), 1.0, rtol=1e-12)
    assert weights.previous.min() >= -1e-15
    assert np.all(weights.previous[max(f.ranks) :] == 1.0)


@quick
@given(federations())
def test_the_share_is_the_average_of_changes_and_the_floor_of_one(f: Federation) -> None:  # I18 (lam = q)
    merged = merge(f, replace(RAFLORA, shrinkage="share"))
    assert_same(product(merged.factors), truncated(average_of_changes(f.clients, f.PB, f.PA), f.rank), f)
    floored = merge(f, replace(RAFLORA, weight_floor=1.0))
    assert merged.factors.lora_B.tobytes() == floored.factors.lora_B.tobytes()


@quick
@given(federations())
def test_a_kappa_of_zero_is_the_paper_to_the_bit(f: Federation) -> None:  # I18 (lam = 1)
    merged = merge(f, replace(RAFLORA, shrinkage="effective-owners", kappa=0.0))
    assert merged.factors.lora_B.tobytes() == merge(f).factors.lora_B.tobytes()
    assert merged.factors.lora_A.tobytes() == merge(f).factors.lora_A.tobytes()


@quick
@given(federations())
def test_a_huge_kappa_leaves_the_previous_adapter(f: Federation) -> None:  # I18 (lam = 0)
    merged = merge(f, replace(RAFLORA, shrinkage="effective-owners", kappa=1e12))
    assert_same(product(merged.factors), product(f.previous), f)


def test_shrinkage_by_hand() -> None:
    # Ranks 1, 2, 2 with 60, 30 and 10 examples: index 1 has q = 0.4 and n_eff = 40^2 / (30^2 + 10^2) = 1.6.
    def lam(shrinkage: Shrinkage, **settings: float) -> float:
        weights = raflora_weights([1, 2, 2], [60, 30, 10], 3, shrinkage=shrinkage, **settings)
        np.testing.assert_allclose(weights.updates[1:, 1] * [4 / 3, 4], 1.0 - weights.previous[1])
        return float(1.0 - weights.previous[1])

    assert lam("weight-floor") == 1.0
    assert lam("weight-floor", weight_floor=0.5) == pytest.approx(0.8)
    assert lam("sqrt-share") == pytest.approx(0.4**0.5)
    assert lam("share") == pytest.approx(0.4)
    assert lam("effective-owners") == pytest.approx(1.6 / 2.6)
    assert lam("effective-owners", kappa=0.4) == pytest.approx(0.8)
