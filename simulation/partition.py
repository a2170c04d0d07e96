"""Unequal data: which examples each client holds. Pure and seeded: the same arguments give the same parts."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidRequest

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


def skewed_sample(labels: Sequence[int], name: str, *, count: int, alpha: float, seed: int) -> Indices:
    """One client's examples, from its name alone: its label mixture is drawn from Dirichlet(alpha).

    For clients that do not know how many others there are; two of them may hold the same example. Sorted, no
    repeats; fewer than `count` only if there are fewer examples.
    """
    kinds = np.asarray(labels)
    generator = _generator_for(name, seed)
    present, positions = np.unique(kinds, return_inverse=True)
    mixture = generator.dirichlet(np.full(present.size, alpha))
    # A little of everything, so that no weight is zero and any count can be drawn without repeats.
    weights = (mixture + 1e-6)[positions] / np.bincount(positions)[positions]
    chosen = generator.choice(kinds.size, size=min(count, kinds.size), replace=False, p=weights / weights.sum())
    return np.sort(chosen.astype(np.int64))


def _fill_up(parts: list[list[int]], at_least: int) -> None:
    """Moves examples from the largest part to those that have too few."""
    for part in parts:
        while len(part) < at_least:
            part.append(max(parts, key=len).pop())


def _generator_for(name: str, seed: int) -> Any:
    stream = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(stream[:16], "big")))
