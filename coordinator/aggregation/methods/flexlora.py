"""FlexLoRA (arXiv 2402.11505): the average of all products, whoever owns the index; raFLoRA's main rival.

W = sum_k n_k / N s_k B_k A_k, truncated SVD to the global rank. HLoRA (arXiv 2503.00813) is the same average.

- Down and up, per client and layer: (m + n) r_k. Server: as raFLoRA, O((m + n) R r), R = sum r_k.
- Known failure: rank collapse. Without any training, direction i comes back multiplied by q_i, the share of
  examples of the clients that own it: its energy dies by q_i^2 a round (docs/method.md).
- The authors' code forms the dense product and decomposes that; the result is the same, the cost is not. Theirs
  assumes the scaling 16 / r_k; ours is any.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from coordinator.aggregation.method import Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import Weights, combine, owned


def flexlora_weights(ranks: Sequence[int], num_examples: Sequence[int], global_rank: int) -> Weights:
    """The rank-agnostic average: num_examples over all examples, whoever owns the index."""
    return Weights(np.zeros(global_rank), owned(ranks, num_examples, global_rank) / float(sum(num_examples)))


def _make(options: MethodOptions) -> Method:
    return Method(options.name, partial(combine, flexlora_weights))


FLEXLORA = MethodFactory("flexlora", _make)
