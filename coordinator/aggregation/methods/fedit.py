"""FedIT (arXiv 2305.05644), the plain FedAvg of adapters: lora_B with lora_B, lora_A with lora_A.

B = sum_k n_k / N s_k B_k and A = sum_k n_k / N A_k, zero-padded to the global rank where ranks differ.

- Down and up, per client and layer: (m + n) r_k. Server: O(K (m + n) r).
- Known failure: B A is not the mean of the products (cross terms); zero padding multiplies both factors of an index
  by its owners' share q_i, so that untrained directions shrink by q_i^2 and their energy by q_i^4 a round.
- FedIT itself has equal ranks only; the padding is FLoRA's comparison code's. There the running mean is assigned to a
  misspelt name, so that the first client alone is averaged. We average everybody.
"""

from collections.abc import Sequence

from common.adapter import Factors
from coordinator.aggregation.checks import check_inputs
from coordinator.aggregation.factor_means import as_they_are, mean_factors
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import owned, shares_of


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by FedIT."""
    check_inputs(previous, updates, num_examples)
    weights = owned([update.rank for update in updates], shares_of(num_examples), previous.rank)
    return as_they_are(*mean_factors(previous, updates, weights))


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge)


FEDIT = MethodFactory("fedit", _make)
