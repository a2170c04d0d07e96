"""The truncated SVD under stress: rank-deficient, cancelling, oversized and huge stacks; nothing dies or explodes."""

from dataclasses import replace

import numpy as np
import pytest
from aggregation_cases import (
    FLEXLORA,
    RAFLORA,
    Federation,
    assert_alive,
    assert_same,
    federations,
    global_module,
    merge,
    product,
    projection,
    quick,
    single,
)
from dense_reference import Client, raflora
from hypothesis import given

from common.adapter import Factors
from common.errors import NotFinite
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import make_method


@quick
@given(federations(trained=False))
def test_the_first_rounds_shared_lora_A_leaves_no_dead_direction(f: Federation) -> None:
    # Everybody trains lora_B only, on nested slices of one lora_A: the stack's rank is the largest client's.
    clients = tuple(replace(c, A=f.PA[: c.rank]) for c in f.clients)
    factors = merge(replace(f, clients=clients)).factors
    live = min(max(f.ranks), f.PB.shape[0])
    assert not factors.lora_B[:, live:].any()
    assert_alive(factors)
    np.testing.assert_allclose(projection(factors.lora_A), projection(f.previous.lora_A), atol=1e-5)


@pytest.mark.parametrize("options", [RAFLORA, FLEXLORA])
def test_all_lora_B_zero_keeps_every_direction_of_the_previous_adapter_alive(options: MethodOptions) -> None:
    rng = np.random.default_rng(1)
    previous = global_module(rng, 11, 8, 5, trained=False)
    updates = [Factors(rng.standard_normal((r, 8)), np.zeros((11, r))) for r in (2, 5)]
    merged = make_method(options).merge(previous, updates, [3, 4])
    assert not merged.factors.lora_B.any()
    assert merged.energy_lost == 0.0
    assert_alive(merged.factors)
    np.testing.assert_allclose(np.abs(merged.factors.lora_A), np.abs(previous.lora_A), atol=1e-6)


def test_updates_that_cancel_leave_zero_and_not_noise() -> None:
    rng = np.random.default_rng(2)
    previous = global_module(rng, 12, 9, 4)
    A, B = rng.standard_normal((4, 9)).astype(np.float32), rng.standard_normal((12, 4)).astype(np.float32)
    mixed = Factors(A[::-1], -B[:, ::-1])
    merged = make_method(RAFLORA).merge(previous, [Factors(A, B), mixed], [7, 7])
    assert not merged.factors.lora_B.any()
    assert_alive(merged.factors)


def test_directions_are_alive_when_the_live_ones_left_the_previous_row_space() -> None:
    rng = np.random.default_rng(3)
    previous = global_module(rng, 12, 9, 5)
    merged = make_method(FLEXLORA).merge(
        previous, [Factors(rng.standard_normal((2, 9)), rng.standard_normal((12, 2)))], [1]
    )
    assert np.count_nonzero(merged.factors.lora_B.any(axis=0)) == 2
    assert_alive(merged.factors)


def test_more_directions_than_the_layer_has_sides() -> None:
    rng = np.random.default_rng(4)
    clients = tuple(
        Client(single(rng.standard_normal((7, 4))), single(rng.standard_normal((4, 5))), 2) for _ in range(6)
    )
    f = Federation(global_module(rng, 7, 5, 5), clients, seed=4)
    assert_same(product(merge(f).factors), raflora(f.clients, f.PB, f.PA), f)


def test_huge_but_finite_values_end_in_a_typed_error() -> None:
    previous = global_module(np.random.default_rng(6), 6, 4, 2)
    huge = Factors(np.full((2, 4), 1e30), np.full((6, 2), 1e30))
    with pytest.raises(NotFinite, match="beyond float32"):
        make_method(RAFLORA).merge(previous, [huge], [1])


def test_huge_values_that_fit_stay_finite() -> None:
    previous = global_module(np.random.default_rng(6), 6, 4, 2)
    large = Factors(np.eye(2, 4), np.full((6, 2), 1e37))
    tiny = Factors(np.full((1, 4), 1e-30), np.full((6, 1), 1e-30))
    merged = make_method(RAFLORA).merge(previous, [large, tiny], [1, 1])
    assert np.isfinite(merged.factors.lora_B).all()
    assert_alive(merged.factors)
    expected = 0.5 * product(large)
    expected[:, 1] *= 2
    np.testing.assert_allclose(product(merged.factors), expected, rtol=1e-5, atol=1e31)
