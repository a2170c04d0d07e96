"""Directions that an iteration could lose: too many for its probes, or too small beside its rounding."""

from dataclasses import replace

import numpy as np
import pytest
from aggregation_cases import FLEXLORA, product, single
from aggregation_cohorts import RANK, Cohort, cohort, excess, merge
from dense_reference import Client, flexlora

from common.adapter import Factors
from coordinator.aggregation import subspace
from coordinator.aggregation.low_rank import Matrix

# --- More directions than probes that the start cannot see, of values so close that a Krylov space holds eight of them


def hidden(values: Matrix, *, lora_A_scale: float, has_opposite: bool) -> Cohort:
    """Clients in one row space, and one in another that the mean of the lora_A has not, or hardly."""
    rank = len(values)
    U, V = orthonormal_columns(400, 2 * rank, seed=0), orthonormal_columns(360, 2 * rank, seed=1)
    ordinary = Client(single(U[:, :rank] * np.linspace(1.0, 0.5, rank)), single(V[:, :rank].T), 10)
    B, A = single(U[:, rank:] * values / lora_A_scale), single(V[:, rank:].T * lora_A_scale)
    pair = [Client(B, A, 10), Client(-B, -A, 10)] if has_opposite else [Client(B, A, 10)]
    return Cohort(Factors(single(V[:, :rank].T), single(0.0 * U[:, :rank])), (*[ordinary] * (5 - len(pair)), *pair))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 0.01])
@pytest.mark.parametrize(("value", "scale", "has_opposite"), [(10.0, 1.0, True), (3.0, 1e-4, False)])
def test_more_hidden_directions_than_probes_are_all_found(
    spread: float, value: float, scale: float, has_opposite: bool
) -> None:
    values = value * (1.0 + spread * np.random.default_rng(2).standard_normal(32))
    c = hidden(values, lora_A_scale=scale, has_opposite=has_opposite)
    W = flexlora(c.clients)
    merged = merge(c, FLEXLORA)
    assert excess(product(merged.factors), W, rank=32) <= 1e-7
    expected = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(merged.singular_values, expected[:32], rtol=1e-5)
    assert merged.energy_lost == pytest.approx(np.sum(expected[32:] ** 2), rel=0.01)


def test_a_look_that_can_rule_out_what_is_hidden_costs_one_half_pass() -> None:
    # Everybody in round 1 has the same row space: nothing is left outside of it.
    assert merge(cohort("first")).certificate.half_passes == 4


def test_a_large_residual_is_no_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    c = cohort("flat")
    monkeypatch.setattr(subspace, "TOLERANCE", 1e9)  # the prediction is content with anything
    assert merge(c).certificate.residual <= 0.01
    monkeypatch.setattr(subspace, "_REFUSED", 1e9)
    assert merge(c).certificate.residual > 0.01


# --- Beside the rounding


def test_updates_of_nearly_one_direction_that_cancel_leave_zero() -> None:
    # Then the roundings add up within a client: its directions' norms count by their sum.
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, 97)), rng.standard_normal((150, 1))
    made = []
    for _ in range(50):
        A, B = a + 0.05 * rng.standard_normal((RANK, 97)), b + 0.05 * rng.standard_normal((150, RANK))
        made += [Client(single(B), single(A), 100), Client(single(-B[:, ::-1]), single(A[::-1]), 100)]
    order = rng.permutation(len(made))
    merged = merge(replace(cohort("real"), clients=tuple(made[k] for k in order)), FLEXLORA)
    assert not merged.factors.lora_B.any()


def test_a_lone_owner_s_small_directions_are_kept_and_accurate() -> None:
    # Eight clients of rank 16 with values of 10; a ninth has 16 directions more, of 1e-4, and nobody outweighs those.
    U, V = orthonormal_columns(400, 32, seed=0), orthonormal_columns(360, 32, seed=1)
    small, large = np.full(16, 10.0), np.repeat([10.0, 1e-4], 16)
    clients = [Client(single(U[:, :16] * small), single(V[:, :16].T), 10)] * 8
    clients.append(Client(single(U * large), single(V.T), 10))
    merged = merge(Cohort(Factors(single(V.T), single(0.0 * U)), tuple(clients)))
    np.testing.assert_allclose(merged.singular_values, large, rtol=1e-3)
    lone = merged.factors.lora_B[:, 16:].astype(float) @ merged.factors.lora_A[16:].astype(float)
    np.testing.assert_allclose(lone, 1e-4 * U[:, 16:] @ V[:, 16:].T, atol=1e-3 * 1e-4)


def orthonormal_columns(rows: int, columns: int, *, seed: int) -> Matrix:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]
