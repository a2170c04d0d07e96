"""The truncated SVD of a large stack: by iteration on the raw factors, and by the product itself where that fails."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from coordinator.aggregation.certificate import Certificate
from coordinator.aggregation.low_rank import LowRank, Matrix, captured_share, completed, truncate_product
from coordinator.aggregation.stack import Stack, Weighted
from coordinator.aggregation.subspace import PROBES, leading_triplets

_MIN_RATIO = 2.5  # of directions to the rank: below it two QR decompositions are faster
_MIN_DIRECTIONS = 128  # below it everything is over in milliseconds
_MIN_SIDE_RANKS = 5  # the layer's smaller side in ranks, beside the probes: the bases need room


def is_large(directions: int, shape: tuple[int, int], rank: int) -> bool:
    """Whether iterating pays for so many stacked directions of a layer of this shape."""
    return directions > max(_MIN_RATIO * rank, _MIN_DIRECTIONS) and min(shape) >= _MIN_SIDE_RANKS * rank + PROBES


def truncate_stack(
    entries: Sequence[Weighted], reserve: Matrix, *, kept_bytes: int, check: Callable[[], None]
) -> LowRank:
    """The best approximation of rank len(reserve) of the weighted sum of the entries' products.

    `reserve` is as in truncate_product. `check` looks at every number and raises NotFinite for one that is not
    finite; it is asked only when the result says that there is one.
    """
    rank = len(reserve)
    stack = Stack(entries, rank, kept_bytes=kept_bytes)
    if np.isfinite(stack.noise):
        found = leading_triplets(
            stack, stack.mean_rows.T.astype(np.float64), rank, noise=stack.noise, rng=_generator(entries)
        )
        if found.is_converged and np.isfinite(found.left).all():
            captured = captured_share(float(np.sum(found.values**2)), found.energy_lost)
            certificate = Certificate("iteration", found.half_passes, found.residual, captured)
            return completed(found.left * found.values, found.right.T, reserve, found.energy_lost, certificate)
    check()
    return _by_product(stack, reserve)


def _by_product(stack: Stack, reserve: Matrix) -> LowRank:
    """For numbers beyond what float32 can multiply, and spectra that do not end: slow, but bounded in memory."""
    result = truncate_product(stack.dense(), np.eye(stack.shape[1]), reserve)
    certificate = Certificate("dense", captured=result.certificate.captured)
    return LowRank(result.left, result.right, result.energy_lost, certificate)


def _generator(entries: Sequence[Weighted]) -> np.random.Generator:
    # A seed of what is merged, never of when: the probes are the same in every process and after every restart.
    shapes = [(*entry.part.shape, entry.part.rank) for entry in entries]
    digest = hashlib.sha256(repr(shapes).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
