"""The leading singular triplets of an operator by warm-started block Golub-Kahan iteration.

A half pass is one multiplication of a block of columns by the operator or by its transpose. Two bases grow in turn,
P of the row space and Q of the column space, and T = Q^T W P is all that has to be decomposed: its truncated SVD is
the best that the two bases can say. It is subspace iteration that forgets nothing, so that a good start needs four half
passes and a flat spectrum a few more. Two bases that have settled may both be blind to the same directions: fresh
random columns look for those before the end. Panels, T and everything small are float64. Nothing here knows clients
or files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from common.adapter import Array
from coordinator.aggregation.low_rank import Matrix

TOLERANCE = 1e-8  # of the error over that of the optimal truncation
MAX_HALF_PASSES = 30
_PROBED = 3  # the half pass that multiplies the probes too
PROBES = 8  # random columns beside the second block: they meet what the start cannot see, and what is cut off
# A random frame of PROBES columns meets a given direction among N with a square below this over N once in 4 million.
_MET = 0.1
_LOOK = 2  # half passes of a look at most
_REFUSED = 1e-2  # a residual, over the last value, with which nothing has converged whatever is predicted
_GRADED = 1e3  # of the condition: beyond it a panel is orthonormalised twice
_SINGULAR = 1e6  # beyond it the gram matrix, whose condition is the square, says too little
_SQUARED = 1e-3  # of the largest value: down to it the squares' eigenvectors are as good as singular vectors
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


@dataclass(frozen=True)
class _Core:
    """T between two half passes."""

    T: Matrix  # [columns of Q, columns of P]
    rank: int

    @cached_property
    def ritz(self) -> _Ritz:
        """Its SVD, for whoever asks: not after every half pass."""
        return _ritz_of(self.T, self.rank)


@dataclass(frozen=True)
class _Outside:
    """What a half pass found outside of the basis, and the core that it was not yet part of."""

    core: _Core
    gram: Matrix  # of the images of the newest block, without their part within the basis
    is_right: bool  # whether the block was one of P

    def residual(self) -> float:
        """Of the triplets of that core: their part in the block that was multiplied, as it came out."""
        vectors = self.core.ritz.right if self.is_right else self.core.ritz.left
        parts = vectors[len(vectors) - len(self.gram) :]
        return float(np.sqrt(max(np.sum(parts * (self.gram @ parts)), 0.0)))


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


class _Basis:
    """Orthonormal columns that become more; room is made for several blocks at once."""

    def __init__(self, block: Matrix, rows: int, room: int) -> None:
        self._columns = np.empty((rows, room))
        self.width = 0
        self.append(block)

    @property
    def columns(self) -> Matrix:
        """[rows, width], a view."""
        return self._columns[:, : self.width]

    def append(self, block: Matrix) -> None:
        """Columns that are orthonormal, and orthogonal to all others."""
        end = self.width + block.shape[1]
        if end > self._columns.shape[1]:
            grown = np.empty((len(self._columns), 2 * end))
            grown[:, : self.width] = self.columns
            self._columns = grown
        self._columns[:, self.width : end] = block
        self.width = end

    def project(self, panel: Matrix) -> Matrix:
        """The coefficients of a panel's part within the basis, which is taken out of the panel."""
        coefficients: Matrix = self.columns.T @ panel
        panel -= self.columns @ coefficients
        return coefficients


class _Iteration:
    """The bases as they grow. An object because every half pass needs all that came before it."""

    def __init__(self, operator: Operator, start: Matrix, rank: int, *, noise: float, rng: np.random.Generator) -> None:
        self._operator, self._rank, self._noise, self._rng = operator, rank, noise, rng
        out_features, in_features = operator.shape
        self._new = _filled(start, rank, rng)  # the block that the next half pass multiplies
        self._P = _Basis(self._new, in_features, 3 * (rank + PROBES))
        self._Q = _Basis(np.zeros((out_features, 0)), out_features, 2 * (rank + PROBES))
        self._core = _Core(np.zeros((0, rank)), rank)
        self._steps = 0  # half passes that let a basis grow, forward and backward in turn
        self._looks = 0  # half passes that looked for what both bases miss
        self._probes = PROBES  # columns of the next look
        self._is_looked_for = False  # whether the last look found nothing above the last triplet
        self._is_settled = False  # whether the bases gain no more by themselves
        self._fresh = rank  # columns of the newest block without the probes
        self._gram: Matrix = np.zeros((0, 0))  # of what the last half pass found outside of the basis
        self._outside = _Outside(self._core, np.zeros((0, 0)), is_right=True)
        self._total = 0.0  # the operator's energy, estimated once the probes are multiplied

    @property
    def is_over(self) -> bool:
        """Whether another half pass would gain nothing, or cannot be afforded."""
        needed = _LOOK + 1 if self._is_settled else 1
        return self.is_converged or self._steps + self._looks + needed > MAX_HALF_PASSES

    @property
    def is_converged(self) -> bool:
        """Whether the remaining gain is below the tolerance, and nothing large was found outside of both bases."""
        return self._is_looked_for and self._is_settled

    def advance(self) -> None:
        """One half pass, and a look for what is hidden before it if nothing else is to be gained."""
        if self._is_settled and not self._finds_hidden():
            return
        self._steps += 1
        if self._steps % 2:
            self._forward()
        else:
            self._backward()
        self._is_settled = self._gains_nothing()

    def result(self) -> Triplets:
        """What the bases hold now."""
        ritz = self._core.ritz
        values = ritz.values[: self._rank]
        live = int(np.count_nonzero(values > self._noise))
        values = values[:live]
        return Triplets(
            left=self._Q.columns @ ritz.left[:, :live],
            values=values,
            right=self._P.columns @ ritz.right[:, :live],
            energy_lost=self._lost(),
            residual=self._outside.residual() / float(values[-1]) if live else 0.0,
            half_passes=self._steps + self._looks,
            is_converged=self.is_converged,
        )

    def _forward(self) -> None:
        known = self._P.width
        if self._steps == _PROBED:
            probes = _outside(self._P.columns, self._rng.standard_normal((self._operator.shape[1], PROBES)))
            self._P.append(probes)
            self._new = np.hstack([self._new, probes])
        images = _multiplied(self._operator.forward, self._new)
        if self._steps == _PROBED:
            beyond = float(np.sum(images[:, -PROBES:] ** 2)) * (self._operator.shape[1] - known) / PROBES
        coefficients = self._Q.project(images)
        block, triangle, gram = orthonormal(images, self._noise)
        self._found(gram, is_right=True)
        old = self._P.width - self._new.shape[1]
        above = np.hstack([self._core.T[:, :old], coefficients])
        below = np.hstack([np.zeros((len(triangle), old)), triangle])
        self._core = _Core(np.vstack([above, below]), self._rank)
        self._Q.append(block)
        self._new, self._fresh = block, block.shape[1]
        if self._steps == _PROBED:
            self._total = float(np.sum(self._core.T[:, :known] ** 2)) + beyond

    def _backward(self) -> None:
        images = _multiplied(self._operator.backward, self._new)
        coefficients = self._P.project(images)
        block, triangle, gram = orthonormal(images, self._noise)
        self._found(gram, is_right=False)
        # T does not know yet what a look added to Q.
        T = np.vstack([self._core.T, coefficients[:, self._fresh :].T])
        beside = np.zeros((self._Q.width, block.shape[1]))
        beside[self._Q.width - self._new.shape[1] :] = triangle.T
        self._core = _Core(np.hstack([T, beside]), self._rank)
        self._P.append(block)
        self._new, self._fresh = block, block.shape[1]

    def _finds_hidden(self) -> bool:
        """Multiply fresh probes, there and back, by what neither basis knows; what is too large joins the newest block.

        More directions of equal value than there were probes leave a part that no Krylov space of theirs reaches.
        What the look measures is a lower bound, so that nothing is ever added in vain.
        """
        # One basis is finished: all its images lie within the other one, whose newest block is not multiplied yet.
        finished, other = (self._P, self._Q) if self._steps % 2 else (self._Q, self._P)
        there, back = self._operator.forward, self._operator.backward
        if finished is self._Q:
            there, back = back, there
        rows, last = len(finished.columns), self._last()
        unknown = rows - finished.width
        count = min(self._probes, unknown)
        self._is_looked_for = True
        if count == 0:
            return False
        images = _multiplied(there, _outside(finished.columns, self._rng.standard_normal((rows, count))))
        self._looks += 1
        self._total = float(np.sum(self._core.T**2) + np.sum(images**2) * unknown / count)
        other.project(images)
        if _length(images) * (unknown / _MET) ** 0.5 > last:
            block, _, _ = orthonormal(images, 0.0)
            images = _multiplied(back, block)
            self._looks += 1
            finished.project(images)
            if _length(images) > last:
                other.append(block)
                self._new = np.hstack([self._new, block])
                self._probes = max(PROBES, self._rank)  # where there is one there are more
                self._is_looked_for = False
        self._is_settled = self._is_looked_for and self._gains_nothing()
        return not self._is_looked_for

    def _last(self) -> float:
        """The least value that a direction needs to be one of the triplets."""
        values = self._core.ritz.values
        return max(float(values[self._rank - 1]) if len(values) >= self._rank else 0.0, self._noise)

    def _gains_nothing(self) -> bool:
        """Whether the bases gain no more by themselves. The probes must have been multiplied for that."""
        if self._steps < _PROBED:
            return False
        # Rounding leaves a residual of its own, however small the last value is.
        rounding = self._noise * self._rank**0.5
        if self._outside.residual() > max(_REFUSED * self._last(), rounding):
            return False
        return bool(self._new.shape[1] == 0 or self._remaining() <= self._allowed())

    def _found(self, gram: Matrix, *, is_right: bool) -> None:
        self._gram = gram
        if self._fresh:  # else the probes alone were multiplied, which the triplets do not have yet
            self._outside = _Outside(self._core, gram[: self._fresh, : self._fresh], is_right=is_right)

    def _remaining(self) -> float:
        """The energy that further half passes would add to the triplets, to first order.

        A triplet's residual is its part in the newest block times what that block leads to; the latter is not known
        yet, and is taken for as large as what led to the block. A close next value slows the convergence down.
        """
        ritz = self._core.ritz
        vectors, values = ritz.right if self._steps % 2 == 0 else ritz.left, ritz.values
        live = min(self._rank, int(np.count_nonzero(values > self._noise)))
        parts = vectors[len(vectors) - self._new.shape[1] :, :live]
        residuals = float(np.linalg.norm(self._gram, 2)) * np.sum(parts**2, axis=0)
        following = values[live] if live < len(values) else 0.0
        gaps = np.maximum(values[:live] ** 2 - following**2, _ROUNDOFF * values[:live] ** 2)
        return float(np.sum(residuals * values[:live] ** 2 / gaps))

    def _allowed(self) -> float:
        # An error of TOLERANCE over the optimum is twice that in energy. What float32 cannot hold is not gained either.
        return 2.0 * TOLERANCE * self._lost() + (_ROUNDOFF * float(np.linalg.norm(self._core.ritz.values))) ** 2

    def _lost(self) -> float:
        values = self._core.ritz.values
        lost = max(self._total - float(np.sum(values[: self._rank] ** 2)), float(np.sum(values[self._rank :] ** 2)))
        return lost if lost > self._noise**2 else 0.0


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
    if len(triangle) == 0:
        return None
    inverse = np.linalg.inv(triangle)
    # The sides of a triangle do not bound its condition, the norms of the two do.
    reach = float(np.linalg.norm(inverse))  # no direction of the panel is shorter than one over it
    condition = float(np.linalg.norm(triangle)) * reach / len(triangle)
    if not (reach * floor < 1.0 and condition < _SINGULAR):
        return None
    return panel @ inverse, triangle, condition > _GRADED


def _cholesky(gram: Matrix) -> Matrix:
    """The upper triangle."""
    return np.asarray(np.linalg.cholesky(gram).T, dtype=np.float64)


def _by_eigenvalues(panel: Matrix, gram: Matrix, floor: float) -> tuple[Matrix, Matrix, bool]:
    squares, vectors = np.linalg.eigh(gram)
    largest = float(squares[-1]) if len(squares) else 0.0
    kept = squares > max(floor**2, largest / _SINGULAR**2)
    roots = np.sqrt(squares[kept])
    return panel @ (vectors[:, kept] / roots), roots[:, None] * vectors[:, kept].T, True


def _multiplied(half: Callable[[Array], Array], columns: Matrix) -> Matrix:
    return half(columns.astype(np.float32)).astype(np.float64)


def _length(panel: Matrix) -> float:
    """The 2-norm, of few columns."""
    return float(np.sqrt(max(np.linalg.eigvalsh(panel.T @ panel)[-1], 0.0)))


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
