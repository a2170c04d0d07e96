"""FFA-LoRA (arXiv 2403.12313): lora_A is frozen at its seeded first value, clients train and average lora_B alone.

B = sum_k n_k / N s_k B_k, zero-padded to the global rank; A stays what it was. With one common A the mean of the
factors is the mean of the products: there are no cross terms.

- Down and up, per client and layer: m r_k (here (m + n) r_k: the frozen lora_A travels too, so that a worker needs no
  state). Server: O(K m r).
- Known failure: half the trainable numbers; with unequal ranks a direction shrinks by its owners' share q_i a round.
- The paper has equal ranks; slices of one lora_A of orthonormal rows are the natural reading of unequal ones.
"""

from collections.abc import Sequence

import numpy as np

from common.adapter import Factors
from common.errors import AdapterMismatch
from coordinator.aggregation.checks import check_inputs
from coordinator.aggregation.factor_means import as_they_are, mean_factors
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import owned, shares_of

# What a wire of bfloat16 may change of a number (its unit roundoff is 2^-9; this allows for going down and up again).
_WIRE_ROUNDING = 2.0**-8
_WIRE_SMALLEST = 2.0**-24  # of float16, whose small numbers are coarse


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by FFA-LoRA. Raises AdapterMismatch if an update's lora_A is not the previous one's first rows."""
    check_inputs(previous, updates, num_examples)
    for update in updates:
        _check_frozen(previous, update)
    weights = owned([update.rank for update in updates], shares_of(num_examples), previous.rank)
    lora_B, _ = mean_factors(previous, updates, weights)
    return as_they_are(lora_B, previous.lora_A.astype(np.float64))


def _check_frozen(previous: Factors, update: Factors) -> None:
    # Else its lora_B would belong to another lora_A than the one that it is averaged over.
    sent = previous.lora_A[: update.rank].astype(np.float64)
    moved = np.abs(update.lora_A - sent) > _WIRE_ROUNDING * np.abs(sent) + _WIRE_SMALLEST
    if moved.any():
        raise AdapterMismatch(f"an update of rank {update.rank} has trained lora_A, which ffa-lora freezes")


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge, freezes_lora_A=True)


FFA_LORA = MethodFactory("ffa-lora", _make)
