"""Cohorts whose factors are made up: what they are like decides how hard they are to aggregate.

real    every client starts from its slice of one adapter with a 1/i spectrum and moves by 30 %
first   round 1: everybody has the slice of one lora_A, and a small lora_B
flat    independent Gaussian factors: the average has no gap anywhere, the hardest there is
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.adapter import Array, Factors

GLOBAL_RANK = 64
RANKS = (8, 16, 32, 48, 64)
MOVED = 0.3  # how far a client's factors are from the slice it was sent, relative to their norm
Kind: TypeAlias = Literal["real", "first", "flat"]


@dataclass(frozen=True)
class Case:
    """One layer and one cohort."""

    out_features: int
    in_features: int
    clients: int
    kind: Kind = "real"
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    """What all sides are given."""

    previous: Factors
    updates: list[Factors]
    num_examples: list[int]

    @property
    def directions(self) -> int:
        """The sum of the clients' ranks."""
        return sum(update.rank for update in self.updates)


def inputs_of(case: Case) -> Inputs:
    """The cohort's factors; the same for the same case."""
    rng = np.random.default_rng([case.out_features, case.in_features, case.clients, case.seed])
    U, _ = np.linalg.qr(rng.standard_normal((case.out_features, GLOBAL_RANK)))
    V, _ = np.linalg.qr(rng.standard_normal((case.in_features, GLOBAL_RANK)))
    spectrum = np.zeros(GLOBAL_RANK) if case.kind == "first" else 1.0 / np.arange(1, GLOBAL_RANK + 1)
    previous = Factors(_single(V.T), _single(U * spectrum))
    ranks = [RANKS[k % len(RANKS)] for k in range(case.clients)]
    updates = [_update(case.kind, previous, rank, rng) for rank in ranks]
    return Inputs(previous, updates, [int(n) for n in rng.integers(50, 500, case.clients)])


def _update(kind: Kind, previous: Factors, rank: int, rng: np.random.Generator) -> Factors:
    A, B = previous.lora_A[:rank], previous.lora_B[:, :rank]
    match kind:
        case "real":
            return Factors(_moved(A, rng), _moved(B, rng))
        case "first":
            return Factors(A, _single(1e-3 * rng.standard_normal(B.shape)))
        case "flat":
            return Factors(_single(rng.standard_normal(A.shape)), _single(rng.standard_normal(B.shape)))


def _moved(factor: Array, rng: np.random.Generator) -> Array:
    step = rng.standard_normal(factor.shape)
    return _single(factor + MOVED * np.linalg.norm(factor) / np.linalg.norm(step) * step)


def _single(array: NDArray[Any]) -> Array:
    return np.asarray(array, dtype=np.float32)
