"""Replication (arXiv 2406.17477): what a small client does not own is filled in from the largest clients of the round.

Every client is padded to the round's largest rank with the rows and columns of the mean of those that have it, then
B = sum_k n_k / N s_k B_k and A = sum_k n_k / N A_k.

- Down and up, per client and layer: (m + n) r_k. Server: O(K (m + n) r).
- Known failure: cross terms, as all factor means; the largest clients speak for everybody who is smaller, also for
  those that own an index themselves but not all; an index above the round's largest rank becomes zero.
- Read as a description of small and large clients, not as code. With several levels everybody is filled from the
  largest clients of the round; with two it is the factor mean of every partition.
"""

from collections.abc import Sequence

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.checks import check_inputs
from coordinator.aggregation.factor_means import as_they_are, mean_factors
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import owned, shares_of


def replication_weights(ranks: Sequence[int], num_examples: Sequence[int], global_rank: int) -> Matrix:
    """[clients, global_rank]: the own share, and for the largest clients what the others leave of an index."""
    shares = shares_of(num_examples)
    largest = max(ranks)
    weights = owned(ranks, shares, global_rank)
    top = np.where(np.asarray(ranks) == largest, shares, 0.0)
    left_open = np.where(np.arange(global_rank) < largest, 1.0 - weights.sum(axis=0), 0.0)
    return weights + np.outer(top / top.sum(), left_open)


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by replication."""
    check_inputs(previous, updates, num_examples)
    weights = replication_weights([update.rank for update in updates], num_examples, previous.rank)
    return as_they_are(*mean_factors(previous, updates, weights))


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge)


REPLICATION = MethodFactory("replication", _make)
