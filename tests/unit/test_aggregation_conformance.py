"""What is true of every aggregation method, whatever it computes; and of which methods it is not, and why.

Each method runs on non-square layers with unequal ranks and scalings. A method added to METHODS is held to all of
this as soon as it stands in EVERY_METHOD (tests/aggregation_cases.py).
"""

from dataclasses import fields, replace

import numpy as np
import pytest
from aggregation_cases import (
    EVERY_METHOD,
    FLEXLORA,
    Federation,
    assert_same,
    effect,
    factors_of,
    federations,
    fitting,
    global_module,
    label,
    merge,
    product,
    untrained,
)
from coordinators import settings_of
from dense_reference import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.adapter import Factors
from common.errors import AdapterMismatch, ConfigError, InvalidRequest, NotFinite, WrongRank
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import METHODS, make_method
from coordinator.config import CoordinatorConfig
from coordinator.founding import check_settings

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
every_method = pytest.mark.parametrize("options", EVERY_METHOD, ids=label)
FACTOR_MEANS = {"fedit", "hetlora", "rb-lora", "replication"}


def test_no_method_is_left_out() -> None:
    assert {options.name for options in EVERY_METHOD} == set(METHODS)


# --- What comes out


@every_method
@few
@given(f=federations())
def test_the_result_is_a_global_adapter(options: MethodOptions, f: Federation) -> None:
    f = fitting(f, options)
    merged = merge(f, options)
    factors = merged.factors
    assert factors.lora_A.shape == f.PA.shape
    assert factors.lora_B.shape == f.PB.shape
    assert np.isfinite(factors.lora_A).all()
    assert np.isfinite(factors.lora_B).all()
    assert merged.energy_lost >= 0.0
    if merged.base_change is not None:
        assert product(merged.base_change).shape == product(factors).shape


@every_method
@few
@given(f=federations())
def test_singular_values_are_those_of_the_product(options: MethodOptions, f: Federation) -> None:
    merged = merge(fitting(f, options), options)
    found = np.linalg.svd(product(merged.factors), compute_uv=False)[: f.rank]
    np.testing.assert_allclose(merged.singular_values, found, atol=2e-6 * max(1.0, found[0]))
    assert merged.singular_values.shape == (f.rank,)


@every_method
@few
@given(f=federations())
def test_every_direction_can_still_be_trained(options: MethodOptions, f: Federation) -> None:
    # A gradient G of the update reaches lora_B as G lora_A^T and lora_A as lora_B^T G: one of them must not be zero.
    factors = merge(fitting(f, options), options).factors
    assert np.all(factors.lora_A.any(axis=1) | factors.lora_B.any(axis=0))


@every_method
@few
@given(f=federations())
def test_the_same_input_gives_the_same_bytes(options: MethodOptions, f: Federation) -> None:
    f = fitting(f, options)
    first, second = merge(f, options), merge(f, options)
    assert bytes_of(first.factors) == bytes_of(second.factors)
    assert first.singular_values.tobytes() == second.singular_values.tobytes()
    assert (first.base_change is None) == (second.base_change is None)
    if first.base_change is not None and second.base_change is not None:
        assert bytes_of(first.base_change) == bytes_of(second.base_change)


def bytes_of(factors: Factors) -> tuple[bytes, bytes]:
    return factors.lora_A.tobytes(), factors.lora_B.tobytes()


# --- What must not matter


@every_method
@few
@given(f=federations(), random=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(options: MethodOptions, f: Federation, random: object) -> None:  # I2
    f = fitting(f, options)
    shuffled = list(f.clients)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_same(effect(merge(replace(f, clients=tuple(shuffled)), options)), effect(merge(f, options)), f)


@every_method
@few
@given(f=federations(), times=st.integers(2, 10**6))
def test_only_shares_of_examples_matter(options: MethodOptions, f: Federation, times: int) -> None:  # I5
    f = fitting(f, options)
    scaled = replace(f, clients=tuple(replace(c, num_examples=times * c.num_examples) for c in f.clients))
    assert_same(effect(merge(scaled, options)), effect(merge(f, options)), f)


def with_a_client_in_halves(f: Federation) -> tuple[Federation, Federation]:
    """The federation with all examples doubled, and with the first client as two of half its examples."""
    doubled = tuple(replace(c, num_examples=2 * c.num_examples) for c in f.clients)
    return replace(f, clients=doubled), replace(f, clients=(f.clients[0], f.clients[0], *doubled[1:]))


# hetlora weighs by norms, effective-owners counts heads: to both, two halves are more than one whole.
COUNTS_HEADS = [o for o in EVERY_METHOD if o.name == "hetlora" or o.shrinkage == "effective-owners"]


@pytest.mark.parametrize("options", [o for o in EVERY_METHOD if o not in COUNTS_HEADS], ids=label)
@few
@given(f=federations())
def test_a_client_in_two_halves_changes_nothing(options: MethodOptions, f: Federation) -> None:  # I6
    whole, halves = with_a_client_in_halves(fitting(f, options))
    assert_same(effect(merge(halves, options)), effect(merge(whole, options)), f)


@pytest.mark.parametrize("options", COUNTS_HEADS, ids=label)
def test_a_client_in_two_halves_weighs_more_where_heads_are_counted(options: MethodOptions) -> None:
    whole, halves = with_a_client_in_halves(two_clients(2, 6))
    assert moved(effect(merge(halves, options)), effect(merge(whole, options))) > 0.02


@pytest.mark.parametrize("options", [o for o in EVERY_METHOD if o.name not in FACTOR_MEANS | {"ffa-lora"}], ids=label)
@few
@given(f=federations())
def test_signs_of_pairs_do_not_matter_to_a_mean_of_products(options: MethodOptions, f: Federation) -> None:  # I9
    assert_same(effect(merge(flipped(f), options)), effect(merge(f, options)), f)


@pytest.mark.parametrize("options", [o for o in EVERY_METHOD if o.name in FACTOR_MEANS], ids=label)
def test_signs_of_pairs_matter_to_a_mean_of_factors(options: MethodOptions) -> None:
    f = two_clients(6, 6)
    assert moved(effect(merge(flipped(f), options)), effect(merge(f, options))) > 0.02


def flipped(f: Federation) -> Federation:
    """Every client's products as they were, by other factors."""
    rng = np.random.default_rng(f.seed)
    clients = []
    for c in f.clients:
        signs = rng.choice([-1.0, 1.0], size=c.rank)
        clients.append(replace(c, B=c.B * signs, A=signs[:, None] * c.A))
    return replace(f, clients=tuple(clients))


def two_clients(*ranks: int) -> Federation:
    rng = np.random.default_rng(5)
    clients = tuple(Client(rng.standard_normal((12, r)), rng.standard_normal((r, 10)), 10) for r in ranks)
    return Federation(global_module(rng, 12, 10, 6), clients, seed=5)


def moved(found: np.ndarray, before: np.ndarray) -> float:
    return float(np.linalg.norm(found - before) / np.linalg.norm(before))


@every_method
@few
@given(f=federations())
def test_folding_the_scaling_into_lora_B_changes_nothing(options: MethodOptions, f: Federation) -> None:  # I15
    f = fitting(f, options)
    folded = tuple(replace(c, B=c.scaling * c.B, scaling=1.0) for c in f.clients)
    other = merge(replace(f, clients=folded), options)
    assert bytes_of(other.factors) == bytes_of(merge(f, options).factors)  # exact: powers of two


@every_method
@few
@given(f=federations(trained=False), scaling=st.sampled_from([0.5, 3.0, 16.0]))
def test_a_scaling_that_all_share_scales_the_result(options: MethodOptions, f: Federation, scaling: float) -> None:
    # It stands in lora_B once. Left out, counted twice or taken of one client it would not come out as a factor.
    f = fitting(f, options)
    plain = replace(f, clients=tuple(replace(c, scaling=1.0) for c in f.clients))
    scaled = replace(f, clients=tuple(replace(c, scaling=scaling) for c in f.clients))
    assert_same(effect(merge(scaled, options)), scaling * effect(merge(plain, options)), scaled)


# --- Who decides what


@pytest.mark.parametrize("options", [o for o in EVERY_METHOD if o.energy_threshold >= 0.99], ids=label)
@few
@given(f=federations())
def test_one_client_alone_decides_its_rank(options: MethodOptions, f: Federation) -> None:  # I3
    f = fitting(replace(f, clients=f.clients[:1]), options)
    [client] = f.clients
    above = f.PB[:, client.rank :] @ f.PA[client.rank :] if options.name == "raflora" else 0.0
    if options.shrinkage == "effective-owners":  # n_eff = 1 and kappa = 1: half of the way
        W = 0.5 * (client.update() + f.PB[:, : client.rank] @ f.PA[: client.rank]) + above
    else:
        W = client.update() + above
    U, S, Vt = np.linalg.svd(W)
    assert_same(effect(merge(f, options)), (U[:, : f.rank] * S[: f.rank]) @ Vt[: f.rank], f)


@pytest.mark.parametrize("options", [o for o in EVERY_METHOD if o.name in FACTOR_MEANS - {"rb-lora"}], ids=label)
@few
@given(f=federations())
def test_an_index_that_nobody_owns_is_zero_and_keeps_its_lora_A(options: MethodOptions, f: Federation) -> None:
    rank = max(f.ranks)
    factors = merge(f, options).factors
    assert not factors.lora_B[:, rank:].any()
    assert factors.lora_A[rank:].tobytes() == f.previous.lora_A[rank:].tobytes()


@every_method
@few
@given(f=federations())
def test_without_training_each_method_does_its_own_to_every_direction(options: MethodOptions, f: Federation) -> None:
    # I13. Everybody returns the slice it was sent: index i comes back multiplied by exactly this.
    f = untrained(f)
    q = np.array([sum(c.num_examples for c in f.clients if c.rank > i) for i in range(f.rank)]) / sum(f.num_examples)
    owned = (q > 0).astype(float)
    norms = np.array([np.linalg.norm(c.update()) for c in f.clients])
    z = np.array([sum(n for n, c in zip(norms, f.clients, strict=True) if c.rank > i) for i in range(f.rank)])
    factor = {
        "raflora": np.ones(f.rank),  # a fixed point, under every shrinkage
        "flexlora": q,
        "florist": q,
        "flora": q,
        "fedex-lora": q,
        "ffa-lora": q,
        "fedit": q**2,
        "hetlora": (z / norms.sum()) ** 2,
        "rb-lora": owned,
        "replication": owned,
    }[options.name]
    if options.name == "florist":
        energies = np.cumsum((q * np.linalg.norm(f.PB, axis=0)) ** 2)
        kept = int(np.argmax(energies >= options.energy_threshold * energies[-1] * (1 - 1e-7))) + 1
        factor = np.where(np.arange(f.rank) < kept, q, 0.0) if options.energy_threshold < 1 else q
    np.testing.assert_allclose(effect(merge(f, options)), (f.PB * factor) @ f.PA, atol=1e-6)


# --- What a caller can get wrong


@every_method
def test_updates_that_do_not_fit_are_refused(options: MethodOptions) -> None:
    previous = global_module(np.random.default_rng(7), 6, 4, 2)
    method = make_method(options).merge
    with pytest.raises(InvalidRequest, match="0 updates"):
        method(previous, [], [])
    with pytest.raises(InvalidRequest, match="1 updates with 2"):
        method(previous, [previous], [1, 1])
    with pytest.raises(InvalidRequest, match="num_examples 0"):
        method(previous, [previous], [0])
    with pytest.raises(WrongRank, match="rank 3"):
        method(previous, [Factors(np.zeros((3, 4)), np.zeros((6, 3)))], [1])
    with pytest.raises(AdapterMismatch, match=r"\(4, 6\)"):
        method(previous, [Factors(np.zeros((2, 6)), np.zeros((4, 2)))], [1])


@every_method
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_update_that_is_not_finite_is_refused(options: MethodOptions, poison: float, factor: str) -> None:
    f = fitting(two_clients(2, 6), options)
    updates = [factors_of(c) for c in f.clients]
    poisoned = getattr(updates[1], factor).copy()
    poisoned[1, 1] = poison
    updates[1] = replace(updates[1], **{factor: poisoned})
    with pytest.raises(NotFinite):
        make_method(options).merge(f.previous, updates, f.num_examples)


@pytest.mark.parametrize("name", ["flexlora", "florist", "raflora", "rb-lora"])
def test_a_product_beyond_float32_is_refused(name: str) -> None:
    previous = global_module(np.random.default_rng(7), 6, 4, 2)
    huge = Factors(np.full((2, 4), 1e30), np.full((6, 2), 1e30))
    with pytest.raises(NotFinite, match="beyond float32"):
        make_method(MethodOptions(name)).merge(previous, [huge], [1])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_another_methods_setting_is_refused(name: str) -> None:
    others = {
        "shrinkage": "share",
        "weight_floor": 0.5,
        "kappa": 2.0,
        "energy_threshold": 0.5,
        "prune_share": 0.5,
        "prune_penalty": 0.5,
    }
    assert set(others) == {field.name for field in fields(MethodOptions)} - {"name"}
    for setting, value in others.items():
        if setting not in METHODS[name].settings:
            expected = f"{setting} {value}: {name} has no {setting.replace('_', ' ')}; its settings are: "
            with pytest.raises(ConfigError, match=expected):
                make_method(replace(MethodOptions(name), **{setting: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MethodOptions("raflora", weight_floor=1.5), "from 0 to 1"),
        (MethodOptions("raflora", shrinkage="halves"), "shrinkage halves: one of weight-floor, sqrt-share, "),  # type: ignore[arg-type]
        (MethodOptions("raflora", shrinkage="share", weight_floor=0.5), "belongs to shrinkage 'weight-floor'"),
        (MethodOptions("raflora", kappa=2.0), "belongs to shrinkage 'effective-owners'"),
        (MethodOptions("raflora", shrinkage="effective-owners", kappa=-1.0), "0 or more"),
        (MethodOptions("raflora", shrinkage="effective-owners", kappa=float("inf")), "0 or more"),
        (MethodOptions("raflora", shrinkage="effective-owners", kappa=float("nan")), "0 or more"),
        (MethodOptions("florist", energy_threshold=0.0), "above 0 and up to 1"),
        (MethodOptions("florist", energy_threshold=1.01), "above 0 and up to 1"),
        (MethodOptions("florist", energy_threshold=float("nan")), "above 0 and up to 1"),
        (MethodOptions("hetlora", prune_share=1.0), "from 0 to below 1"),
        (MethodOptions("hetlora", prune_share=float("nan")), "from 0 to below 1"),
        (MethodOptions("hetlora", prune_share=0.5, prune_penalty=-1.0), "0 or more"),
        (MethodOptions("hetlora", prune_penalty=1.0), "without a prune_share"),
        (MethodOptions("flexlora", kappa=float("nan")), "flexlora has no kappa"),
    ],
)
def test_a_value_out_of_range_is_refused(options: MethodOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(options)


# --- In the service


@pytest.mark.parametrize(
    ("aggregation", "refusal"),
    [
        ({"method": "flora"}, "flora: every client, also one that is not invited, .*; run it with raflora simulate"),
        ({"method": "fedex-lora"}, "fedex-lora: every client, .* residual .*; run it with raflora simulate"),
        ({"method": "hetlora", "prune_share": 0.5}, "hetlora: clients prune .*; run it with raflora simulate"),
    ],
)
def test_a_coordinator_refuses_what_it_cannot_serve(
    tmp_path_factory: pytest.TempPathFactory, aggregation: dict[str, object], refusal: str
) -> None:
    settings = settings_of(tmp_path_factory.mktemp("state"), aggregation=aggregation)
    with pytest.raises(ConfigError, match=refusal):
        check_settings(CoordinatorConfig.model_validate(settings))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"flora", "fedex-lora"}))
def test_a_coordinator_serves_all_other_methods(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    settings = settings_of(tmp_path_factory.mktemp("state"), aggregation={"method": name})
    check_settings(CoordinatorConfig.model_validate(settings))
    assert make_method(MethodOptions(name)).freezes_lora_A == (name == "ffa-lora")


def test_a_method_that_changes_the_base_is_not_served() -> None:
    f = two_clients(2, 6)
    for options in EVERY_METHOD:
        method = make_method(options)
        changes_base = merge(fitting(f, options), options).base_change is not None
        assert changes_base == bool(method.service_refusal), options.name
    assert merge(f, FLEXLORA).base_change is None
