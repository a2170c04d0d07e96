"""Which rank a client is granted and why: every policy, its bounds, and what no policy ever does."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounds import ADA, BOB, CEM, RULES, after, founded, joins, opened, started

from common.errors import InvalidRequest
from coordinator.aggregation.method import MethodOptions
from coordinator.federation.ranks import Grant, grant_rank
from coordinator.federation.requests import MAX_MEMORY_BYTES, Join, SetRank
from coordinator.federation.state import Measured, Profile, RankPolicy, State
from coordinator.stores.entry import Entry
from coordinator.stores.event_codec import event_of, snapshot_of, state_of
from coordinator.warnings import warnings_of

GIB = 1 << 30
LEVELS = (8, 16, 32, 48, 64)
HARDWARE = replace(RULES, global_rank=64, rank_policy=RankPolicy.HARDWARE, rank_levels=LEVELS)
MEASURED = Measured(base_bytes=int(11.2 * GIB), bytes_per_rank=int(0.2 * GIB), micro_batch=4)


def granted(
    memory_bytes: int = 24 * GIB, max_rank: int = 64, measured: Measured | None = MEASURED, **rules: object
) -> Grant:
    profile = Profile(max_rank, 10, memory_bytes=memory_bytes, measured=measured)
    return grant_rank(replace(HARDWARE, **rules), "gpu-1", profile, order=0)  # type: ignore[arg-type]


def probed(client_id: str, memory_bytes: int, max_rank: int = 64, measured: Measured | None = MEASURED) -> Join:
    profile = Profile(max_rank, 10, memory_bytes=memory_bytes, measured=measured)
    return Join(client_id, f"key-of-{client_id}", profile)


# ---------------------------------------------------------------- the policies and their reasons


@pytest.mark.parametrize(
    ("max_rank", "grant"),
    [(16, Grant(16, "declared 16")), (64, Grant(32, "declared 64, the global rank is 32"))],
)
def test_declared(max_rank: int, grant: Grant) -> None:
    assert grant_rank(replace(RULES, global_rank=32), ADA, Profile(max_rank, 10), 0) == grant


@pytest.mark.parametrize(
    ("client_id", "max_rank", "grant"),
    [
        ("gpu-1", 64, Grant(16, "table: gpu-* gets 16")),
        ("gpu-1", 4, Grant(4, "table: gpu-* gets 16, but never above what it declares (4)")),
        ("edge", 64, Grant(32, "table: edge gets 40, but never above the global rank (32)")),
        ("ada", 8, Grant(8, "table: no line is for it, so what it declares (8)")),
        (
            "ada",
            64,
            Grant(32, "table: no line is for it, so what it declares (64), but never above the global rank (32)"),
        ),
    ],
)
def test_table(client_id: str, max_rank: int, grant: Grant) -> None:
    table = (("gpu-*", 16), ("edge", 40))
    rules = replace(RULES, global_rank=32, rank_policy=RankPolicy.TABLE, rank_table=table)
    assert grant_rank(rules, client_id, Profile(max_rank, 10), 0) == grant


@pytest.mark.parametrize(
    ("order", "max_rank", "grant"),
    [
        (4, 8, Grant(4, "cycle: number 5 to join gets 4 of 2, 4, 8")),
        (5, 3, Grant(3, "cycle: number 6 to join gets 8 of 2, 4, 8, but never above what it declares (3)")),
    ],
)
def test_cycle(order: int, max_rank: int, grant: Grant) -> None:
    rules = replace(RULES, rank_policy=RankPolicy.CYCLE, rank_levels=(2, 4, 8))
    assert grant_rank(rules, ADA, Profile(max_rank, 10), order) == grant


def test_hardware_grants_the_largest_level_that_fits() -> None:
    # 90 % of 24 GiB is 21.6 GiB: rank 48 takes 11.2 + 9.6 = 20.8 GiB, rank 64 takes 24.0 GiB.
    assert granted() == Grant(
        48,
        "hardware: 48 of 8, 16, 32, 48, 64 is the largest that fits 90 % of 24.0 GiB "
        "(measured 11.2 GiB + 204.8 MiB a rank)",
    )


@pytest.mark.parametrize(("room", "rank"), [(208, 48), (207, 32), (240, 64), (239, 48)])
def test_what_fits_exactly_fits(room: int, rank: int) -> None:
    assert granted(memory_bytes=room * GIB // 10, memory_share=1.0).rank == rank


def test_hardware_grants_no_level_above_what_is_declared() -> None:
    assert granted(memory_bytes=80 * GIB, max_rank=40) == Grant(
        32,
        "hardware: 64 of 8, 16, 32, 48, 64 fits 90 % of 80.0 GiB (measured 11.2 GiB + 204.8 MiB a rank), "
        "but 32 is the largest level not above what it declares (40)",
    )


def test_where_nothing_fits_the_smallest_level_is_granted_and_said_to_be_too_large() -> None:
    grant = granted(memory_bytes=8 * GIB)
    assert grant.rank == 8
    assert grant.reason == (
        "hardware: none of 8, 16, 32, 48, 64 fits 90 % of 8.0 GiB (measured 11.2 GiB + 204.8 MiB a rank); "
        "the smallest level 8 may run out of memory"
    )


def test_who_was_not_measured_gets_the_smallest_level_and_is_told_what_to_run() -> None:
    assert granted(measured=None) == Grant(8, "hardware: not measured; the smallest level 8; run `raflora probe` there")
    assert granted(memory_bytes=0).reason.startswith("hardware: its memory is not known; the smallest level 8;")


def test_who_declares_less_than_the_smallest_level_gets_what_it_declares() -> None:
    assert granted(max_rank=4) == Grant(4, "hardware: the smallest level is 8, but never above what it declares (4)")


# ---------------------------------------------------------------- what holds for every policy

SIZES = st.integers(0, 200 * GIB)
RANKS = st.integers(1, 300)
MEASUREMENTS = st.none() | st.builds(Measured, st.integers(0, 100 * GIB), st.integers(0, GIB), st.just(1))
PROFILES = st.builds(Profile, max_rank=RANKS, num_examples=st.just(10), memory_bytes=SIZES, measured=MEASUREMENTS)
POLICIES = st.builds(
    lambda policy, levels, global_rank, share: replace(
        RULES,
        rank_policy=policy,
        rank_levels=tuple(levels),
        global_rank=global_rank,
        memory_share=share,
        rank_table=(("gpu-?", levels[0]),),
    ),
    st.sampled_from(RankPolicy),
    st.lists(RANKS, min_size=1, max_size=6),
    RANKS,
    st.floats(0.01, 1.0),
)


@given(rules=POLICIES, profile=PROFILES, order=st.integers(0, 50), name=st.sampled_from(["gpu-1", "ada"]))
def test_a_rank_is_never_above_what_is_declared_or_the_global_one_and_always_has_a_reason(
    rules: object, profile: Profile, order: int, name: str
) -> None:
    grant = grant_rank(rules, name, profile, order)  # type: ignore[arg-type]
    assert 1 <= grant.rank <= min(profile.max_rank, rules.global_rank)  # type: ignore[attr-defined]
    assert grant.reason.split(":")[0].split()[0] == rules.rank_policy.value  # type: ignore[attr-defined]
    assert str(grant.rank) in grant.reason
    assert grant == grant_rank(rules, name, profile, order)  # type: ignore[arg-type]


@given(profile=PROFILES, more=st.integers(0, 100 * GIB), levels=st.lists(RANKS, min_size=1, max_size=6))
def test_more_memory_never_lowers_a_rank(profile: Profile, more: int, levels: list[int]) -> None:
    rules = replace(HARDWARE, rank_levels=tuple(levels), global_rank=300)
    larger = replace(profile, memory_bytes=profile.memory_bytes + more)
    assert grant_rank(rules, ADA, profile, 0).rank <= grant_rank(rules, ADA, larger, 0).rank


@given(profile=PROFILES, levels=st.permutations(LEVELS))
def test_the_order_of_the_levels_says_nothing_about_memory(profile: Profile, levels: list[int]) -> None:
    shuffled = replace(HARDWARE, rank_levels=tuple(levels))
    assert grant_rank(shuffled, ADA, profile, 0) == grant_rank(HARDWARE, ADA, profile, 0)


# ---------------------------------------------------------------- in the federation


def hardware(**rules: object) -> State:
    return founded(**{"rank_policy": RankPolicy.HARDWARE, "rank_levels": (2, 4, 8), "quorum": 1, **rules})


# 1 GiB and 1 GiB a rank: levels 2, 4 and 8 take 3, 5 and 9 GiB.
SMALL = Measured(GIB, GIB, 1)


def test_a_larger_device_changes_the_rank_of_the_next_round_and_leaves_the_open_one() -> None:
    joined = [probed(name, 4 * GIB, max_rank=8, measured=SMALL) for name in (ADA, BOB, CEM)]
    state = after(*joined, start=hardware())
    assert [part.rank for part in opened(state).assignments] == [2, 2, 2]
    state = after(probed(BOB, 10 * GIB, max_rank=8, measured=SMALL), start=state)
    assert [part.rank for part in opened(state).assignments] == [2, 2, 2]
    bob = state.clients[BOB]
    assert (bob.rank, bob.rank_reason) == (
        8, "hardware: 8 of 2, 4, 8 is the largest that fits 90 % of 10.0 GiB (measured 1.0 GiB + 1.0 GiB a rank)"
    )  # fmt: skip


def test_an_operators_rank_stays_whatever_the_client_brings_and_says_so() -> None:
    state = after(SetRank(CEM, 5), start=started())
    assert state.clients[CEM].rank_reason == "set by the operator"
    state = after(joins(CEM, max_rank=7, num_examples=99), start=state)
    assert (state.clients[CEM].rank, state.clients[CEM].rank_reason) == (5, "set by the operator")
    state = after(joins(CEM, max_rank=3), start=state)
    reason = "set by the operator to 5, but never above what it declares (3)"
    assert (state.clients[CEM].rank, state.clients[CEM].rank_reason) == (3, reason)
    assert after(joins(CEM, max_rank=3), start=state) == state
    lowered = "set by the operator, then lowered to 3 when it declared no more; `raflora set-rank` raises it again"
    for declared in (6, 8, 3):
        state = after(joins(CEM, max_rank=declared), start=state)
        assert (state.clients[CEM].rank, state.clients[CEM].rank_reason) == (3, lowered)
    state = after(joins(CEM, max_rank=8), SetRank(CEM, 6), joins(CEM, max_rank=7), start=state)
    assert (state.clients[CEM].rank, state.clients[CEM].rank_reason) == (6, "set by the operator")


def test_the_levels_that_hardware_can_grant_are_levels_of_the_federation() -> None:
    assert after(probed(ADA, 4 * GIB, measured=SMALL), start=hardware()).rank_levels == (2, 4, 8)
    assert after(joins(ADA, max_rank=3), start=founded()).rank_levels == (3,)


def test_the_status_names_who_has_not_been_measured() -> None:
    state = after(probed(ADA, 4 * GIB, measured=SMALL), probed(BOB, 4 * GIB, measured=None), start=hardware())
    (warning,) = [w for w in warnings_of(state, MethodOptions("raflora")) if w.startswith("not measured")]
    assert warning.startswith("not measured: bob; ranks.policy hardware gives the smallest level until `raflora probe`")
    assert not [w for w in warnings_of(after(joins(ADA), start=founded()), MethodOptions("raflora")) if "measured" in w]


# ---------------------------------------------------------------- measurements that no device has


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_bytes": MAX_MEMORY_BYTES + 1}, "measured base_bytes 1125899906842625; 0 to 1125899906842624"),
        ({"bytes_per_rank": 1 << 63}, "measured bytes_per_rank 9223372036854775808; 0 to"),
        ({"micro_batch": 0}, "measured micro_batch 0; 1 to 1048576 is expected"),
        ({"micro_batch": 1 << 31}, "measured micro_batch 2147483648"),
        ({"quantization": "2bit"}, "measured quantization '2bit'; one of none, 8bit, 4bit is expected"),
        ({"quantization": "x" * 500}, "measured quantization 'xxxxx"),
    ],
)
def test_a_measurement_that_no_device_has_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as refused:
        after(probed(ADA, 4 * GIB, measured=replace(MEASURED, **changes)), start=hardware())  # type: ignore[arg-type]
    assert len(str(refused.value)) < 300


def test_a_memory_that_no_device_has_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'ada': memory_bytes 18446744073709551615; 0 to"):
        after(probed(ADA, (1 << 64) - 1), start=hardware())


# ---------------------------------------------------------------- what older versions wrote


def test_a_journal_of_an_older_version_loads_and_its_clients_have_no_reason_yet() -> None:
    client = {
        "client_id": ADA,
        "enrol_key_digest": "k",
        "profile": {"max_rank": 4, "num_examples": 10, "device": "cpu", "memory_bytes": 1, "software_version": "0.0"},
        "rank": 4,
        "order": 0,
        "membership": "active",
        "rank_is_set": False,
        "rounds_contributed": 0,
        "last_failure": "",
    }
    client["profile"]["examples_per_second"] = 0.0  # type: ignore[index]
    event = event_of(Entry(2, 0.0, "ClientJoined", json.dumps({"client": client})))
    ada = event.client  # type: ignore[union-attr]
    assert (ada.rank, ada.rank_reason, ada.profile.measured) == (4, "", None)


def test_a_snapshot_keeps_measurement_and_reason() -> None:
    state = after(probed(ADA, 10 * GIB, measured=SMALL), start=hardware())
    assert state_of(snapshot_of(state)) == state
    assert state.clients[ADA].rank == 8
