"""raFLoRA (arXiv 2602.13486): the average of products, each rank index over the clients that own it.

W = sum over the indices i of P_i + lam_i (M_i - P_i), truncated SVD to the global rank. P_i is the previous
global's direction, M_i = sum_k n_k / N_i s_k B_k[:, i] A_k[i] over the owners (the clients of rank > i), N_i their
examples. lam = 1 is the paper; an index that nobody of the round owns keeps P_i. Shrinkage (lam < 1) is our own:

    weight-floor       min(1, q_i / tau)       tau = 0: 1. No client moves an index by more than n_k / (tau N)
    sqrt-share         sqrt(q_i)
    share              q_i                     FedAvg of the changes; the same however factors are rotated
    effective-owners   n_eff / (n_eff + kappa)

with q_i = N_i / N and n_eff = N_i^2 / sum of the owners' n_k^2.

- Down and up, per client and layer: (m + n) r_k. Server: O((m + n) R r) for R = sum r_k stacked
  directions, a few passes over the factors (small stacks orthonormalised whole, and an SVD, O((m + n) R^2 + R^3)).
- Known failure: an index with one noisy owner imports all its noise, and a high constant learning rate diverges
  earlier than FlexLoRA's: both are what shrinkage is for. With equal ranks it is FlexLoRA.
- The paper's own code was not to be had. A public re-implementation leaves out the scaling and zeroes what nobody
  owns; docs/method.md says what we do instead, and why.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from common.errors import ConfigError
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import Method, MethodFactory, MethodOptions, Shrinkage
from coordinator.aggregation.stacking import Weights, combine, owned


def raflora_weights(
    ranks: Sequence[int],
    num_examples: Sequence[int],
    global_rank: int,
    *,
    shrinkage: Shrinkage = "weight-floor",
    weight_floor: float = 0.0,
    kappa: float = 1.0,
) -> Weights:
    """Per rank index the average over its owners; what they do not take stays with the previous global.

    Client k has the weight lam_i n_k / N_i. An index that nobody owns keeps the previous global's direction.
    """
    examples = owned(ranks, num_examples, global_rank)
    # Weights are taken per rank index: a client of rank 4 says nothing about index 5, so it must not
    # dilute it (this is what stops rank collapse).
    owners_total = examples.sum(axis=0)
    total = float(sum(num_examples))
    # lam_i as N_i / lam_i: where lam_i is 1 the divisor is N_i itself, to the bit.
    divisor: Matrix
    match shrinkage:
        case "weight-floor":
            divisor = np.maximum(owners_total, weight_floor * total)
        case "sqrt-share":
            divisor = np.sqrt(owners_total * total)
        case "share":
            divisor = np.full(global_rank, total)
        case "effective-owners":
            # N_i (1 + kappa / n_eff), with n_eff = N_i^2 / sum n_k^2.
            squares = (examples**2).sum(axis=0)
            inverse = np.divide(squares, owners_total, out=np.zeros(global_rank), where=owners_total > 0.0)
            divisor = owners_total + kappa * inverse
    share = np.divide(examples, divisor, out=np.zeros_like(examples), where=examples > 0.0)
    # Exactly zero, not a rounding error, where the owners decide alone: the stack is then without P.
    decided = (owners_total > 0.0) & (divisor == owners_total)
    return Weights(np.where(decided, 0.0, 1.0 - share.sum(axis=0)), share)


def _make(options: MethodOptions) -> Method:
    default = MethodOptions(options.name)
    if options.shrinkage != "weight-floor" and options.weight_floor != default.weight_floor:
        raise ConfigError(f"weight_floor {options.weight_floor}: belongs to shrinkage 'weight-floor'; leave it out")
    if options.shrinkage != "effective-owners" and options.kappa != default.kappa:
        raise ConfigError(f"kappa {options.kappa}: belongs to shrinkage 'effective-owners'; leave it out")
    rule = partial(raflora_weights, shrinkage=options.shrinkage, weight_floor=options.weight_floor, kappa=options.kappa)
    return Method(options.name, partial(combine, rule))


RAFLORA = MethodFactory("raflora", _make, ("shrinkage", "weight_floor", "kappa"))
