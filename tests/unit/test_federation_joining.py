"""Who may come in, under which name, at which rank, and who is invited to a round."""

from dataclasses import replace

import pytest
from rounds import (
    ADA,
    BOB,
    CEM,
    RULES,
    after,
    evicts,
    founded,
    joins,
    lost,
    outcome,
    part,
    returns,
    started,
    transition,
)

from common.errors import Evicted, IdentityConflict, InvalidRequest, TooBusy, UnknownClient, WrongRank
from coordinator.federation.members import member
from coordinator.federation.ranks import select_cohort
from coordinator.federation.requests import Join, Leave, Outcome, SetRank
from coordinator.federation.state import Client, Membership, Profile, RankPolicy, State
from coordinator.stores.event_codec import snapshot_of


def rank_of(state: State, client_id: str) -> int:
    return state.clients[client_id].rank


def test_nothing_opens_before_min_clients_are_here() -> None:
    state = after(joins(ADA), joins(BOB), start=founded())
    assert state.open is None
    assert after(joins(CEM), start=state).open is not None


def test_joining_twice_is_a_duplicate() -> None:
    assert outcome(after(joins(ADA), start=founded()), joins(ADA)) is Outcome.DUPLICATE


def test_a_new_profile_replaces_the_old_one_and_keeps_the_place_in_the_order() -> None:
    state = after(joins(ADA), joins(BOB), joins(ADA, max_rank=6, num_examples=99), start=founded())
    ada = state.clients[ADA]
    assert (ada.rank, ada.profile.num_examples, ada.order) == (6, 99, 0)


def test_a_new_profile_in_the_middle_of_a_round_waits_for_the_next_one() -> None:
    state = after(joins(ADA, max_rank=6), start=started())
    assert (part(state, ADA).rank, rank_of(state, ADA)) == (2, 6)


def test_a_client_that_joins_in_the_middle_of_a_round_is_not_in_it() -> None:
    state = after(joins("dan"), start=started())
    assert "dan" in state.clients
    assert state.open is not None
    assert state.open.assignment_of("dan") is None


def test_an_active_name_belongs_to_its_key() -> None:
    state = after(joins(ADA), start=founded())
    with pytest.raises(IdentityConflict, match="ada"):
        transition(state, joins(ADA, key="another"))
    with pytest.raises(IdentityConflict):
        member(state, ADA, "another")


def test_a_name_that_was_left_may_be_taken_up_by_a_rebuilt_worker() -> None:
    state = after(joins(ADA), Leave(ADA), joins(ADA, key="rebuilt"), start=founded())
    assert member(state, ADA, "rebuilt").is_active
    with pytest.raises(IdentityConflict):
        member(state, ADA, "key-of-ada")


def test_silence_gives_a_name_to_nobody_else() -> None:
    state = after(joins(ADA), lost(ADA), start=founded())
    with pytest.raises(IdentityConflict):
        after(joins(ADA, key="thief"), start=state)
    assert member(after(joins(ADA), start=state), ADA, "key-of-ada").is_active


def test_the_state_does_not_hold_the_key() -> None:
    assert "key-of-ada" not in snapshot_of(after(joins(ADA), start=founded()))


@pytest.mark.parametrize("client_id", ["", "zürich", "two words", "a/b", "-dash", "x" * 101])
def test_a_client_id_is_plain_ascii(client_id: str) -> None:
    with pytest.raises(InvalidRequest, match="letters, digits, dots, dashes or underscores"):
        after(joins(client_id, key="key"), start=founded())


def test_no_more_clients_than_allowed_may_join() -> None:
    state = after(joins(ADA), start=founded(max_clients=1, min_clients=9))
    with pytest.raises(TooBusy, match="1 clients have joined"):
        after(joins(BOB), start=state)
    assert after(joins(ADA, max_rank=1), start=state).clients[ADA].profile.max_rank == 1


def test_a_client_that_left_is_unknown_until_it_joins_again() -> None:
    state = after(joins(ADA), Leave(ADA), start=founded())
    with pytest.raises(UnknownClient, match="has left"):
        member(state, ADA, "key-of-ada")
    assert member(after(joins(ADA), start=state), ADA, "key-of-ada").is_active


def test_a_lost_client_is_still_a_member_and_returns() -> None:
    state = after(joins(ADA), lost(ADA), start=founded())
    assert member(state, ADA, "key-of-ada").membership is Membership.LOST
    assert after(returns(ADA), start=state).clients[ADA].is_active


@pytest.mark.parametrize("key", ["key-of-ada", "another"])
def test_an_evicted_client_cannot_join_again_and_is_told_why(key: str) -> None:
    state = after(joins(ADA), evicts(ADA), start=founded())
    with pytest.raises(Evicted, match="sends noise"):
        transition(state, joins(ADA, key=key))
    with pytest.raises(Evicted):
        member(state, ADA, key)


def test_leaving_does_not_undo_an_eviction() -> None:
    state = after(joins(ADA), evicts(ADA), start=founded())
    assert outcome(state, Leave(ADA)) is Outcome.DUPLICATE
    assert after(Leave(ADA), start=state).clients[ADA].membership is Membership.EVICTED


def test_a_stranger_can_neither_leave_nor_fall_silent() -> None:
    for request in (Leave("eve"), lost("eve"), evicts("eve"), SetRank("eve", 2)):
        with pytest.raises(UnknownClient, match="'eve'"):
            transition(founded(), request)


@pytest.mark.parametrize(
    "join",
    [
        Join("", "key", Profile(2, 10)),
        Join("a" * 201, "key", Profile(2, 10)),
        Join("a\nb", "key", Profile(2, 10)),
        Join(ADA, "", Profile(2, 10)),
        Join(ADA, "k" * 201, Profile(2, 10)),
        Join(ADA, "key", Profile(0, 10)),
        Join(ADA, "key", Profile(2, 0)),
        Join(ADA, "key", Profile(2, 10, examples_per_second=float("nan"))),
    ],
)
def test_a_join_that_makes_no_sense_is_refused(join: Join) -> None:
    with pytest.raises(InvalidRequest):
        transition(founded(), join)


# ---------------------------------------------------------------- ranks


def test_declared_grants_what_the_client_can_do_up_to_the_global_rank() -> None:
    state = after(joins(ADA, max_rank=3), joins(BOB, max_rank=64), start=founded())
    assert (rank_of(state, ADA), rank_of(state, BOB)) == (3, 8)


def test_table_grants_the_first_match_and_never_more_than_declared() -> None:
    table = (("gpu-*", 8), ("a??", 1), ("*", 2))
    state = founded(rank_policy=RankPolicy.TABLE, rank_table=table)
    state = after(joins("gpu-1", max_rank=6), joins(ADA), joins("anna"), start=state)
    assert [rank_of(state, c) for c in ("gpu-1", ADA, "anna")] == [6, 1, 2]


def test_a_table_without_a_match_leaves_what_is_declared() -> None:
    state = founded(rank_policy=RankPolicy.TABLE, rank_table=(("bob", 1),))
    assert rank_of(after(joins(ADA), start=state), ADA) == 2


def test_cycle_deals_the_levels_in_the_order_of_joining() -> None:
    state = founded(rank_policy=RankPolicy.CYCLE, rank_levels=(1, 3), min_clients=9)
    names = ["w4", "w2", "w3"]
    state = after(*(joins(name, max_rank=8) for name in names), joins("w4", max_rank=7), start=state)
    assert [rank_of(state, name) for name in names] == [1, 3, 1]


def test_an_operator_s_rank_stays_when_the_client_joins_again() -> None:
    state = after(SetRank(CEM, 5), joins(CEM, max_rank=7), start=started())
    assert rank_of(state, CEM) == 5
    assert rank_of(after(joins(CEM, max_rank=3), start=state), CEM) == 3


@pytest.mark.parametrize("rank", [0, 5, 9])
def test_an_operator_cannot_set_a_rank_that_the_client_cannot_train(rank: int) -> None:
    with pytest.raises(WrongRank, match=f"'bob': rank {rank}, but 1 to 4"):
        transition(started(), SetRank(BOB, rank))


# ---------------------------------------------------------------- cohorts


def clients(count: int) -> tuple[Client, ...]:
    return tuple(Client(f"c{i:02}", "k", Profile(4, 10), rank=4, order=i) for i in range(count))


def test_a_cohort_is_the_same_draw_everywhere_and_another_one_in_the_next_round_or_attempt() -> None:
    rules = replace(RULES, fraction=0.5)
    cohort = select_cohort(rules, clients(20), 1, 1)
    assert cohort == select_cohort(rules, clients(20)[::-1], 1, 1)
    assert list(cohort) == sorted(cohort)
    others = [select_cohort(rules, clients(20), 2, 1), select_cohort(rules, clients(20), 1, 2)]
    assert cohort not in others


@pytest.mark.parametrize(
    ("fraction", "count", "size"), [(1.0, 5, 5), (0.5, 9, 5), (0.1, 9, 3), (0.07, 100, 7), (0.55, 100, 55)]
)
def test_a_cohort_is_a_fraction_rounded_up_and_never_below_min_clients(fraction: float, count: int, size: int) -> None:
    assert len(select_cohort(replace(RULES, fraction=fraction), clients(count), 1, 1)) == size


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"), [(1.0, 5, 5), (0.5, 5, 3), (0.01, 5, 1), (0.56, 100, 56), (2, 5, 2), (4, 3, 3)]
)
def test_a_quorum_is_a_share_of_the_cohort_or_a_count(quorum: float, cohort: int, needed: int) -> None:
    assert replace(RULES, quorum=quorum).quorum_of(cohort) == needed
