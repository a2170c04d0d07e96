"""What a rank-agnostic average would do to a federation, from its census of ranks alone.

Standard library only: the answer is known before anything is trained (docs/method.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CollapseForecast:
    """How fast the energy above the smallest rank would die under a rank-agnostic average (FlexLoRA)."""

    smallest_rank: int
    largest_rank: int
    factor: float  # the energy just above smallest_rank is multiplied by this each round, in expectation
    half_life_rounds: float  # 0: no collapse to expect
    sentence: str


def forecast_collapse(census: Sequence[tuple[int, int]], cohort: int = 0) -> CollapseForecast:
    """The forecast for clients given as (rank, num_examples), of which `cohort` train in a round (0: all).

    With q the share of examples that clients above the smallest rank hold, a direction just above it is
    multiplied by q each round and its energy by E[q^2] = q^2 + q (1 - q) / m * (K - m) / (K - 1) for m of K
    clients drawn at random: exact where all have as many examples, an estimate otherwise. Higher partitions
    have fewer owners and die faster. A client whose num_examples is not known yet (0) counts as one example.
    """
    if not census:
        return CollapseForecast(0, 0, 1.0, 0.0, "no clients yet: nothing to forecast")
    ranks = [rank for rank, _ in census]
    smallest, largest = min(ranks), max(ranks)
    if len(ranks) == 1:
        sentence = f"one client so far, of rank {smallest}: nothing to forecast"
        return CollapseForecast(smallest, largest, 1.0, 0.0, sentence)
    if smallest == largest:
        sentence = f"all clients have rank {smallest}: no rank collapse to expect"
        return CollapseForecast(smallest, largest, 1.0, 0.0, sentence)
    examples = [max(1, count) for _, count in census]
    share = sum(n for rank, n in zip(ranks, examples, strict=True) if rank > smallest) / sum(examples)
    clients = len(census)
    drawn = min(cohort, clients) if cohort > 0 else clients
    factor = energy_factor(share, clients, drawn)
    half_life_rounds = half_life_of(factor)
    fate = _fate(factor, half_life_rounds)
    sentence = f"under a rank-agnostic average the energy above rank {smallest} would {fate}"
    return CollapseForecast(smallest, largest, factor, half_life_rounds, sentence)


def energy_factor(share: float, clients: int, drawn: int) -> float:
    """E[q^2], for a direction whose owners hold this share of the examples and `drawn` of the clients drawn a round."""
    if clients < 2:
        return share**2
    return share**2 + share * (1.0 - share) / drawn * (clients - drawn) / (clients - 1)


def half_life_of(factor: float) -> float:
    """Rounds until half of the energy is left: 0 where all of it is gone at once, infinity where none ever goes."""
    if factor <= 0.0:
        return 0.0
    return math.inf if factor >= 1.0 else math.log(2.0) / -math.log(factor)


def _fate(factor: float, half_life_rounds: float) -> str:
    if half_life_rounds < 0.95:
        return f"fall to {factor:.2g} of itself every round"
    return f"halve every {half_life_rounds:,.1f} rounds"
