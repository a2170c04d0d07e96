"""The algebra of the methods that average products: stack, then one truncated SVD.

Stack [P | B_k diag(v_k)] against [V^T ; A_k]: the product of the two is the weighted average of everybody's
lora_B lora_A, and it is never formed. A method is only the rule for v_k, the weights of a client's directions,
and for the weights in P, the previous global's own. No client's factors are mixed with another's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.checks import check_finite, check_shapes, to_single
from coordinator.aggregation.iterated import is_large, truncate_stack
from coordinator.aggregation.low_rank import LowRank, Matrix, truncate_product
from coordinator.aggregation.method import Merged
from coordinator.aggregation.stack import KEPT_BYTES, Weighted
from coordinator.aggregation.updates import HeldPart, Updates, parts_of

_HELD_TWICE_BYTES = 256 << 20  # of factors that are in memory anyway: one module's may be copied side by side


@dataclass(frozen=True)
class Weights:
    """What every rank index takes from whom."""

    previous: Matrix  # [global_rank]
    updates: Matrix  # [clients, global_rank], zero where a client does not own the index


# Ranks and num_examples of the clients, and the global rank.
WeightRule: TypeAlias = Callable[[Sequence[int], Sequence[int], int], Weights]


def shares_of(num_examples: Sequence[int]) -> Matrix:
    """Every client's share of all examples, [clients]."""
    examples = np.asarray(num_examples, dtype=np.float64)
    shares: Matrix = examples / examples.sum()
    return shares


def owned(ranks: Sequence[int], values: Sequence[float] | Matrix, global_rank: int) -> Matrix:
    """[clients, global_rank]: a client's value at every index below its rank, else zero."""
    owns = np.asarray(ranks)[:, None] > np.arange(global_rank)
    return np.where(owns, np.asarray(values, dtype=np.float64)[:, None], 0.0)


def combine(rule: WeightRule, previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """Combine one module's factors into the next global factors of the same rank.

    The rows of the previous lora_A are orthonormal, as in every global adapter of these methods. Raises
    InvalidRequest, WrongRank or AdapterMismatch for factors that do not fit together, NotFinite if the result
    leaves float32.
    """
    return canonical(truncated_stack(rule, previous, updates, num_examples))


def truncated_stack(
    rule: WeightRule, previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]
) -> LowRank:
    """The truncated SVD of the weighted average, in float64; raises as combine.

    A small stack is decomposed as it is, a large one by what it does to a few columns (iterated.py).
    """
    check_shapes(previous, updates, num_examples)
    parts = parts_of(updates)
    weights = rule([part.rank for part in parts], num_examples, previous.rank)
    rows = previous.lora_A.astype(np.float64)
    shape = previous.lora_B.shape[0], previous.lora_A.shape[1]
    if is_large(sum(part.rank for part in parts), shape, previous.rank):
        entries = [Weighted(part, share[: part.rank]) for part, share in zip(parts, weights.updates, strict=True)]
        if weights.previous.any():
            entries.insert(0, Weighted(HeldPart(previous), weights.previous))
        kept_bytes = KEPT_BYTES if isinstance(updates, Updates) else _HELD_TWICE_BYTES
        return truncate_stack(entries, rows, kept_bytes=kept_bytes, check=partial(check_finite, updates))
    if isinstance(updates, Updates):
        updates = list(updates)  # read once, and checked by that
    else:
        check_finite(updates)
    left, right = _side_by_side(previous, updates, weights)
    return truncate_product(left, right, reserve=rows)


def _side_by_side(previous: Factors, updates: Sequence[Factors], weights: Weights) -> tuple[Matrix, Matrix]:
    """[P | B_k diag(v_k)] and [V^T ; A_k] in float64, every number converted once; P only where it has a weight."""
    kept = np.flatnonzero(weights.previous)
    directions = len(kept) + sum(update.rank for update in updates)
    left = np.empty((previous.lora_B.shape[0], directions))
    right = np.empty((directions, previous.lora_A.shape[1]))
    np.multiply(previous.lora_B[:, kept], weights.previous[kept], out=left[:, : len(kept)])
    right[: len(kept)] = previous.lora_A[kept]
    at = len(kept)
    for update, share in zip(updates, weights.updates, strict=True):
        end = at + update.rank
        np.multiply(update.lora_B, share[: update.rank], out=left[:, at:end])
        right[at:end] = update.lora_A
        at = end
    return left, right


def canonical(result: LowRank) -> Merged:
    """What the coordinator keeps: lora_B = U S, lora_A = V^T, orthonormal also where the singular value is zero."""
    factors = Factors(to_single(result.right), to_single(result.left))
    singular_values = np.linalg.norm(factors.lora_B.astype(np.float64), axis=0)
    return Merged(factors, singular_values, result.energy_lost, certificate=result.certificate)


def stacked_average(updates: Sequence[Factors], num_examples: Sequence[int]) -> tuple[Matrix, Matrix]:
    """The average of the products as it is, (left [m, R], right [R, n]) with R the sum of the ranks."""
    shares = shares_of(num_examples)
    left = [update.lora_B * share for update, share in zip(updates, shares, strict=True)]
    return np.hstack(left), np.vstack([update.lora_A.astype(np.float64) for update in updates])
