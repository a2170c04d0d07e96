"""An identity that was taken back: its update is in no adapter, and whoever is let in again may join again."""

import pytest
from rounds import (
    ADA,
    BOB,
    CEM,
    after,
    claims,
    evicts,
    fails,
    joins,
    one_round,
    opened,
    outcome,
    part,
    publishes,
    revokes,
    started,
    trains,
    transition,
    uploads,
)  # fmt: skip

from common.errors import UnknownClient
from coordinator.federation.events import ClientRevoked, MembershipChanged, RoundAbandoned, TaskClaimed
from coordinator.federation.members import member
from coordinator.federation.requests import Leave, Outcome
from coordinator.federation.state import Membership, Phase
from coordinator.stores.event_codec import entry_of, event_of


def test_a_revoked_client_s_update_is_dropped_from_the_open_round() -> None:
    state = after(*trains(ADA), *trains(BOB), revokes(ADA), *trains(CEM), publishes(), start=started())
    assert [c.client_id for c in state.history[0].contributions] == [BOB, CEM]
    assert state.clients[ADA].membership is Membership.LEFT
    assert state.clients[ADA].last_failure == "taken back"


def test_a_round_whose_frozen_inputs_hold_its_update_is_given_up() -> None:
    aggregating = after(*trains(ADA), *trains(BOB), *trains(CEM), start=started())
    assert aggregating.phase is Phase.AGGREGATING
    events = transition(aggregating, revokes(ADA)).events
    assert events[:2] == (ClientRevoked(ADA, "taken back"), RoundAbandoned("ada was revoked", False))


def test_a_client_that_left_after_its_upload_loses_it_too() -> None:
    state = after(*trains(ADA), Leave(ADA), start=started())
    assert part(state, ADA).is_done
    assert opened(after(revokes(ADA), start=state)).assignment_of(ADA) is None


def test_revoking_twice_or_whom_an_operator_evicted_records_nothing() -> None:
    for state in (after(revokes(ADA), start=started()), after(evicts(ADA), start=started())):
        found = transition(state, revokes(ADA))
        assert (found.outcome, found.events) == (Outcome.DUPLICATE, ())
    # Its part of a closed round to which it gave nothing stays where it is: the list is frozen.
    closed = after(*trains(BOB), *trains(CEM), fails(ADA), start=after(claims(ADA), start=started(max_failures=1)))
    assert closed.phase is Phase.AGGREGATING
    assert transition(after(revokes(ADA), start=closed), revokes(ADA)).events == ()


def test_whoever_is_let_in_again_joins_again_with_another_key() -> None:
    state = after(revokes(ADA), start=started())
    with pytest.raises(UnknownClient):
        member(state, ADA, "key-of-ada")
    state = after(joins(ADA, key="another"), start=state)
    assert member(state, ADA, "another").is_active
    assert state.clients[ADA].order == 0


def test_the_journal_keeps_it() -> None:
    event = ClientRevoked(ADA, "taken back")
    assert event_of(entry_of(event, 1, 0.0)) == event
    assert set(MembershipChanged.__dataclass_fields__) == {"client_id", "membership", "reason"}, "older journals stay"


# ---------------------------------------------------------------- the same process asks for its task again


def test_who_holds_the_lease_is_given_it_again_and_nothing_is_recorded() -> None:
    state = after(claims(ADA), start=started())
    again = transition(state, claims(ADA, held=part(state, ADA).lease_token))
    assert (again.outcome, again.events) == (Outcome.DUPLICATE, ())
    assert outcome(again.state, uploads(ADA)) is Outcome.ACCEPTED


def test_another_process_is_given_a_new_lease_and_the_old_one_is_dead() -> None:
    state = after(claims(ADA), start=started())
    held = part(state, ADA).lease_token
    taken = transition(state, claims(ADA))
    assert taken.events == (TaskClaimed(ADA, held + 1, part(state, ADA).slice_digest),)
    assert outcome(taken.state, uploads(ADA, token=held)) is Outcome.SUPERSEDED
    # The first process asks again, of a lease that is not its own any more.
    assert part(after(claims(ADA, held=held), start=taken.state), ADA).lease_token == held + 2


def test_a_lease_that_was_given_back_is_not_given_again() -> None:
    state = after(claims(ADA), start=started())
    held = part(state, ADA).lease_token
    again = after(fails(ADA), claims(ADA, held=held), start=state)
    assert part(again, ADA).lease_token == held + 1


def test_a_lease_of_the_round_before_is_worth_nothing() -> None:
    state = after(*one_round(), start=started())
    assert part(after(claims(ADA, held=1), start=state), ADA).lease_token == state.last_lease_token + 1
