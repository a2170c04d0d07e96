"""FLoRIST (arXiv 2506.09199): FlexLoRA's average, cut to the few directions that hold most of its energy.

W = sum_k n_k / N s_k B_k A_k by the SVD of the stack; the shared rank p is the least with
sum_{i < p} S_i^2 >= energy_threshold * sum of all S_i^2, never above the global rank. Directions beyond p are zero,
with rows that can be trained. energy_threshold 1 is FlexLoRA.

- Down, per client and layer: (m + n) p (here (m + n) r_k, p of them not zero); up (m + n) r_k. Server: as FlexLoRA.
  In a large stack the energy beyond the global rank is an estimate (a few per cent), and p can be one or a few off.
- Known failure: FlexLoRA's collapse, and the threshold hastens it; one threshold does not fit every model.
- Only the abstract was to be had. There all clients train at the shared rank p, which can be more than a small one can
  hold; here a client keeps its rank, and gets the first r_k directions as of every method.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.low_rank import LowRank
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.methods.flexlora import flexlora_weights
from coordinator.aggregation.stacking import canonical, truncated_stack


def merge(
    previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int], *, energy_threshold: float
) -> Merged:
    """One module by FLoRIST."""
    return canonical(_cut(truncated_stack(flexlora_weights, previous, updates, num_examples), energy_threshold))


def _cut(result: LowRank, energy_threshold: float) -> LowRank:
    energies = np.sum(result.left**2, axis=0)
    # beyond[p] is the energy that rank p loses. Added from the end: with threshold 1 nothing is too small to count.
    beyond = result.energy_lost + np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    enough = beyond <= (1.0 - energy_threshold) * beyond[0]
    rank = int(np.argmax(enough)) if enough.any() else len(energies)
    left = result.left.copy()
    left[:, rank:] = 0.0
    return replace(result, left=left, energy_lost=float(beyond[rank]))


def _make(options: MethodOptions) -> Method:
    return Method(options.name, partial(merge, energy_threshold=options.energy_threshold))


FLORIST = MethodFactory("florist", _make, ("energy_threshold",))
