"""HetLoRA (arXiv 2401.06432): zero-padded factor means, weighted by the norms of the updates; clients may prune.

B = sum_k z_k s_k B_k and A = sum_k z_k A_k with z_k = ||s_k B_k A_k||_F / sum of all norms, zero-padded to the global
rank; num_examples play no part. Where all norms are zero there is nothing to average. Self-pruning (prune_share gamma
above 0): a client trains with the penalty ||B[:, t:]|| ||A[t:]||, t = floor(gamma r), and goes on at rank t if that
product shrank in training.

- Down and up, per client and layer: (m + n) r_k. Server: O(K (m + n) r^2), the norms included.
- Known failure: FedIT's (cross terms, and q^2 a round on what few clients own); large updates have more say, whoever
  made them large (a hot learning rate, poison); ranks only shrink.
- The paper's own code was not to be had. A client here has one rank in all its layers, so penalty and decision take
  the tail products summed over the layers. Another repository pads changes instead of factors: that does not collapse,
  and is another method.
"""

from collections.abc import Sequence

import numpy as np

from common.adapter import Adapter, Factors, shrunk_rank
from common.errors import ConfigError
from coordinator.aggregation.checks import check_inputs
from coordinator.aggregation.factor_means import as_they_are, mean_factors
from coordinator.aggregation.low_rank import product_singular_values
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import owned

_REFUSAL = "clients prune their own rank in training, which the protocol does not carry (prune_share 0 can be served)"


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by HetLoRA."""
    check_inputs(previous, updates, num_examples)
    norms = np.array([_norm_of_product(update) for update in updates])
    total = norms.sum()
    shares = norms / total if total > 0.0 else norms
    return as_they_are(*mean_factors(previous, updates, owned([u.rank for u in updates], shares, previous.rank)))


def pruned_rank(before: Adapter, after: Adapter, prune_share: float) -> int:
    """The rank at which a client goes on that was sent `before` and trained `after`.

    It is floor(prune_share * rank) if that is at least 1 and training made the directions beyond it smaller, else the
    rank that it has.
    """
    rank = shrunk_rank(after.rank, prune_share)
    return rank if rank > 0 and _tail(after, rank) < _tail(before, rank) else after.rank


def _tail(adapter: Adapter, rank: int) -> float:
    products = (np.linalg.norm(f.lora_B[:, rank:]) * np.linalg.norm(f.lora_A[rank:]) for f in adapter.modules.values())
    return float(sum(products))


def _norm_of_product(factors: Factors) -> float:
    # By its singular values: exact where tr(B^T B A A^T) would cancel, and never m x n.
    return float(np.linalg.norm(product_singular_values(factors.lora_B.astype(float), factors.lora_A.astype(float))))


def _make(options: MethodOptions) -> Method:
    if options.prune_penalty > 0.0 and options.prune_share == 0.0:
        raise ConfigError(f"prune_penalty {options.prune_penalty}: without a prune_share there is nothing to penalise")
    return Method(options.name, merge, service_refusal=_REFUSAL if options.prune_share > 0.0 else "")


HETLORA = MethodFactory("hetlora", _make, ("prune_share", "prune_penalty"))
