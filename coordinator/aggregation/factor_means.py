"""The algebra of the methods that average factors: lora_B with lora_B, lora_A with lora_A, index by index.

The product of two means is not the mean of the products: what the clients disagree on is lost or invented (the
cross terms 1/2 sum_jk p_j p_k (B_j - B_k)(A_j - A_k)), and a client's scaling counts in lora_B only. That is what
these methods do; the methods of stacking.py exist because of it.
"""

from collections.abc import Sequence

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.checks import to_single
from coordinator.aggregation.low_rank import Matrix, product_singular_values
from coordinator.aggregation.method import Merged


def mean_factors(previous: Factors, updates: Sequence[Factors], weights: Matrix) -> tuple[Matrix, Matrix]:
    """(lora_B [m, global_rank], lora_A [global_rank, n]): each index the sum of the updates' by `weights`.

    `weights` is [clients, global_rank], zero where a client does not own the index. Where all weights are zero
    lora_B is zero, as zero padding makes it, but the lora_A row is the previous one: the product is the same,
    and the direction can still be trained.
    """
    lora_B = np.zeros(previous.lora_B.shape)
    lora_A = np.zeros(previous.lora_A.shape)
    for update, weight in zip(updates, weights, strict=True):
        lora_B[:, : update.rank] += update.lora_B * weight[: update.rank]
        lora_A[: update.rank] += weight[: update.rank, None] * update.lora_A
    silent = ~weights.any(axis=0)
    lora_A[silent] = previous.lora_A[silent]
    return lora_B, lora_A


def as_they_are(lora_B: Matrix, lora_A: Matrix, base_change: Factors | None = None) -> Merged:
    """The mean factors as the next global factors: nothing is decomposed, nothing cut off."""
    factors = Factors(to_single(lora_A), to_single(lora_B))
    singular_values = np.zeros(factors.rank)
    found = product_singular_values(factors.lora_B.astype(np.float64), factors.lora_A.astype(np.float64))
    singular_values[: len(found)] = found
    return Merged(factors, singular_values, 0.0, base_change)
