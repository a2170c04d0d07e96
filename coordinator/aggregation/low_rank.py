"""The truncated SVD of a product of tall factors, without the product.

With m x n the layer and R the number of stacked directions, the largest matrix made here is the core of
min(m, R) x min(n, R): never larger than the stacks themselves, and no m x n matrix while R is below m or n.
Everything is float64. Nothing here knows clients, weights or files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import AdapterMismatch
from coordinator.aggregation.certificate import Certificate

Matrix = NDArray[np.float64]

_INDEPENDENT = 1e-6  # the least part of a reserve row outside all others; orthonormal rows are far above it
_ROUNDOFF = float(np.finfo(np.float64).eps)
# Of the condition in Frobenius norms: up to here one Cholesky decomposition leaves the columns orthonormal to about
# 1e-9, far below float32, in which they are kept; up to there two are as good as Householder's.
_FIT_FOR_ONE = 2e3
_FIT_FOR_TWO = 1e6


@dataclass(frozen=True)
class LowRank:
    """A product `left @ right` in the form in which the global adapter is kept."""

    left: Matrix  # [m, rank], U S: orthogonal columns of descending norm, exactly zero where nothing is left
    right: Matrix  # [rank, n], V^T: orthonormal rows, the dead directions' included
    energy_lost: float  # sum of the squared singular values beyond the rank
    certificate: Certificate


def truncate_product(left: Matrix, right: Matrix, reserve: Matrix) -> LowRank:
    """The best approximation of `left @ right` of rank len(reserve).

    `left` is [m, R], `right` [R, n], both of any R. `reserve` ([rank, n], orthonormal rows) gives the row
    space of the directions that the product leaves empty. The same input gives the same bits on one BLAS
    thread. Raises AdapterMismatch if rows of `reserve` are needed and dependent.
    """
    rank = len(reserve)
    # Directions of weight zero (the previous global's, where the owners decide alone) cost nothing.
    used = left.any(axis=0)
    if not used.all():
        left, right = left[:, used], right[used]
    columns, rows = _compress(left), _compress(right.T)
    U, sigma, Vt = np.linalg.svd(columns.core @ rows.core.T, full_matrices=False)
    sigma = sigma[sigma > _noise_of(left, right)]
    live = min(rank, len(sigma))
    energy_lost = float(np.sum(sigma[live:] ** 2))
    captured = captured_share(float(np.sum(sigma[:live] ** 2)), energy_lost)
    return completed(
        columns.lift(U[:, :live] * sigma[:live]),
        rows.lift(Vt[:live].T).T,
        reserve,
        energy_lost,
        Certificate("exact", captured=captured),
    )


def completed(columns: Matrix, rows: Matrix, reserve: Matrix, energy_lost: float, certificate: Certificate) -> LowRank:
    """The form that the global adapter has, of the live directions alone: `columns` is U S, `rows` V^T."""
    live = len(rows)
    rows = np.vstack([rows, _complete(rows, reserve)])
    signs = _signs(rows)
    left = np.zeros((len(columns), len(reserve)))
    left[:, :live] = columns
    return LowRank(left * signs, rows * signs[:, None], energy_lost, certificate)


def captured_share(captured: float, lost: float) -> float:
    """The share of an energy; all of nothing is 1."""
    return captured / (captured + lost) if lost > 0.0 else 1.0


def product_singular_values(left: Matrix, right: Matrix) -> Matrix:
    """All singular values of `left @ right`, descending, [min(m, n, R)]; exactly zero where there is only noise."""
    core = _compress(left).core @ _compress(right.T).core.T
    sigma = np.linalg.svd(core, compute_uv=False)
    return np.where(sigma > _noise_of(left, right), sigma, np.float64(0.0))


@dataclass(frozen=True)
class _Compressed:
    """A stack as (columns @ transform) @ core, the first of them orthonormal; None is the identity."""

    columns: Matrix | None
    transform: Matrix | None
    core: Matrix

    def lift(self, vectors: Matrix) -> Matrix:
        """Vectors of the core as vectors of the stack."""
        if self.transform is not None:
            vectors = self.transform @ vectors
        return vectors if self.columns is None else self.columns @ vectors


def _compress(stack: Matrix) -> _Compressed:
    if stack.shape[1] >= stack.shape[0]:  # a QR would save nothing
        return _Compressed(None, None, stack)
    thin = _by_cholesky(stack)
    return _Compressed(*thin) if thin is not None else _Compressed(*_by_householder(stack))


def _by_householder(stack: Matrix) -> tuple[Matrix, None, Matrix]:
    basis, core = np.linalg.qr(stack)
    return basis, None, core


def _by_cholesky(stack: Matrix) -> tuple[Matrix, Matrix, Matrix] | None:
    """The same from Gram matrices, several times faster; None for columns that are nearly dependent.

    A Gram matrix squares the condition. Where that matters it is done twice, the second time on columns that are
    nearly orthonormal, which leaves no more than rounding (CholeskyQR2, Fukaya et al. 2014).
    """
    triangle, inverse, condition = _triangle_of(stack)
    if condition <= _FIT_FOR_ONE:
        return stack, inverse, triangle
    if condition > _FIT_FOR_TWO:
        return None
    basis = stack @ inverse
    again, inverse, condition = _triangle_of(basis)
    return (basis, inverse, again @ triangle) if condition <= _FIT_FOR_ONE else None


def _triangle_of(stack: Matrix) -> tuple[Matrix, Matrix, float]:
    """A Gram matrix's upper triangle, its inverse, and a bound of their condition; infinite if there is none."""
    try:
        triangle = np.asarray(np.linalg.cholesky(stack.T @ stack).T, dtype=np.float64)
        inverse = np.asarray(np.linalg.inv(triangle), dtype=np.float64)
    except np.linalg.LinAlgError:
        return stack, stack, np.inf
    # The sides of a triangle say little of its condition; the Frobenius norms bound it.
    return triangle, inverse, float(np.linalg.norm(triangle) * np.linalg.norm(inverse))


def _noise_of(left: Matrix, right: Matrix) -> float:
    # QR and SVD err column by column, so the rounding error of the product is bounded by the sum of the
    # norms of its terms, not by its own norm: updates that cancel leave noise, and noise is not a direction.
    terms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    return float(max(left.shape[0], right.shape[1]) * _ROUNDOFF * terms.sum())


def _complete(rows: Matrix, reserve: Matrix) -> Matrix:
    """As many further orthonormal rows as `reserve` has more than `rows`, out of its row space.

    Gram-Schmidt that takes the reserve row with the largest part outside what is there. With orthonormal
    reserve rows and j rows to go, those parts have squares that sum to at least j, so none taken is tiny.
    """
    missing = len(reserve) - len(rows)
    if missing == 0:
        return np.zeros((0, rows.shape[1]))
    outside = _without(rows, _without(rows, reserve))
    taken: list[Matrix] = []
    for _ in range(missing):
        # Rounded, so that of equal parts the first is taken: rows that nothing touched keep their order.
        best = int(np.argmax(np.round(np.linalg.norm(outside, axis=1), 6)))
        basis = np.vstack([rows, *taken])
        row = _without(basis, outside[best : best + 1])
        norm = float(np.linalg.norm(row))
        if norm < _INDEPENDENT:
            raise AdapterMismatch("the previous lora_A has dependent rows; a global adapter's are orthonormal")
        taken.append(row / norm)
        outside = _without(taken[-1], outside)
    return np.vstack([np.zeros((0, rows.shape[1])), *taken])


def _without(basis: Matrix, rows: Matrix) -> Matrix:
    outside: Matrix = rows - (rows @ basis.T) @ basis
    return outside


def _signs(rows: Matrix) -> Matrix:
    """The sign rule: the largest entry of each row is positive, the first one if several are largest."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(largest < 0.0, -1.0, 1.0)
