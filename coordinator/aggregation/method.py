"""Aggregation methods: pure functions of one module's factors, looked up by name.

All are one algebra: stack [P | B_k diag(v_k)] against [V^T ; A_k] and take the truncated SVD. A method is only
the rule for v_k, the weights of a client's directions, and for the weights in P, the previous global's own.
Nothing here knows files, clients' names or the round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.adapter import Factors
from common.errors import AdapterMismatch, ConfigError, InvalidRequest, NotFinite, WrongRank
from coordinator.aggregation.low_rank import Matrix, truncate_product


@dataclass(frozen=True)
class Merged:
    """One module's next global factors, of the previous ones' rank."""

    factors: Factors  # lora_B = U S, lora_A = V^T: orthonormal rows, also where the singular value is zero
    energy_lost: float  # sum of the squared singular values that the truncation cut off


@dataclass(frozen=True)
class Weights:
    """What every rank index takes from whom."""

    previous: Matrix  # [global_rank]
    updates: Matrix  # [clients, global_rank], zero where a client does not own the index


@dataclass(frozen=True)
class MethodOptions:
    """The name of a method and its settings."""

    name: str
    weight_floor: float = 0.0  # raflora only, 0 to 1: the least share of examples that moves an index at full weight


# The previous global factors, the clients' effective factors (scaling folded in) and their num_examples.
Method = Callable[[Factors, Sequence[Factors], Sequence[int]], Merged]
MethodFactory = Callable[[MethodOptions], Method]
# Ranks and num_examples of the clients, and the global rank.
WeightRule = Callable[[Sequence[int], Sequence[int], int], Weights]


def make_method(options: MethodOptions) -> Method:
    """The method of this name with these settings. Raises ConfigError for a name or setting it cannot have."""
    if options.name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigError(f"aggregation method {options.name!r} is not known; the methods are {known}")
    return METHODS[options.name](options)


def raflora_weights(
    ranks: Sequence[int], num_examples: Sequence[int], global_rank: int, *, weight_floor: float = 0.0
) -> Weights:
    """Per rank index the average over its owners; what they do not take stays with the previous global.

    With N_i the owners' examples and N everybody's, client k has the weight n_k / max(N_i, weight_floor N).
    An index that nobody owns keeps the previous global's direction.
    """
    owned = _owned_examples(ranks, num_examples, global_rank)
    # Weights are taken per rank index: a client of rank 4 says nothing about index 5, so it must not
    # dilute it (this is what stops rank collapse).
    owners_total = owned.sum(axis=0)
    divisor = np.maximum(owners_total, weight_floor * float(sum(num_examples)))
    share = np.divide(owned, divisor, out=np.zeros_like(owned), where=owned > 0.0)
    # Exactly zero, not a rounding error, where the owners decide alone: the stack is then without P.
    decided = (owners_total > 0.0) & (divisor == owners_total)
    return Weights(np.where(decided, 0.0, 1.0 - share.sum(axis=0)), share)


def flexlora_weights(ranks: Sequence[int], num_examples: Sequence[int], global_rank: int) -> Weights:
    """The rank-agnostic average: num_examples over all examples, whoever owns the index."""
    owned = _owned_examples(ranks, num_examples, global_rank)
    return Weights(np.zeros(global_rank), owned / float(sum(num_examples)))


def combine(rule: WeightRule, previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """Combine one module's factors into the next global factors of the same rank.

    The rows of the previous lora_A are orthonormal, as in every global adapter. Raises InvalidRequest, WrongRank
    or AdapterMismatch for factors that do not fit together, NotFinite if the result leaves float32.
    """
    _check(previous, updates, num_examples)
    weights = rule([update.rank for update in updates], num_examples, previous.rank)
    rows = previous.lora_A.astype(np.float64)
    left = [previous.lora_B * weights.previous]
    left += [u.lora_B * share[: u.rank] for u, share in zip(updates, weights.updates, strict=True)]
    right = [rows, *(update.lora_A.astype(np.float64) for update in updates)]
    result = truncate_product(np.hstack(left), np.vstack(right), reserve=rows)
    with np.errstate(over="ignore"):
        lora_B = result.left.astype(np.float32)
    if not np.isfinite(lora_B).all():
        raise NotFinite(f"the merged update has the norm {np.linalg.norm(result.left):.3g}, beyond float32")
    return Merged(Factors(result.right.astype(np.float32), lora_B), result.energy_lost)


def _raflora(options: MethodOptions) -> Method:
    if not 0.0 <= options.weight_floor <= 1.0:
        raise ConfigError(f"weight_floor {options.weight_floor}: a share of all examples, from 0 to 1, is expected")
    return partial(combine, partial(raflora_weights, weight_floor=options.weight_floor))


def _flexlora(options: MethodOptions) -> Method:
    if options.weight_floor != 0.0:
        raise ConfigError(f"weight_floor {options.weight_floor}: flexlora has no weight floor; leave it out")
    return partial(combine, flexlora_weights)


METHODS: Mapping[str, MethodFactory] = {"raflora": _raflora, "flexlora": _flexlora}


def _owned_examples(ranks: Sequence[int], num_examples: Sequence[int], global_rank: int) -> Matrix:
    """[clients, global_rank]: a client's num_examples at every index below its rank, else zero."""
    owns = np.asarray(ranks)[:, None] > np.arange(global_rank)
    return np.where(owns, np.asarray(num_examples, dtype=np.float64)[:, None], 0.0)


def _check(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> None:
    if not updates or len(updates) != len(num_examples):
        raise InvalidRequest(f"{len(updates)} updates with {len(num_examples)} num_examples; one each is expected")
    if min(num_examples) < 1:
        raise InvalidRequest(f"num_examples {min(num_examples)}: at least 1 is expected")
    out_features, in_features = previous.lora_B.shape[0], previous.lora_A.shape[1]
    for update in updates:
        found = (update.lora_B.shape[0], update.lora_A.shape[1])
        if found != (out_features, in_features):
            raise AdapterMismatch(f"an update of a layer {found}, but the layer is {(out_features, in_features)}")
        if not 0 < update.rank <= previous.rank:
            raise WrongRank(f"an update of rank {update.rank}; the global adapter has the ranks 1 to {previous.rank}")
