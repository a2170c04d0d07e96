"""FedEx-LoRA (arXiv 2410.09432): factor means as FedIT's, and what they lack is added to the base model.

B and A as in FedIT; the base changes by sum_k n_k / N s_k B_k A_k - B A, so that base and adapter together move by the
exact mean of the products.

- Down, per client and layer: (m + n) r_k and the residual, (m + n) (R + r) in factor form with R the sum of the
  round's ranks (or m n dense); up (m + n) r_k. Server: O(K (m + n) r), nothing is multiplied out.
- Known failure: the base is another one after every round, and everybody must follow, also who was not invited. A
  coordinator cannot serve it; the simulation can run it.
- The paper has equal ranks; with unequal ones the means are zero-padded, and the residual returns what that loses. Its
  code adds the transposed residual, right for GPT-2's Conv1D and wrong, silently for square layers, for nn.Linear.
"""

from collections.abc import Sequence

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.checks import check_inputs, to_single
from coordinator.aggregation.factor_means import as_they_are, mean_factors
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import owned, shares_of, stacked_average

_REFUSAL = (
    "every client, also one that is not invited, would have to fetch a residual of the sum of all ranks in each round, "
    "and the base model would no longer be the released one"
)


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by FedEx-LoRA; the change of the base has the sum of the ranks and the global rank as its rank."""
    check_inputs(previous, updates, num_examples)
    weights = owned([update.rank for update in updates], shares_of(num_examples), previous.rank)
    lora_B, lora_A = mean_factors(previous, updates, weights)
    left, right = stacked_average(updates, num_examples)
    residual = Factors(to_single(np.vstack([right, lora_A])), to_single(np.hstack([left, -lora_B])))
    return as_they_are(lora_B, lora_A, base_change=residual)


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge, service_refusal=_REFUSAL)


FEDEX_LORA = MethodFactory("fedex-lora", _make)
