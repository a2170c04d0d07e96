"""A round's clients whose stack is large, and how far a merge is from the optimal truncation."""

from dataclasses import dataclass

import numpy as np
from aggregation_cases import RAFLORA, factors_of, single
from dense_reference import Client

from common.adapter import Factors
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import Merged, MethodOptions
from coordinator.aggregation.methods import make_method

RANK = 16
RANKS = (2, 4, 8, 12, 16)


@dataclass(frozen=True)
class Cohort:
    """A global module and a round's clients, enough of them that their stack is large."""

    previous: Factors
    clients: tuple[Client, ...]

    @property
    def PB(self) -> Matrix:
        return self.previous.lora_B.astype(np.float64)

    @property
    def PA(self) -> Matrix:
        return self.previous.lora_A.astype(np.float64)


def cohort(kind: str, seed: int = 0, *, shape: tuple[int, int] = (150, 97), clients: int = 30) -> Cohort:
    """As benchmarks/aggregation/inputs.py makes them: 'real', 'first' or 'flat'."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((shape[0], RANK)))
    V, _ = np.linalg.qr(rng.standard_normal((shape[1], RANK)))
    spectrum = np.zeros(RANK) if kind == "first" else 1.0 / np.arange(1, RANK + 1)
    previous = Factors(V.T, U * spectrum)
    made = []
    for k in range(clients):
        rank = RANKS[k % len(RANKS)]
        A, B = previous.lora_A[:rank].astype(float), previous.lora_B[:, :rank].astype(float)
        match kind:
            case "real":
                A, B = moved(A, rng), moved(B, rng)
            case "first":
                B = 1e-3 * rng.standard_normal(B.shape)
            case "flat":
                A, B = rng.standard_normal(A.shape), rng.standard_normal(B.shape)
        made.append(Client(single(B), single(A), int(rng.integers(50, 500))))
    return Cohort(previous, tuple(made))


def moved(factor: Matrix, rng: np.random.Generator) -> Matrix:
    step = rng.standard_normal(factor.shape)
    return factor + 0.3 * np.linalg.norm(factor) / np.linalg.norm(step) * step


def merge(c: Cohort, options: MethodOptions = RAFLORA) -> Merged:
    merged = make_method(options).merge(
        c.previous, [factors_of(x) for x in c.clients], [x.num_examples for x in c.clients]
    )
    assert merged.certificate.way == "iteration"
    return merged


def excess(found: Matrix, W: Matrix, *, rank: int = RANK) -> float:
    """How much more error than the optimal truncation, less one; of the whole where the optimum has none."""
    values = np.linalg.svd(W, compute_uv=False)
    optimum, energy = float(np.sum(values[rank:] ** 2)), float(np.sum(values**2))
    error = float(np.sum((W - found) ** 2))
    return (error - optimum) / (2.0 * (optimum if optimum > 1e-12 * energy else energy))
