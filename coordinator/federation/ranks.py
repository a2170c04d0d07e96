"""Who trains at which rank and why, and who is invited to a round: pure, and the same on every machine."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import assert_never

from common.sizes import human_bytes
from coordinator.federation.state import Client, Measured, Profile, RankPolicy, Rules, part_of

SET_BY_OPERATOR = "set by the operator"
_LOWERED = SET_BY_OPERATOR + ", then lowered to {} when it declared no more; `raflora set-rank` raises it again"


@dataclass(frozen=True)
class Grant:
    """A rank, and why it is this one, in a sentence that begins with whose decision it was."""

    rank: int
    reason: str


def grant_rank(rules: Rules, client_id: str, profile: Profile, order: int) -> Grant:
    """The rank a client gets: the policy's, but never above what it declares or the global rank.

    An evaluator trains nothing, so no policy is about it: it evaluates the slice of the rank that it declares.
    """
    if profile.evaluates_only:
        declared = _declared(rules, profile)
        return Grant(declared.rank, f"evaluator: {declared.reason}")
    match rules.rank_policy:
        case RankPolicy.DECLARED:
            return _declared(rules, profile)
        case RankPolicy.TABLE:
            return _bounded(_from_table(rules, client_id, profile), rules, profile)
        case RankPolicy.CYCLE:
            wanted = rules.rank_levels[order % len(rules.rank_levels)]
            reason = f"cycle: number {order + 1} to join gets {wanted} of {_listed(rules.rank_levels)}"
            return _bounded(Grant(wanted, reason), rules, profile)
        case RankPolicy.HARDWARE:
            return _from_hardware(rules, profile)
        case _:
            assert_never(rules.rank_policy)


def keep_rank(known: Client, profile: Profile) -> Grant:
    """What an operator set stays, whatever the client now brings, but never above what it declares."""
    if known.rank < profile.max_rank:
        was_lowered = known.rank_reason not in ("", SET_BY_OPERATOR)
        return Grant(known.rank, _LOWERED.format(known.rank) if was_lowered else SET_BY_OPERATOR)
    if known.rank == profile.max_rank:
        return Grant(known.rank, known.rank_reason or SET_BY_OPERATOR)
    reason = f"{SET_BY_OPERATOR} to {known.rank}, but never above what it declares ({profile.max_rank})"
    return Grant(profile.max_rank, reason)


def select_cohort(rules: Rules, clients: tuple[Client, ...], number: int, attempt: int) -> tuple[tuple[str, int], ...]:
    """The clients of a round with their ranks, by client id; a seeded draw without replacement."""
    size = max(rules.min_clients, part_of(rules.fraction, len(clients)))
    drawn = sorted(clients, key=lambda c: _lot(rules.seed, number, attempt, c.client_id))[:size]
    return tuple(sorted((c.client_id, c.rank) for c in drawn))


def _declared(rules: Rules, profile: Profile) -> Grant:
    if profile.max_rank > rules.global_rank:
        return Grant(rules.global_rank, f"declared {profile.max_rank}, the global rank is {rules.global_rank}")
    return Grant(profile.max_rank, f"declared {profile.max_rank}")


def _from_table(rules: Rules, client_id: str, profile: Profile) -> Grant:
    for pattern, rank in rules.rank_table:
        if fnmatchcase(client_id, pattern):
            return Grant(rank, f"table: {pattern} gets {rank}")
    return Grant(profile.max_rank, f"table: no line is for it, so what it declares ({profile.max_rank})")


def _from_hardware(rules: Rules, profile: Profile) -> Grant:
    """The largest level that fits the measured memory; the smallest where nothing is known, or nothing fits."""
    highest, levels = min(profile.max_rank, rules.global_rank), sorted(rules.rank_levels)
    allowed = [level for level in levels if level <= highest]
    if not allowed:
        return _bounded(Grant(levels[0], f"hardware: the smallest level is {levels[0]}"), rules, profile)
    if profile.measured is None or profile.memory_bytes == 0:
        what = "not measured" if profile.measured is None else "its memory is not known"
        return Grant(allowed[0], f"hardware: {what}; the smallest level {allowed[0]}; run `raflora probe` there")
    room = rules.memory_share * profile.memory_bytes
    within = f"{100 * rules.memory_share:g} % of {human_bytes(profile.memory_bytes)} ({_measured(profile.measured)})"
    fitting = [level for level in levels if _bytes_at(level, profile.measured) <= room]
    if not fitting:
        why = f"hardware: none of {_listed(levels)} fits {within}"
        return Grant(allowed[0], f"{why}; the smallest level {allowed[0]} may run out of memory")
    if fitting[-1] > allowed[-1]:
        why = f"hardware: {fitting[-1]} of {_listed(levels)} fits {within}, but {allowed[-1]} is the largest level"
        return Grant(allowed[-1], f"{why} not above {_highest(rules, profile)}")
    why = f"hardware: {fitting[-1]} of {_listed(levels)} is the largest that fits {within}"
    return Grant(fitting[-1], why)


def _bounded(wanted: Grant, rules: Rules, profile: Profile) -> Grant:
    highest = min(profile.max_rank, rules.global_rank)
    if wanted.rank <= highest:
        return wanted
    return Grant(highest, f"{wanted.reason}, but never above {_highest(rules, profile)}")


def _highest(rules: Rules, profile: Profile) -> str:
    if profile.max_rank <= rules.global_rank:
        return f"what it declares ({profile.max_rank})"
    return f"the global rank ({rules.global_rank})"


def _bytes_at(rank: int, measured: Measured) -> int:
    return measured.base_bytes + rank * measured.bytes_per_rank


def _measured(measured: Measured) -> str:
    return f"measured {human_bytes(measured.base_bytes)} + {human_bytes(measured.bytes_per_rank)} a rank"


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(map(str, levels))


def _lot(seed: int, number: int, attempt: int, client_id: str) -> bytes:
    # A hash per client: the draw does not depend on the order or number of the others.
    return hashlib.sha256(f"{seed}/{number}/{attempt}/{client_id}".encode()).digest()
