"""Every invariant of raFLoRA and FlexLoRA, on non-square layers, against a dense reference."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from aggregation_cases import (
    FLEXLORA,
    RAFLORA,
    TOLERANCE,
    Federation,
    assert_same,
    federations,
    floors,
    global_module,
    merge,
    product,
    quick,
    untrained,
)
from dense_reference import Client, average_of_changes, flexlora, raflora, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Factors
from common.errors import AdapterMismatch, ConfigError, InvalidRequest, WrongRank
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import make_method
from coordinator.aggregation.methods.flexlora import flexlora_weights
from coordinator.aggregation.methods.raflora import raflora_weights

# --- The result is what the blackboard says


@quick
@given(federations(), floors)
def test_raflora_is_the_truncated_sum_over_partitions(f: Federation, floor: float) -> None:  # I11, I18 (lam = 1)
    W = raflora(f.clients, f.PB, f.PA, weight_floor=floor)
    merged = merge(f, replace(RAFLORA, weight_floor=floor))
    assert_same(product(merged.factors), truncated(W, f.rank), f)
    lost = np.linalg.norm(W - truncated(W, f.rank)) ** 2
    assert merged.energy_lost == pytest.approx(lost, rel=1e-6, abs=1e-12 * f.scale() ** 2)


@quick
@given(federations())
def test_flexlora_is_the_truncated_average_of_products(f: Federation) -> None:
    assert_same(product(merge(f, FLEXLORA).factors), truncated(flexlora(f.clients), f.rank), f)


@quick
@given(federations(), floors, st.sampled_from(["flexlora", "florist", "raflora", "rb-lora"]))
def test_factors_are_in_canonical_form(f: Federation, floor: float, name: str) -> None:
    merged = merge(f, MethodOptions(name, weight_floor=floor if name == "raflora" else 0.0))
    A, B = merged.factors.lora_A.astype(np.float64), merged.factors.lora_B.astype(np.float64)
    norms = np.linalg.norm(B, axis=0)
    assert A.shape == f.PA.shape
    assert B.shape == f.PB.shape
    np.testing.assert_allclose(A @ A.T, np.eye(f.rank), atol=1e-6)  # also where the singular value is zero
    np.testing.assert_allclose(B.T @ B, np.diag(norms**2), atol=1e-5 * max(1.0, norms[0] ** 2))
    assert np.all(np.diff(norms) <= 1e-6 * norms[0])
    assert np.all(np.take_along_axis(A, np.abs(A).argmax(axis=1)[:, None], axis=1) > 0)  # the sign rule


@quick
@given(federations(), st.integers(1, 9), st.sampled_from([0.5, 3.0, 16.0]))
def test_a_slice_times_its_scaling_is_the_truncated_svd(f: Federation, rank: int, scaling: float) -> None:  # I14
    rank = min(rank, f.rank)
    factors = merge(f).factors
    handed_down = scaling * (factors.lora_B[:, :rank] / np.float32(scaling)).astype(float) @ factors.lora_A[:rank]
    assert_same(handed_down, truncated(raflora(f.clients, f.PB, f.PA), rank), f)


# --- What must not matter


@quick
@given(federations(), st.randoms(use_true_random=False), st.sampled_from([RAFLORA, FLEXLORA]))
def test_the_order_of_clients_does_not_matter(f: Federation, random: object, options: MethodOptions) -> None:  # I2
    shuffled = list(f.clients)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = merge(replace(f, clients=tuple(shuffled)), options)
    assert_same(product(other.factors), product(merge(f, options).factors), f)


@quick
@given(federations(), st.integers(2, 10**6), floors)
def test_only_shares_of_examples_matter(f: Federation, times: int, floor: float) -> None:  # I5
    options = replace(RAFLORA, weight_floor=floor)
    scaled = replace(f, clients=tuple(replace(c, num_examples=times * c.num_examples) for c in f.clients))
    assert_same(product(merge(scaled, options).factors), product(merge(f, options).factors), f)


@quick
@given(federations(), floors)
def test_a_client_split_in_two_halves_changes_nothing(f: Federation, floor: float) -> None:  # I6
    options = replace(RAFLORA, weight_floor=floor)
    doubled = [replace(c, num_examples=2 * c.num_examples) for c in f.clients]
    halves = (f.clients[0], f.clients[0], *doubled[1:])
    whole = replace(f, clients=tuple(doubled))
    assert_same(product(merge(replace(f, clients=halves), options).factors), product(merge(whole, options).factors), f)


@quick
@given(federations(), st.lists(st.integers(1, 17), max_size=5), floors)
def test_superfluous_levels_change_nothing(f: Federation, extra: list[int], floor: float) -> None:  # I7
    levels = [min(level, f.rank) for level in extra]
    W = raflora(f.clients, f.PB, f.PA, levels=levels, weight_floor=floor)
    assert_same(product(merge(f, replace(RAFLORA, weight_floor=floor)).factors), truncated(W, f.rank), f)


@quick
@given(federations(), st.sampled_from([RAFLORA, FLEXLORA]))
def test_sign_flips_of_pairs_change_nothing(f: Federation, options: MethodOptions) -> None:  # I9
    rng = np.random.default_rng(f.seed)
    flipped = []
    for c in f.clients:
        signs = rng.choice([-1.0, 1.0], size=c.rank)
        flipped.append(replace(c, B=c.B * signs, A=signs[:, None] * c.A))
    other = merge(replace(f, clients=tuple(flipped)), options)
    assert_same(product(other.factors), product(merge(f, options).factors), f)


@quick
@given(federations())
def test_mixing_inside_a_partition_changes_nothing(f: Federation) -> None:  # I10
    rng = np.random.default_rng(f.seed)
    bounds = sorted(set(f.ranks))
    mixed = tuple(rotated(c, bounds, rng) for c in f.clients)
    assert_same(product(merge(replace(f, clients=mixed)).factors), product(merge(f).factors), f)


def rotated(client: Client, bounds: Sequence[int], rng: np.random.Generator) -> Client:
    """The same product, its directions mixed within each of these partitions."""
    Q = np.zeros((client.rank, client.rank))
    for low, high in zip([0, *bounds], bounds, strict=False):
        if high <= client.rank:
            Q[low:high, low:high], _ = np.linalg.qr(rng.standard_normal((high - low, high - low)))
    return replace(client, B=client.B @ Q, A=Q.T @ client.A)


def test_mixing_across_partitions_changes_raflora_but_not_flexlora() -> None:  # I10, the other way round
    rng = np.random.default_rng(5)
    clients = tuple(Client(rng.standard_normal((12, r)), rng.standard_normal((r, 10)), 10) for r in (2, 6))
    f = Federation(global_module(rng, 12, 10, 6), clients, seed=5)
    across = replace(f, clients=(clients[0], rotated(clients[1], [6], rng)))
    moved = np.linalg.norm(product(merge(across).factors) - product(merge(f).factors))
    assert moved > 0.05 * np.linalg.norm(product(merge(f).factors))
    assert_same(product(merge(across, FLEXLORA).factors), product(merge(f, FLEXLORA).factors), f)


@quick
@given(federations(), st.sampled_from([RAFLORA, FLEXLORA]))
def test_folding_the_scaling_into_lora_B_changes_nothing(f: Federation, options: MethodOptions) -> None:  # I15
    folded = tuple(replace(c, B=c.scaling * c.B, scaling=1.0) for c in f.clients)
    other = merge(replace(f, clients=folded), options)
    assert np.array_equal(other.factors.lora_B, merge(f, options).factors.lora_B)  # exact: powers of two


# --- Who decides what


@quick
@given(federations(equal_ranks=True))
def test_with_equal_ranks_raflora_is_flexlora(f: Federation) -> None:  # I1
    assert_same(product(merge(f).factors), product(merge(f, FLEXLORA).factors), f)


@quick
@given(federations())
def test_one_client_decides_its_rank_and_the_rest_is_carried(f: Federation) -> None:  # I3, I12
    alone = replace(f, clients=f.clients[:1])
    rank = f.clients[0].rank
    W = f.clients[0].update() + f.PB[:, rank:] @ f.PA[rank:]
    assert_same(product(merge(alone).factors), truncated(W, f.rank), f)


@quick
@given(federations())
def test_an_uncovered_partition_is_carried(f: Federation) -> None:  # I12
    silent = tuple(replace(c, B=0.0 * c.B) for c in f.clients)
    rank = max(f.ranks)
    merged = merge(replace(f, clients=silent))
    assert_same(product(merged.factors), f.PB[:, rank:] @ f.PA[rank:], f)
    assert merged.energy_lost == 0.0


@quick
@given(federations(), floors)
def test_weights_of_every_index_sum_to_one(f: Federation, floor: float) -> None:  # I4
    weights = raflora_weights(f.ranks, f.num_examples, f.rank, weight_floor=floor)
    np.testing.assert_allclose(weights.previous + weights.updates.sum(axis=0), 1.0, rtol=1e-12)
    assert weights.previous.min() >= -1e-15
    assert weights.updates.min() >= 0.0


@quick
@given(federations(), st.integers(1, 1000))
def test_a_client_has_no_say_above_its_rank(f: Federation, num_examples: int) -> None:  # I16
    rank = f.clients[0].rank
    before = raflora_weights(f.ranks, f.num_examples, f.rank)
    after = raflora_weights(f.ranks, [num_examples, *f.num_examples[1:]], f.rank)
    assert np.array_equal(before.updates[:, rank:], after.updates[:, rank:])
    assert np.array_equal(before.previous[rank:], after.previous[rank:])
    assert not after.updates[0, rank:].any()


@quick
@given(federations(), st.data())
def test_a_partition_is_no_larger_than_its_largest_owner_makes_it(f: Federation, data: st.DataObject) -> None:  # I17
    bounds = sorted(set(f.ranks))
    h = data.draw(st.integers(0, len(bounds) - 1))
    low, high = [0, *bounds][h], bounds[h]
    only_h = []
    for c in f.clients:
        B = np.zeros_like(c.B)
        B[:, low:high] = c.B[:, low:high]
        only_h.append(replace(c, B=B))
    empty = Factors(f.previous.lora_A, np.zeros_like(f.previous.lora_B))
    merged = merge(replace(f, previous=empty, clients=tuple(only_h)))
    largest = max(float(np.linalg.norm(c.update())) for c in only_h)
    assert np.linalg.norm(merged.factors.lora_B) <= largest * (1 + 1e-6)


@quick
@given(federations(trained=False), st.floats(-3, 3), st.sampled_from([RAFLORA, FLEXLORA]))
def test_the_merge_is_linear_in_the_updates(f: Federation, times: float, options: MethodOptions) -> None:  # I8
    rng = np.random.default_rng(f.seed)
    # As many clients as fit into the global rank together: nothing is cut off, so sums stay sums.
    fitting = [c for c, total in zip(f.clients, np.cumsum(f.ranks), strict=True) if total <= f.rank]
    others = [rng.standard_normal(c.B.shape) for c in fitting]

    def merged_with(*B: np.ndarray) -> np.ndarray:
        clients = tuple(replace(c, B=b) for c, b in zip(fitting, B, strict=True))
        return product(merge(replace(f, clients=clients), options).factors)

    found = merged_with(*(c.B + times * other for c, other in zip(fitting, others, strict=True)))
    expected = merged_with(*(c.B for c in fitting)) + times * merged_with(*others)
    sizes = [np.linalg.norm(c.scaling * other) * np.linalg.norm(c.A) for c, other in zip(fitting, others, strict=True)]
    assert np.linalg.norm(found - expected) <= TOLERANCE * (f.scale() + 3 * sum(sizes))


# --- The collapse, and that there is none


@quick
@given(federations())
def test_without_training_raflora_returns_the_previous_adapter(f: Federation) -> None:  # I13
    merged = merge(untrained(f))
    np.testing.assert_allclose(product(merged.factors), product(f.previous), atol=1e-6)
    flips = np.sign(np.sum(merged.factors.lora_A * f.previous.lora_A, axis=1))
    np.testing.assert_allclose(merged.factors.lora_A * flips[:, None], f.previous.lora_A, atol=1e-5)
    np.testing.assert_allclose(merged.factors.lora_B * flips, f.previous.lora_B, atol=1e-5)


@quick
@given(federations())
def test_without_training_flexlora_shrinks_every_direction_by_its_owners_share(f: Federation) -> None:  # I13
    merged = merge(untrained(f), FLEXLORA)
    share = np.array([sum(c.num_examples for c in f.clients if c.rank > i) for i in range(f.rank)])
    share = share / sum(f.num_examples)
    before = np.linalg.norm(f.PB, axis=0)
    np.testing.assert_allclose(np.linalg.norm(merged.factors.lora_B, axis=0), share * before, atol=1e-6)
    np.testing.assert_allclose(product(merged.factors), (f.PB * share) @ f.PA, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(federations(), st.integers(1, 8))
def test_rho_stays_under_raflora_and_tends_to_one_under_flexlora(f: Federation, rounds: int) -> None:  # I19
    smallest = min(f.ranks)
    q = sum(c.num_examples for c in f.clients if c.rank > smallest) / sum(f.num_examples)

    def rho_after(options: MethodOptions) -> float:
        now = f
        for _ in range(rounds):
            now = replace(now, previous=merge(untrained(now), options).factors)
        return rho(now.previous, smallest)

    before = rho(f.previous, smallest)
    assert rho_after(RAFLORA) == pytest.approx(before, abs=1e-5)
    assert 1.0 - rho_after(FLEXLORA) <= (1.0 - before) / before * q ** (2 * rounds) + 1e-6


def rho(factors: Factors, rank: int) -> float:
    energies = np.sum(factors.lora_B.astype(np.float64) ** 2, axis=0)
    return float(energies[:rank].sum() / energies.sum())


# --- The weight floor


@quick
@given(federations())
def test_a_floor_of_one_is_the_average_of_changes(f: Federation) -> None:  # I18 (lam = q)
    W = average_of_changes(f.clients, f.PB, f.PA)
    assert_same(product(merge(f, replace(RAFLORA, weight_floor=1.0)).factors), truncated(W, f.rank), f)


@quick
@given(federations(), st.floats(0.01, 1.0))
def test_a_lone_owner_weighs_no_more_than_its_share_over_the_floor(f: Federation, floor: float) -> None:
    weights = raflora_weights(f.ranks, f.num_examples, f.rank, weight_floor=floor)
    bound = np.array(f.num_examples) / (floor * sum(f.num_examples))
    assert np.all(weights.updates <= bound[:, None] * (1 + 1e-12))


def test_the_floor_by_hand() -> None:
    # Clients of rank 1 and 2 with 90 and 10 examples: index 1 has a tenth of the examples, the floor is a half.
    weights = raflora_weights([1, 2], [90, 10], 3, weight_floor=0.5)
    np.testing.assert_allclose(weights.updates, [[0.9, 0.0, 0.0], [0.1, 0.2, 0.0]])
    np.testing.assert_allclose(weights.previous, [0.0, 0.8, 1.0])


def test_weights_by_hand() -> None:
    weights = raflora_weights([1, 3], [30, 10], 4)
    np.testing.assert_allclose(weights.updates, [[0.75, 0, 0, 0], [0.25, 1, 1, 0]])
    assert weights.previous.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(flexlora_weights([1, 3], [30, 10], 4).updates, [[0.75, 0, 0, 0], [0.25, 0.25, 0.25, 0]])
    assert not flexlora_weights([1, 3], [30, 10], 4).previous.any()


# --- What a caller can get wrong


def test_an_unknown_method_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'fedavg' is not known; the methods are fedex-lora, fedit, .*, raflora"):
        make_method(MethodOptions("fedavg"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MethodOptions("flexlora", weight_floor=0.1), "flexlora has no weight floor"),
        (MethodOptions("raflora", weight_floor=1.5), "from 0 to 1"),
        (MethodOptions("raflora", weight_floor=-0.1), "from 0 to 1"),
        (MethodOptions("raflora", weight_floor=float("nan")), "from 0 to 1"),
    ],
)
def test_a_setting_that_a_method_does_not_have_is_refused(options: MethodOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(options)


def test_updates_that_do_not_fit_are_refused() -> None:
    previous = global_module(np.random.default_rng(7), 6, 4, 2)
    method = make_method(RAFLORA).merge
    with pytest.raises(InvalidRequest, match="0 updates"):
        method(previous, [], [])
    with pytest.raises(InvalidRequest, match="num_examples 0"):
        method(previous, [previous], [0])
    with pytest.raises(WrongRank, match="rank 3"):
        method(previous, [Factors(np.zeros((3, 4)), np.zeros((6, 3)))], [1])
    with pytest.raises(AdapterMismatch, match=r"\(4, 6\)"):
        method(previous, [Factors(np.zeros((2, 6)), np.zeros((4, 2)))], [1])
