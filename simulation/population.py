"""Who takes part in a simulated federation: every client's examples and LoRA rank. Pure and seeded.

The same labels, settings and seed give the same population on every machine; nothing here reads data or trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

import numpy as np

from common.errors import InvalidRequest
from simulation.experiment import ClientsSection
from simulation.partition import (
    Indices,
    dirichlet_partition,
    iid_partition,
    natural_partition,
    shard_partition,
)
from simulation.seeds import seeded_generator


@dataclass(frozen=True, eq=False)
class SimulatedClient:
    """One client: what it can afford and what it holds. Indices are sorted and point into the training data."""

    client_id: str
    rank: int
    train: Indices
    validation: Indices  # held out of its training; what tuning is judged on

    @property
    def num_examples(self) -> int:
        """What it trains on, and what its update weighs."""
        return int(self.train.size)


def make_population(
    labels: Sequence[int], groups: Sequence[str] | None, clients: ClientsSection, *, validation: float, seed: int
) -> tuple[SimulatedClient, ...]:
    """Divides the training data among clients with ranks, ordered by client id.

    `groups` names each example's group, for the natural partition. Raises InvalidRequest if the data cannot be
    divided so.
    """
    parts = _parts(labels, groups, clients, seed)
    ranks = _ranks([part.size for part in parts], clients, seed)
    digits = max(4, len(str(clients.count - 1)))
    population = []
    for number, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
        client_id = f"client-{number:0{digits}}"
        train, held_out = _hold_out(part, validation, client_id, seed)
        population.append(SimulatedClient(client_id, rank, train, held_out))
    return tuple(population)


def rank_counts(ranks: Sequence[int], weights: Sequence[float], count: int) -> tuple[int, ...]:
    """How many of `count` clients have each rank: exact shares, what is left to the largest remainders."""
    shares = [Fraction(weight) for weight in weights] or [Fraction(1)] * len(ranks)
    quotas = [count * share / sum(shares) for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(ranks)), key=lambda level: counts[level] - quotas[level])
    for level in by_remainder[: count - sum(counts)]:
        counts[level] += 1
    return tuple(counts)


def _parts(
    labels: Sequence[int], groups: Sequence[str] | None, clients: ClientsSection, seed: int
) -> Sequence[Indices]:
    count, at_least = clients.count, clients.min_examples
    match clients.partition:
        case "dirichlet":
            return dirichlet_partition(labels, count, alpha=clients.alpha, seed=seed, at_least=at_least)
        case "shards":
            shards = clients.shards_per_client
            return shard_partition(labels, count, shards_per_client=shards, seed=seed, at_least=at_least)
        case "natural":
            if groups is None:
                raise InvalidRequest("partition 'natural': the data has no groups; give group_column or groups_file")
            return natural_partition(groups, count, seed=seed, at_least=at_least)
        case "iid":
            if len(labels) < count * at_least:
                raise InvalidRequest(
                    f"partition: {len(labels)} examples, {count} clients with at least {at_least} each"
                )
            return iid_partition(len(labels), count, seed=seed)
        case _:
            assert_never(clients.partition)


def _ranks(num_examples: Sequence[int], clients: ClientsSection, seed: int) -> list[int]:
    counts = rank_counts(clients.ranks, clients.rank_weights, clients.count)
    held = [rank for rank, count in zip(clients.ranks, counts, strict=True) for _ in range(count)]
    if clients.rank_order == "random":
        return [held[index] for index in seeded_generator("ranks", seed).permutation(len(held))]
    ranks = [0] * len(held)
    poorest_first = sorted(range(len(held)), key=lambda client: (num_examples[client], client))
    for client, rank in zip(poorest_first, sorted(held), strict=True):
        ranks[client] = rank
    return ranks


def _hold_out(part: Indices, share: float, client_id: str, seed: int) -> tuple[Indices, Indices]:
    """What a client trains on, and what it holds out: one example at least if any, and never all."""
    held = 0 if share == 0.0 else min(max(1, round(share * part.size)), part.size - 1)
    order = seeded_generator(f"validation/{client_id}", seed).permutation(part)
    return np.sort(order[held:]), np.sort(order[:held])
