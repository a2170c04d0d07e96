"""Unequal data: which examples each client holds. Pure and seeded: the same arguments give the same parts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidRequest
from simulation.seeds import seeded_generator

Indices = NDArray[np.int64]


def dirichlet_partition(
    labels: Sequence[int], num_clients: int, *, alpha: float, seed: int, at_least: int = 1
) -> list[Indices]:
    """Splits the examples among clients: each label's shares are drawn from Dirichlet(alpha).

    Every example goes to exactly one client and every client gets `at_least` so many; a small alpha means that
    clients see few labels, a large one that all see the same mixture. Indices are sorted.
    Raises InvalidRequest if there are too few examples.
    """
    kinds = np.asarray(labels)
    if num_clients < 1 or alpha <= 0 or kinds.size < num_clients * at_least:
        raise InvalidRequest(
            f"partition: {kinds.size} examples, {num_clients} clients with at least {at_least} each, alpha {alpha}"
        )
    # The seed itself, not a stream of it: published divisions of the demo's digits were drawn so.
    generator = np.random.Generator(np.random.PCG64(seed))
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for kind in np.unique(kinds):
        members = generator.permutation(np.flatnonzero(kinds == kind))
        shares = generator.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * members.size).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.extend(int(index) for index in chunk)
    _fill_up(parts, at_least)
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def iid_partition(num_examples: int, num_clients: int, *, seed: int) -> list[Indices]:
    """Splits the examples among clients at random, as evenly as can be. Indices are sorted. Raises InvalidRequest."""
    if not 1 <= num_clients <= num_examples:
        raise InvalidRequest(f"partition: {num_examples} examples cannot be divided among {num_clients} clients")
    order = seeded_generator("iid", seed).permutation(num_examples)
    return [np.sort(part.astype(np.int64)) for part in np.array_split(order, num_clients)]


def shard_partition(
    labels: Sequence[int], num_clients: int, *, shards_per_client: int, seed: int, at_least: int = 1
) -> list[Indices]:
    """Sorts the examples by label, cuts them into equal runs and deals every client so many of them at random.

    Every example goes to exactly one client; who would have fewer than `at_least` takes from who has most. Indices
    are sorted. Raises InvalidRequest if there are too few examples.
    """
    kinds, num_shards = np.asarray(labels), num_clients * shards_per_client
    if num_shards < 1 or kinds.size < max(num_shards, num_clients * at_least):
        raise InvalidRequest(
            f"partition: {kinds.size} examples, {num_clients} clients with {shards_per_client} shards and at least "
            f"{at_least} examples each"
        )
    generator = seeded_generator("shards", seed)
    shuffled = generator.permutation(kinds.size)  # or the file's order would say which examples share a shard
    shards = np.array_split(shuffled[np.argsort(kinds[shuffled], kind="stable")], num_shards)
    dealt = generator.permutation(num_shards).reshape(num_clients, shards_per_client)
    parts = [[int(index) for shard in own for index in shards[shard]] for own in dealt]
    _fill_up(parts, at_least)
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def natural_partition(groups: Sequence[str], num_clients: int, *, seed: int, at_least: int = 1) -> list[Indices]:
    """Divides the clients evenly among the groups that the data itself has; inside a group at random, evenly.

    `groups` names each example's group. What does not come out even goes to the largest groups; with more groups than
    clients each client gets several whole groups. Indices are sorted. Raises InvalidRequest, naming the group, if a
    client would get fewer than `at_least`: taking from another group would blur what the data is divided by.
    """
    members = {name: np.flatnonzero(np.asarray(groups, dtype=str) == name) for name in sorted(set(groups))}
    generator = seeded_generator("natural", seed)
    parts: list[Indices] = []
    if 1 <= num_clients < len(members):
        dealt = [list(members)[index] for index in generator.permutation(len(members))]
        hands = [dealt[client::num_clients] for client in range(num_clients)]
        named = [(" and ".join(hand[:3]), np.concatenate([members[name] for name in hand])) for hand in hands]
    else:
        named = []
        for name, clients in _shared_out(members, num_clients).items():
            order = generator.permutation(members[name])
            named += [(name, part) for part in np.array_split(order, clients)]
    for name, part in named:
        if part.size < at_least:
            raise InvalidRequest(
                f"partition: group {name!r} gives a client {part.size} examples, at least {at_least} are wanted; "
                "lower min_examples or the number of clients"
            )
        parts.append(np.sort(part.astype(np.int64)))
    return parts


def skewed_sample(labels: Sequence[int], name: str, *, count: int, alpha: float, seed: int) -> Indices:
    """One client's examples, from its name alone: its label mixture is drawn from Dirichlet(alpha).

    For clients that do not know how many others there are; two of them may hold the same example. Sorted, no
    repeats; fewer than `count` only if there are fewer examples.
    """
    kinds = np.asarray(labels)
    generator = seeded_generator(name, seed)
    present, positions = np.unique(kinds, return_inverse=True)
    mixture = generator.dirichlet(np.full(present.size, alpha))
    # A little of everything, so that no weight is zero and any count can be drawn without repeats.
    weights = (mixture + 1e-6)[positions] / np.bincount(positions)[positions]
    chosen = generator.choice(kinds.size, size=min(count, kinds.size), replace=False, p=weights / weights.sum())
    return np.sort(chosen.astype(np.int64))


def _shared_out(members: Mapping[str, Indices], num_clients: int) -> dict[str, int]:
    """How many clients each group has."""
    if not members or num_clients < 1:
        raise InvalidRequest(f"partition: {len(members)} groups cannot be divided among {num_clients} clients")
    each, left = divmod(num_clients, len(members))
    largest = sorted(members, key=lambda name: (-members[name].size, name))[:left]
    return {name: each + (name in largest) for name in members}


def _fill_up(parts: list[list[int]], at_least: int) -> None:
    """Moves examples from the largest part to those that have too few."""
    for part in parts:
        while len(part) < at_least:
            part.append(max(parts, key=len).pop())
