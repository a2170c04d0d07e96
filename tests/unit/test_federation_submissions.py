"""What becomes of claims, updates and evaluations: once, late, twice, with an old lease, for the wrong round."""

from dataclasses import replace

import pytest
from rounds import (
    ADA,
    BOB,
    CEM,
    EVERYBODY,
    after,
    claims,
    evaluates,
    evicts,
    fails,
    joins,
    one_round,
    opened,
    outcome,
    part,
    started,
    tick,
    trains,
    transition,
    uploads,
)

from common.errors import InvalidRequest, StaleRound, StaleSlice, UnknownTask, UpdateConflict
from coordinator.federation.requests import Claim, Fail, Outcome, Publish
from coordinator.federation.state import Kind, Phase, State


def closed() -> State:
    """Round 1 is being aggregated with the updates of ada and bob."""
    return after(*trains(ADA), *trains(BOB), claims(CEM), tick(100.0), start=started())


def second_round() -> State:
    return after(*one_round(), start=started())


# ---------------------------------------------------------------- leases


def test_every_claim_has_a_higher_lease() -> None:
    state = after(claims(BOB), claims(ADA), claims(BOB), start=started())
    assert (part(state, ADA).lease_token, part(state, BOB).lease_token) == (2, 3)


def test_leases_go_on_rising_over_rounds_and_attempts() -> None:
    state = after(claims(ADA), start=second_round())
    assert part(state, ADA).lease_token == 4
    state = after(tick(200.0), tick(300.0), start=state)
    assert opened(state).attempt == 2
    assert part(after(claims(ADA), start=state), ADA).lease_token == 5


def test_who_claims_again_supersedes_the_older_holder() -> None:
    state = after(claims(ADA), claims(ADA), start=started())
    assert outcome(state, uploads(ADA, token=1)) is Outcome.SUPERSEDED
    assert outcome(state, Fail(ADA, 1, "late")) is Outcome.SUPERSEDED
    assert outcome(state, uploads(ADA, token=2)) is Outcome.ACCEPTED


@pytest.mark.parametrize(("number", "attempt"), [(2, 1), (1, 2), (0, 0)])
def test_a_claim_for_another_round_is_stale(number: int, attempt: int) -> None:
    assert outcome(started(), Claim(ADA, Kind.TRAIN, number, attempt, "slice")) is Outcome.STALE


def test_a_task_that_is_done_cannot_be_claimed_again() -> None:
    assert outcome(after(*trains(ADA), start=started()), claims(ADA)) is Outcome.STALE


def test_a_task_of_a_closed_round_cannot_be_claimed() -> None:
    assert outcome(closed(), claims(CEM)) is Outcome.ROUND_CLOSED


def test_a_task_cannot_be_given_back_by_who_never_held_it() -> None:
    state = started()
    assert outcome(state, Fail(ADA, 0, "noise")) is Outcome.SUPERSEDED
    assert outcome(state, Fail(ADA, 1, "noise")) is Outcome.SUPERSEDED
    assert outcome(state, Fail("eve", 1, "noise")) is Outcome.STALE


def test_a_task_given_back_twice_counts_once() -> None:
    state = after(claims(ADA), start=started())
    again = fails(ADA)(state)
    state = after(again, start=state)
    assert outcome(state, again) is Outcome.SUPERSEDED
    assert part(state, ADA).failures == 1


# ---------------------------------------------------------------- updates


def test_the_same_update_again_is_a_duplicate_also_with_an_older_lease() -> None:
    state = after(*trains(ADA), start=started())
    assert outcome(state, uploads(ADA)) is Outcome.DUPLICATE
    assert outcome(state, uploads(ADA, token=99)) is Outcome.DUPLICATE


def test_the_same_update_again_is_a_duplicate_while_aggregating_and_after_publishing() -> None:
    again = uploads(ADA)(after(*trains(ADA), start=started()))
    assert outcome(closed(), again) is Outcome.DUPLICATE
    assert outcome(second_round(), again) is Outcome.DUPLICATE


def test_a_duplicate_is_answered_and_never_recorded() -> None:
    state = after(*trains(ADA), start=started())
    again = uploads(ADA)(state)
    for now in (state, closed(), second_round()):
        for act in (again, replace(again, lease_token=99)):
            found = transition(now, act)
            assert (found.outcome, found.events, found.state) == (Outcome.DUPLICATE, (), now)


def test_a_second_different_update_is_a_conflict_and_the_first_stays() -> None:
    state = after(*trains(ADA), start=started())
    with pytest.raises(UpdateConflict, match="'ada', round 1: update other, but update of ad was accepted"):
        transition(state, uploads(ADA, "other"))
    assert part(state, ADA).update.digest == "update of ada"


def test_an_update_for_a_closed_round_is_told_so() -> None:
    assert outcome(closed(), uploads(CEM)) is Outcome.ROUND_CLOSED


def test_an_update_for_a_round_that_is_over_is_stale() -> None:
    state = after(claims(CEM), start=started())
    late = uploads(CEM, "another")(state)
    assert outcome(second_round(), late) is Outcome.STALE


def test_an_update_for_an_older_attempt_is_stale() -> None:
    state = after(claims(ADA), start=started())
    late = uploads(ADA)(state)
    state = after(tick(100.0), tick(200.0), claims(ADA), start=state)
    assert outcome(state, late) is Outcome.STALE


def test_an_update_for_a_round_that_was_never_opened_is_an_error() -> None:
    state = after(claims(ADA), start=started())
    with pytest.raises(StaleRound, match="round 7 has not been opened; the newest is 1"):
        transition(state, uploads(ADA, number=7))


def test_an_update_from_another_slice_than_was_handed_out_is_an_error() -> None:
    state = after(claims(ADA), start=started())
    with pytest.raises(StaleSlice, match="'ada', round 1: made from slice 'yesterday', but 'slice of ada' was"):
        transition(state, uploads(ADA, slice_digest="yesterday"))


@pytest.mark.parametrize("token", [2, 99])
def test_an_update_with_a_lease_that_was_never_given_is_an_error(token: int) -> None:
    state = after(claims(ADA), start=started())
    with pytest.raises(UnknownTask, match=f"lease {token} was never given"):
        transition(state, uploads(ADA, token=token))


def test_an_update_for_a_task_that_nobody_fetched_is_an_error() -> None:
    with pytest.raises(UnknownTask):
        transition(started(), uploads(ADA, slice_digest=""))


def test_an_update_of_a_client_without_a_task_is_an_error() -> None:
    state = after(claims(ADA), joins("dan"), start=started())
    with pytest.raises(UnknownTask, match="'dan' has no task in round 1"):
        transition(state, replace(uploads(ADA)(state), client_id="dan"))


def test_an_update_that_comes_after_the_eviction_is_an_error() -> None:
    state = after(claims(ADA), start=started())
    late = uploads(ADA)(state)
    with pytest.raises(UnknownTask):
        transition(after(evicts(ADA), start=state), late)


def test_an_update_for_an_evaluation_is_stale_and_the_other_way_round() -> None:
    training = after(claims(ADA), start=started(evaluate_every=1))
    assert outcome(training, evaluates(ADA)) is Outcome.STALE
    evaluating = after(*one_round(), claims(ADA), start=started(evaluate_every=1))
    assert outcome(evaluating, uploads(ADA, "another")) is Outcome.STALE


# ---------------------------------------------------------------- evaluations


def test_the_same_evaluation_again_is_a_duplicate_also_after_the_round() -> None:
    state = after(*one_round(), claims(ADA), evaluates(ADA), start=started(evaluate_every=1))
    again = evaluates(ADA)(state)
    assert outcome(state, again) is Outcome.DUPLICATE
    assert outcome(after(tick(100.0), start=state), again) is Outcome.DUPLICATE


def test_a_late_evaluation_is_stale() -> None:
    state = after(*one_round(), claims(ADA), start=started(evaluate_every=1))
    late = evaluates(ADA)(state)
    assert outcome(after(tick(100.0), start=state), late) is Outcome.STALE


def test_evaluations_are_fenced_like_updates() -> None:
    state = after(*one_round(), claims(ADA), claims(ADA), start=started(evaluate_every=1))
    assert outcome(state, evaluates(ADA, lease_token=4)) is Outcome.SUPERSEDED
    with pytest.raises(StaleSlice):
        transition(state, evaluates(ADA, slice_digest="yesterday"))
    with pytest.raises(UnknownTask):
        transition(state, evaluates(ADA, lease_token=99))


# ---------------------------------------------------------------- publishing


@pytest.mark.parametrize(("number", "attempt"), [(2, 1), (1, 2)])
def test_a_result_for_another_round_or_attempt_is_stale(number: int, attempt: int) -> None:
    assert outcome(closed(), Publish(number, attempt, "adapter", "{}")) is Outcome.STALE


def test_a_result_counts_once() -> None:
    result = Publish(1, 1, "adapter-1", "{}")
    state = after(result, start=closed())
    assert outcome(state, result) is Outcome.STALE
    assert (state.round, state.phase, len(opened(state).assignments)) == (1, Phase.TRAINING, len(EVERYBODY))


def test_a_claim_for_training_is_stale_in_the_evaluation_of_the_same_round_and_attempt() -> None:
    state = after(*one_round(), start=started(evaluate_every=1))
    assert (opened(state).kind, opened(state).number, opened(state).attempt) == (Kind.EVALUATE, 1, 1)
    assert outcome(state, Claim(ADA, Kind.TRAIN, 1, 1, "slice")) is Outcome.STALE
    assert outcome(state, Claim(ADA, Kind.EVALUATE, 1, 1, "slice")) is Outcome.ACCEPTED


def test_an_update_cannot_weigh_more_than_the_client_declared() -> None:
    state = after(claims(ADA), start=started())
    heavy = uploads(ADA)(state)
    declared = state.clients[ADA].profile.num_examples
    heavier = replace(heavy, update=replace(heavy.update, num_examples=declared + 1))
    with pytest.raises(InvalidRequest, match=f"it joined with {declared}"):
        outcome(state, heavier)
