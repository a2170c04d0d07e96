"""The truncated SVD of a product of factors: its bases are orthonormal, whatever the columns are like."""

import numpy as np
import pytest

from coordinator.aggregation.low_rank import Matrix, truncate_product


def rows_of(width: int, count: int, seed: int = 0) -> Matrix:
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, count)))
    return np.asarray(basis.T, dtype=np.float64)


@pytest.mark.parametrize("rank", [4, 18, 22, 26])
def test_columns_that_only_their_condition_gives_away_come_out_orthonormal(rank: int) -> None:
    """Ones above a diagonal of ones: every side of the triangle is 1, and its condition grows as 2^rank."""
    triangle = np.eye(rank) - np.triu(np.ones((rank, rank)), 1)
    right = triangle @ rows_of(300, rank)
    left = np.random.default_rng(1).standard_normal((200, rank))
    result = truncate_product(left, right, reserve=rows_of(300, rank, seed=2))
    assert np.abs(result.right @ result.right.T - np.eye(rank)).max() < 1e-9
    product = left @ right
    assert np.linalg.norm(result.left @ result.right - product) < 1e-9 * np.linalg.norm(product)


@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-3, 1e-5, 1e-9, 0.0])
def test_columns_that_differ_little_are_as_exact_as_those_that_differ(spread: float) -> None:
    """From well conditioned over twice-orthonormalised to dependent columns, against the dense product."""
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((1, 300))
    right = shared + spread * rng.standard_normal((6, 300))
    left = rng.standard_normal((200, 6))
    result = truncate_product(left, right, reserve=rows_of(300, 8))
    assert np.abs(result.right @ result.right.T - np.eye(8)).max() < 1e-9
    values = np.linalg.svd(left @ right, compute_uv=False)[:6]
    found = np.linalg.norm(result.left, axis=0)[:6]
    assert np.abs(found - values).max() < 1e-9 * values[0]
