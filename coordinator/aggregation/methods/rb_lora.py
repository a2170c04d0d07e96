"""RB-LoRA (EACL Findings 2026): factor means, each rank index over its owners; then a truncated SVD.

B[:, i] = sum_k n_k / N_i s_k B_k[:, i] and A[i] = sum_k n_k / N_i A_k[i] over the clients of rank > i: the zero-padded
mean with index i scaled back by N / N_i. FediLoRA, RBLA (arXiv 2408.08699) and PreLort (arXiv 2606.15963) average the
same way.

- Down and up, per client and layer: (m + n) r_k. Server: O(K (m + n) r), QR and one small SVD.
- Known failure: cross terms inside every index, which raFLoRA's mean of products does not have; an index that nobody
  of the round owns becomes zero, nothing is carried.
- Their code takes torch.svd's V for its transpose, never applies the weights that the paper is about, and divides by
  a scaling on the way down that it did not multiply by. We do what the paper means. Theirs decomposes B A once for
  each client's rank; the first r_k directions of one decomposition are the same.
"""

from collections.abc import Sequence

from common.adapter import Factors
from coordinator.aggregation.checks import check_inputs
from coordinator.aggregation.factor_means import mean_factors
from coordinator.aggregation.low_rank import truncate_product
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.methods.raflora import raflora_weights
from coordinator.aggregation.stacking import canonical


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by RB-LoRA."""
    check_inputs(previous, updates, num_examples)
    weights = raflora_weights([update.rank for update in updates], num_examples, previous.rank).updates
    lora_B, lora_A = mean_factors(previous, updates, weights)
    return canonical(truncate_product(lora_B, lora_A, reserve=previous.lora_A.astype(float)))


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge)


RB_LORA = MethodFactory("rb-lora", _make)
