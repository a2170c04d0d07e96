"""The aggregation methods as one writes them on a blackboard: dense products, loops over partitions, float64.

Independent of the code it judges: it imports nothing of ours, knows ranks by partition and not by index, and
takes the SVD of the whole matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Client:
    """One client's trained factors of one layer."""

    B: Matrix  # [m, rank]
    A: Matrix  # [rank, n]
    num_examples: int
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def update(self, low: int = 0, high: int | None = None) -> Matrix:
        return self.scaling * self.B[:, low:high] @ self.A[low:high]


def flexlora(clients: Sequence[Client]) -> Matrix:
    total = sum(c.num_examples for c in clients)
    return sum(c.num_examples / total * c.update() for c in clients)


def raflora(
    clients: Sequence[Client], B: Matrix, A: Matrix, levels: Sequence[int] = (), weight_floor: float = 0.0
) -> Matrix:
    """W = sum over partitions of P_h + lam_h (M_h - P_h), lam_h = min(1, q_h / floor); (B, A) is the previous."""
    total = sum(c.num_examples for c in clients)
    bounds = sorted({c.rank for c in clients} | set(levels) | {B.shape[1]})
    W = np.zeros((B.shape[0], A.shape[1]))
    for low, high in zip([0, *bounds], bounds, strict=False):
        P = B[:, low:high] @ A[low:high]
        owners = [c for c in clients if c.rank >= high]
        N = sum(c.num_examples for c in owners)
        if N == 0:
            W += P
            continue
        M = sum(c.num_examples / N * c.update(low, high) for c in owners)
        lam = min(1.0, N / total / weight_floor) if weight_floor > 0 else 1.0
        W += P + lam * (M - P)
    return W


def average_of_changes(clients: Sequence[Client], B: Matrix, A: Matrix) -> Matrix:
    """FedAvg of deltas: what each client added to the slice it was sent, averaged rank-agnostically."""
    total = sum(c.num_examples for c in clients)
    changes = (c.num_examples / total * (c.update() - B[:, : c.rank] @ A[: c.rank]) for c in clients)
    return B @ A + sum(changes)


def truncated(W: Matrix, rank: int) -> Matrix:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]
