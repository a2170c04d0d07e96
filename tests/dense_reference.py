"""The aggregation methods as one writes them on a blackboard: dense products, loops over partitions, float64.

Independent of the code it judges: it imports nothing of ours, knows ranks by partition and not by index, and
takes the SVD of the whole matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Shrink = Callable[[float, float], float]  # of the owners' share and their effective number


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
    clients: Sequence[Client],
    B: Matrix,
    A: Matrix,
    *,
    levels: Sequence[int] = (),
    weight_floor: float = 0.0,
    shrink: Shrink | None = None,
) -> Matrix:
    """W = sum over partitions of P_h + lam_h (M_h - P_h); (B, A) is the previous.

    lam_h = shrink(q_h, n_eff_h), or min(1, q_h / floor) without.
    """
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
        if shrink is not None:
            lam = shrink(N / total, 1.0 / sum((c.num_examples / N) ** 2 for c in owners))
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


# --- Factor means: each pair is (B, A) of the global rank


def shares(clients: Sequence[Client]) -> list[float]:
    total = sum(c.num_examples for c in clients)
    return [c.num_examples / total for c in clients]


def padded(client: Client, rank: int) -> tuple[Matrix, Matrix]:
    B = np.zeros((client.B.shape[0], rank))
    A = np.zeros((rank, client.A.shape[1]))
    B[:, : client.rank], A[: client.rank] = client.scaling * client.B, client.A
    return B, A


def mean_of(pairs: Sequence[tuple[Matrix, Matrix]], weights: Sequence[float]) -> tuple[Matrix, Matrix]:
    B = sum(w * B for w, (B, _) in zip(weights, pairs, strict=True))
    A = sum(w * A for w, (_, A) in zip(weights, pairs, strict=True))
    return B, A


def fedit(clients: Sequence[Client], rank: int) -> tuple[Matrix, Matrix]:
    return mean_of([padded(c, rank) for c in clients], shares(clients))


def hetlora(clients: Sequence[Client], rank: int) -> tuple[Matrix, Matrix]:
    norms = [float(np.linalg.norm(c.update())) for c in clients]
    return mean_of([padded(c, rank) for c in clients], [norm / sum(norms) for norm in norms])


def replication(clients: Sequence[Client], rank: int) -> tuple[Matrix, Matrix]:
    top = [c for c in clients if c.rank == max(c.rank for c in clients)]
    top_B, top_A = mean_of([padded(c, rank) for c in top], shares(top))
    filled = []
    for c in clients:
        B, A = padded(c, rank)
        B[:, c.rank :], A[c.rank :] = top_B[:, c.rank :], top_A[c.rank :]
        filled.append((B, A))
    return mean_of(filled, shares(clients))


def rb_lora(clients: Sequence[Client], rank: int) -> tuple[Matrix, Matrix]:
    """Partition by partition, as FediLoRA and RBLA write it."""
    B, A = np.zeros((clients[0].B.shape[0], rank)), np.zeros((rank, clients[0].A.shape[1]))
    bounds = sorted({c.rank for c in clients})
    for low, high in zip([0, *bounds], bounds, strict=False):
        owners = [c for c in clients if c.rank >= high]
        for share, c in zip(shares(owners), owners, strict=True):
            B[:, low:high] += share * c.scaling * c.B[:, low:high]
            A[low:high] += share * c.A[low:high]
    return B, A


def rb_lora_as_published(clients: Sequence[Client], rank: int) -> tuple[Matrix, Matrix]:
    """The zero-padded mean, index i of both factors scaled by N / N_i."""
    B, A = fedit(clients, rank)
    for i in range(rank):
        share = sum(p for p, c in zip(shares(clients), clients, strict=True) if c.rank > i)
        if share > 0:
            B[:, i], A[i] = B[:, i] / share, A[i] / share
    return B, A


# --- The others


def ffa_lora(clients: Sequence[Client], A: Matrix) -> Matrix:
    """The mean of the lora_B over the common lora_A."""
    W = np.zeros((clients[0].B.shape[0], A.shape[1]))
    for share, c in zip(shares(clients), clients, strict=True):
        W += share * c.scaling * c.B @ A[: c.rank]
    return W


def flora(clients: Sequence[Client]) -> tuple[Matrix, Matrix]:
    """[s_k B_k] beside each other, [p_k A_k] below each other."""
    B = np.hstack([c.scaling * c.B for c in clients])
    return B, np.vstack([share * c.A for share, c in zip(shares(clients), clients, strict=True)])


def florist_rank(W: Matrix, threshold: float, rank: int) -> int:
    energies = np.linalg.svd(W, compute_uv=False) ** 2
    return next((p for p in range(rank) if energies[:p].sum() >= threshold * energies.sum()), rank)


def hetlora_rank(before: Client, after: Client, share: float) -> int:
    t = int(np.floor(share * after.rank))

    def tail(c: Client) -> float:
        return float(np.linalg.norm(c.B[:, t:]) * np.linalg.norm(c.A[t:]))

    return t if t > 0 and tail(after) < tail(before) else after.rank


def factor_mean_error(clients: Sequence[Client]) -> Matrix:
    """What the product of the mean factors lacks of the mean product, for equal ranks."""
    p = shares(clients)
    pairs = [(j, k) for j in range(len(clients)) for k in range(len(clients))]
    B, A = [c.scaling * c.B for c in clients], [c.A for c in clients]
    return sum(0.5 * p[j] * p[k] * (B[j] - B[k]) @ (A[j] - A[k]) for j, k in pairs)
