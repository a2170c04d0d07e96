"""The leading singular triplets of an operator by warm-started block Golub-Kahan iteration.

A half pass is one multiplication of a block of columns by the operator or by its transpose. Two bases grow in turn,
P of the row space and Q of the column space, and T = Q^T W P is all that has to be decomposed: its truncated SVD is
the best that the two bases can say. It is subspace iteration that forgets nothing, so that a good start needs four half
passes and a flat spectrum a few more. Panels, T and everything small are float64. Nothing here knows clients or files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.adapter import Array
from coordinator.aggregation.low_rank import Matrix

TOLERANCE = 1e-8  # of the error over that of the optimal truncation
MAX_HALF_PASSES = 30
_PROBED = 3  # the half pass that multiplies the probes too
PROBES = 8  # random columns beside the second block: they meet what the start cannot see, and what is cut off
_GRADED = 1e3  # a panel whose columns differ by more is orthonormalised twice
_SINGULAR = 1e6  # beyond it the gram matrix, whose condition is the square, says too little
_SQUARED = 1e-3  # of the largest value: down to it the squares' eigenvectors are as good as singular vectors
_CLEAR = 4.0  # how far above the floor no direction can hide below it, in practice
_ALIKE = 1e-4  # start columns of length one whose combinations are shorter are the same directions
_ROUNDOFF = float(np.finfo(np.float32).eps)


class Operator(Protocol):
    """A matrix that is known by what it does."""

    shape: tuple[int, int]

    def forward(self, columns: Array) -> Array:
        """W @ columns."""

    def backward(self, columns: Array) -> Array:
        """W^T @ columns."""


@dataclass(frozen=True)
class Triplets:
    """What was found: columns of U, values, columns of V; above the noise only, at most as many as asked for."""

    left: Matrix  # [m, live]
    values: Matrix  # [live], descending
    right: Matrix  # [n, live]
    energy_lost: float  # all other singular values squared, estimated
    residual: float  # of W^T U - V S over the last value, Frobenius; measured one half pass before the end
    half_passes: int
    is_converged: bool


@dataclass(frozen=True)
class _Ritz:
    """The SVD of T."""

    left: Matrix  # [columns of Q, at most rank]
    values: Matrix  # all, descending
    right: Matrix  # [columns of P, at most rank]


def leading_triplets(
    operator: Operator, start: Matrix, rank: int, *, noise: float, rng: np.random.Generator
) -> Triplets:
    """The `rank` leading triplets; `start` ([n, l], any columns) is where the row space is expected.

    Singular values up to `noise` are rounding of the operator's own and are nothing. The same input gives the same
    bits on one BLAS thread. Stops when the energy that is still to be gained is less than TOLERANCE allows.
    """
    iteration = _Iteration(operator, start, rank, noise=noise, rng=rng)
    while not iteration.is_over:
        iteration.advance()
    return iteration.result()


class _Iteration:
    """The bases as they grow. An object because every half pass needs all that came before it."""

    def __init__(self, operator: Operator, start: Matrix, rank: int, *, noise: float, rng: np.random.Generator) -> None:
        self._operator, self._rank, self._noise, self._rng = operator, rank, noise, rng
        self._P = _filled(start, rank, rng)
        self._Q: Matrix = np.zeros((operator.shape[0], 0))
        self._T: Matrix = np.zeros((0, rank))
        self._new = self._P  # the block that the next half pass multiplies: the last columns of P or of Q
        self._half_passes = 0
        self._ritz = _Ritz(np.zeros((0, 0)), np.zeros(0), np.zeros((rank, 0)))
        self._coupling = 0.0  # the norm of what the last half pass found outside of the basis
        self._fresh = rank  # columns of the newest block without the probes
        self._residual = 0.0
        self._total = 0.0  # the operator's energy, estimated once the probes are multiplied

    @property
    def is_over(self) -> bool:
        """Whether another half pass would gain nothing, or cannot be afforded."""
        return self.is_converged or self._half_passes >= MAX_HALF_PASSES or self._is_full()

    @property
    def is_converged(self) -> bool:
        """Whether the remaining gain is below the tolerance. The probes must have been multiplied for that."""
        if self._half_passes < _PROBED:
            return False
        return self._new.shape[1] == 0 or self._remaining() <= self._allowed()

    def advance(self) -> None:
        """One half pass."""
        self._half_passes += 1
        if self._half_passes % 2:
            self._forward()
        else:
            self._backward()
        self._ritz = _ritz_of(self._T, self._rank)

    def result(self) -> Triplets:
        """What the bases hold now."""
        values = self._ritz.values[: self._rank]
        live = int(np.count_nonzero(values > self._noise))
        values = values[:live]
        return Triplets(
            left=self._Q @ self._ritz.left[:, :live],
            values=values,
            right=self._P @ self._ritz.right[:, :live],
            energy_lost=self._lost(),
            residual=self._residual / float(values[-1]) if live else 0.0,
            half_passes=self._half_passes,
            is_converged=self.is_converged,
        )

    def _forward(self) -> None:
        probed = self._half_passes == _PROBED
        known = self._P.shape[1]
        if probed:
            probes = _outside(self._P, self._rng.standard_normal((self._P.shape[0], PROBES)))
            self._P = np.hstack([self._P, probes])
            self._new = np.hstack([self._new, probes])
        images = self._multiply(self._operator.forward)
        coefficients = self._Q.T @ images
        panel = images - self._Q @ coefficients
        block, triangle, gram = orthonormal(panel, self._noise)
        above = np.hstack([self._T[:, : self._P.shape[1] - self._new.shape[1]], coefficients])
        below = np.hstack([np.zeros((len(triangle), above.shape[1] - self._new.shape[1])), triangle])
        self._measure(self._ritz.right, gram)
        self._T = np.vstack([above, below])
        self._Q, self._new, self._fresh = np.hstack([self._Q, block]), block, block.shape[1]
        if probed:
            beyond = np.sum(images[:, -PROBES:] ** 2) * (self._P.shape[0] - known) / PROBES
            self._total = float(np.sum(self._T[:, :known] ** 2) + beyond)

    def _backward(self) -> None:
        images = self._multiply(self._operator.backward)
        panel = images - self._P @ (self._P.T @ images)
        block, triangle, gram = orthonormal(panel, self._noise)
        self._measure(self._ritz.left, gram)
        beside = np.zeros((self._T.shape[0], block.shape[1]))
        beside[self._T.shape[0] - self._new.shape[1] :] = triangle.T
        self._T = np.hstack([self._T, beside])
        self._P, self._new, self._fresh = np.hstack([self._P, block]), block, block.shape[1]

    def _multiply(self, half: Callable[[Array], Array]) -> Matrix:
        return half(self._new.astype(np.float32)).astype(np.float64)

    def _measure(self, vectors: Matrix, gram: Matrix) -> None:
        """The residual of the triplets so far: what the half pass found outside of the basis, as they combine it."""
        self._coupling = float(np.sqrt(np.linalg.norm(gram, 2))) if len(gram) else 0.0
        parts = vectors[max(len(vectors) - self._fresh, 0) :]
        if len(parts):
            gram = gram[: len(parts), : len(parts)]  # without the probes, which the triplets do not have yet
            self._residual = float(np.sqrt(max(np.sum(parts * (gram @ parts)), 0.0)))

    def _remaining(self) -> float:
        """The energy that further half passes would add to the triplets, to first order.

        A triplet's residual is its part in the newest block times what that block leads to; the latter is not known
        yet, and is taken for as large as what led to the block. A close next value slows the convergence down.
        """
        vectors = self._ritz.right if self._half_passes % 2 == 0 else self._ritz.left
        values = self._ritz.values
        live = min(self._rank, int(np.count_nonzero(values > self._noise)))
        parts = vectors[len(vectors) - self._new.shape[1] :, :live]
        residuals = self._coupling**2 * np.sum(parts**2, axis=0)
        following = values[live] if live < len(values) else 0.0
        gaps = np.maximum(values[:live] ** 2 - following**2, _ROUNDOFF * values[:live] ** 2)
        return float(np.sum(residuals * values[:live] ** 2 / gaps))

    def _allowed(self) -> float:
        # An error of TOLERANCE over the optimum is twice that in energy. What float32 cannot hold is not gained either.
        return 2.0 * TOLERANCE * self._lost() + (_ROUNDOFF * float(np.linalg.norm(self._ritz.values))) ** 2

    def _lost(self) -> float:
        values = self._ritz.values
        lost = max(self._total - float(np.sum(values[: self._rank] ** 2)), float(np.sum(values[self._rank :] ** 2)))
        return lost if lost > self._noise**2 else 0.0

    def _is_full(self) -> bool:
        """Whether the bases have no room for one more block."""
        room = min(self._P.shape[0] - self._P.shape[1], self._Q.shape[0] - self._Q.shape[1])
        return bool(room < self._new.shape[1] + PROBES)


def orthonormal(panel: Matrix, floor: float) -> tuple[Matrix, Matrix, Matrix]:
    """(basis, triangle, gram): panel = basis @ triangle with orthonormal columns, and the panel's own gram matrix.

    Directions of the panel that are no longer than `floor` are left out; then the triangle is none.
    """
    gram = panel.T @ panel
    basis, triangle, is_graded = _by_cholesky(panel, gram, floor) or _by_eigenvalues(panel, gram, floor)
    if is_graded:
        # The gram matrix squares the condition: once more, on a basis that is nearly orthonormal.
        again = _cholesky(basis.T @ basis)
        basis, triangle = basis @ np.linalg.inv(again), again @ triangle
    return basis, triangle, gram


def _by_cholesky(panel: Matrix, gram: Matrix, floor: float) -> tuple[Matrix, Matrix, bool] | None:
    try:
        triangle = _cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    sides = np.diag(triangle)
    if len(sides) == 0 or sides.min() <= max(_CLEAR * floor, sides.max() / _SINGULAR):
        return None
    return panel @ np.linalg.inv(triangle), triangle, bool(sides.max() > _GRADED * sides.min())


def _cholesky(gram: Matrix) -> Matrix:
    """The upper triangle."""
    return np.asarray(np.linalg.cholesky(gram).T, dtype=np.float64)


def _by_eigenvalues(panel: Matrix, gram: Matrix, floor: float) -> tuple[Matrix, Matrix, bool]:
    squares, vectors = np.linalg.eigh(gram)
    largest = float(squares[-1]) if len(squares) else 0.0
    kept = squares > max(floor**2, largest / _SINGULAR**2)
    roots = np.sqrt(squares[kept])
    return panel @ (vectors[:, kept] / roots), roots[:, None] * vectors[:, kept].T, True


def _filled(start: Matrix, rank: int, rng: np.random.Generator) -> Matrix:
    """`rank` orthonormal columns: the start's directions, whatever their lengths, and random ones if they are fewer."""
    lengths = np.linalg.norm(start, axis=0)
    basis, _, _ = orthonormal(start[:, lengths > 0.0] / lengths[lengths > 0.0], _ALIKE)
    if basis.shape[1] < rank:
        columns = rng.standard_normal((len(start), rank - basis.shape[1]))
        basis = np.hstack([basis, _outside(basis, columns)])
    return basis


def _outside(basis: Matrix, columns: Matrix) -> Matrix:
    """As many orthonormal columns, orthogonal to the basis."""
    for _ in range(2):
        columns = columns - basis @ (basis.T @ columns)
    outside, _, _ = orthonormal(columns, 0.0)
    return outside


def _ritz_of(matrix: Matrix, rank: int) -> _Ritz:
    """The singular values of a small matrix and the vectors of the first `rank`."""
    squares, vectors = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    leading = values[:rank]
    if len(leading) and leading[-1] > leading[0] * _SQUARED:
        left = vectors[:, ::-1][:, :rank]
        return _Ritz(left, values, matrix.T @ left / leading)
    # The squares of small values drown in the largest one's rounding.
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return _Ritz(left[:, :rank], values, right[:rank].T)
