"""Who trains at which rank, and who is invited to a round: pure, and the same on every machine."""

import hashlib
from fnmatch import fnmatchcase
from typing import assert_never

from coordinator.federation.state import Client, Profile, RankPolicy, Rules, part_of


def grant_rank(rules: Rules, client_id: str, profile: Profile, order: int) -> int:
    """The rank a client gets: the policy's, but never above what it declares or the global rank."""
    match rules.rank_policy:
        case RankPolicy.DECLARED:
            wanted = profile.max_rank
        case RankPolicy.TABLE:
            matches = (rank for pattern, rank in rules.rank_table if fnmatchcase(client_id, pattern))
            wanted = next(matches, profile.max_rank)
        case RankPolicy.CYCLE | RankPolicy.HARDWARE:
            wanted = rules.rank_levels[order % len(rules.rank_levels)]
        case _:
            assert_never(rules.rank_policy)
    return min(wanted, profile.max_rank, rules.global_rank)


def select_cohort(rules: Rules, clients: tuple[Client, ...], number: int, attempt: int) -> tuple[tuple[str, int], ...]:
    """The clients of a round with their ranks, by client id; a seeded draw without replacement."""
    size = max(rules.min_clients, part_of(rules.fraction, len(clients)))
    drawn = sorted(clients, key=lambda c: _lot(rules.seed, number, attempt, c.client_id))[:size]
    return tuple(sorted((c.client_id, c.rank) for c in drawn))


def _lot(seed: int, number: int, attempt: int, client_id: str) -> bytes:
    # A hash per client: the draw does not depend on the order or number of the others.
    return hashlib.sha256(f"{seed}/{number}/{attempt}/{client_id}".encode()).digest()
