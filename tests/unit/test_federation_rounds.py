"""How a round opens, closes, is extended, given up and opened anew, and how a federation ends."""

import pytest
from rounds import (
    ADA,
    BOB,
    CEM,
    EVERYBODY,
    At,
    after,
    claims,
    evaluates,
    evicts,
    fails,
    founded,
    joins,
    lost,
    one_round,
    opened,
    outcome,
    part,
    publishes,
    returns,
    started,
    tick,
    trains,
    transition,
    uploads,
)

from coordinator.federation.due import due, next_deadline
from coordinator.federation.requests import AbortRound, Leave, Outcome, Resume
from coordinator.federation.state import Contribution, Kind, Phase, Update
from coordinator.federation.step import Aggregate, pending


def contribution(client_id: str, rank: int) -> Contribution:
    return Contribution(client_id, rank, Update(f"update of {client_id}", 100, num_examples=10))


def test_a_round_fixes_cohort_ranks_and_order() -> None:
    state = started()
    assert [(a.client_id, a.rank) for a in opened(state).assignments] == [(ADA, 2), (BOB, 4), (CEM, 8)]
    assert (state.phase, opened(state).number, opened(state).attempt) == (Phase.TRAINING, 1, 1)


def test_a_round_closes_when_every_client_has_uploaded() -> None:
    state = after(*trains(CEM), *trains(ADA), claims(BOB), start=started())
    commands = transition(state, uploads(BOB)).commands
    inputs = (contribution(ADA, 2), contribution(BOB, 4), contribution(CEM, 8))
    assert commands == (Aggregate(number=1, attempt=1, previous_digest="adapter-0", inputs=inputs),)


def test_a_round_with_its_quorum_still_waits_for_those_who_are_here() -> None:
    assert after(*trains(ADA), *trains(BOB), start=started()).phase is Phase.TRAINING


def test_a_round_with_its_quorum_closes_at_the_deadline() -> None:
    state = after(*trains(ADA), *trains(BOB), tick(99.9), start=started())
    assert state.phase is Phase.TRAINING
    state = after(tick(100.0), start=state)
    assert state.phase is Phase.AGGREGATING
    assert [c.client_id for c in pending(state)[0].inputs] == [ADA, BOB]


def test_a_round_with_its_quorum_does_not_wait_for_the_lost() -> None:
    assert after(*trains(ADA), *trains(BOB), lost(CEM), start=started()).phase is Phase.AGGREGATING


def test_a_round_without_its_quorum_is_extended_once() -> None:
    state = after(*trains(ADA), tick(100.0), start=started())
    assert (opened(state).deadline_at, opened(state).is_extended, opened(state).attempt) == (200.0, True, 1)
    assert next_deadline(state) == 200.0
    assert after(*trains(BOB), tick(200.0), start=state).phase is Phase.AGGREGATING


def test_then_it_is_given_up_and_opened_anew_with_nothing_in_it() -> None:
    state = after(*trains(ADA), tick(100.0), tick(200.0), start=started())
    assert (opened(state).number, opened(state).attempt, opened(state).deadline_at) == (1, 2, 300.0)
    assert not opened(state).contributions
    assert state.adapter_digest == "adapter-0"


def test_after_max_attempts_it_pauses_itself_and_resumes_when_told() -> None:
    state = after(*(tick(100.0 * i) for i in range(1, 7)), start=started())
    assert (state.open, state.is_paused) == (None, True)
    assert state.pause_reason == "only 0 of 2 updates after the deadline was extended once"
    state = after(At(700.0, Resume()), start=state)
    assert (opened(state).attempt, state.is_paused, state.pause_reason) == (4, False, "")


def test_a_clock_that_jumps_over_everything_does_one_thing_at_a_time() -> None:
    events = transition(started(), tick(1e9).act, 1e9).events
    assert [type(event).__name__ for event in events] == ["RoundExtended"]


def test_published_rounds_follow_each_other_to_the_end() -> None:
    state = after(*one_round(), start=started())
    assert (state.round, state.adapter_digest, opened(state).number) == (1, "adapter-1", 2)
    state = after(*one_round(), start=state)
    assert (state.phase, state.round, state.open) == (Phase.FINISHED, 2, None)
    assert [c.rounds_contributed for c in state.clients.values()] == [2, 2, 2]
    assert due(state, 1e9) is None
    assert outcome(state, joins("dan")) is Outcome.ACCEPTED
    assert after(joins("dan"), start=state).phase is Phase.FINISHED


def test_a_history_names_who_contributed_what() -> None:
    state = after(*trains(ADA), *trains(BOB), At(100.0, lost(CEM)), At(103.0, publishes()), start=started())
    record = state.history[0]
    assert record.contributions == (contribution(ADA, 2), contribution(BOB, 4))
    assert (record.opened_at, record.closed_at, record.published_at) == (0.0, 100.0, 103.0)


def test_the_frozen_inputs_of_the_event_are_those_of_the_command() -> None:
    closed = transition(after(*trains(ADA), *trains(BOB), claims(CEM), start=started()), uploads(CEM))
    assert closed.events[-1].inputs == pending(closed.state)[0].inputs


def test_nothing_can_change_the_inputs_of_a_closed_round() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=started())
    frozen = pending(state)
    for act in (lost(BOB), Leave(CEM), joins(BOB, max_rank=1), tick(1e6).act):
        state = after(At(500.0, act), start=state)
    assert pending(state) == frozen
    assert after(publishes(), start=state).round == 1


def test_an_eviction_of_a_contributor_while_aggregating_gives_the_round_up() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=started())
    late = publishes()(state)
    state = after(evicts(ADA), start=state)
    assert state.open is None  # it opens again, without ada, when enough clients are here
    assert pending(state) == ()
    assert outcome(state, late) is Outcome.STALE


def test_an_aggregation_that_ends_after_its_round_was_aborted_is_stale() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=started())
    late = publishes()(state)
    state = after(AbortRound(1), start=state)
    assert outcome(state, late) is Outcome.STALE
    assert (state.round, opened(state).attempt) == (0, 2)


# ---------------------------------------------------------------- clients that fail, get lost or go


def test_a_failed_task_may_be_fetched_again() -> None:
    state = after(claims(ADA), fails(ADA), start=started())
    assert (part(state, ADA).failure, part(state, ADA).is_failed) == ("out_of_memory", False)
    state = after(*trains(ADA), start=state)
    assert part(state, ADA).is_done


def test_after_max_failures_the_round_goes_on_without_the_client() -> None:
    state = after(claims(ADA), fails(ADA), claims(ADA), fails(ADA), start=started())
    assert part(state, ADA).is_failed
    assert outcome(state, claims(ADA)) is Outcome.STALE
    assert after(*trains(BOB), *trains(CEM), start=state).phase is Phase.AGGREGATING


def test_a_round_whose_quorum_cannot_be_reached_is_given_up_at_once() -> None:
    state = started(max_failures=1)
    state = after(claims(ADA), fails(ADA), claims(BOB), start=state)
    assert opened(state).attempt == 1
    state = after(fails(BOB), start=state)
    assert (opened(state).attempt, opened(state).assignments[0].failures) == (2, 0)


def test_clients_that_always_fail_pause_the_federation_and_the_reason_names_them() -> None:
    state = started(max_failures=1, max_attempts=1)
    state = after(claims(ADA), fails(ADA), claims(BOB), fails(BOB), start=state)
    assert state.is_paused
    assert "ada (out_of_memory), bob (out_of_memory)" in state.pause_reason


def test_a_lost_client_that_returns_finishes_its_task() -> None:
    state = after(claims(CEM), lost(CEM), returns(CEM), *trains(ADA), *trains(BOB), start=started())
    assert after(uploads(CEM), start=state).phase is Phase.AGGREGATING


def test_a_lost_client_may_still_be_what_the_quorum_needs() -> None:
    state = after(lost(BOB), lost(CEM), *trains(ADA), start=started())
    assert (state.phase, opened(state).attempt) == (Phase.TRAINING, 1)


def test_an_evicted_client_s_update_is_dropped() -> None:
    state = after(*trains(ADA), evicts(ADA), *trains(BOB), *trains(CEM), start=started())
    assert [c.client_id for c in pending(state)[0].inputs] == [BOB, CEM]


def test_when_everybody_is_evicted_the_round_ends_and_waits_for_clients() -> None:
    state = after(*map(evicts, EVERYBODY), start=started())
    assert (state.open, state.phase, state.round) == (None, Phase.WAITING_FOR_CLIENTS, 0)


def test_a_new_attempt_waits_until_enough_clients_are_here() -> None:
    state = after(*trains(ADA), lost(BOB), tick(100.0), tick(200.0), start=started())
    assert state.open is None
    state = after(At(300.0, returns(BOB)), start=state)
    assert opened(state).attempt == 2


# ---------------------------------------------------------------- evaluation


def test_a_published_adapter_is_evaluated_by_everybody_who_is_here() -> None:
    state = after(joins("dan"), *one_round(), start=started(evaluate_every=1))
    assert (state.phase, opened(state).kind, opened(state).number) == (Phase.EVALUATING, Kind.EVALUATE, 1)
    assert [a.client_id for a in opened(state).assignments] == [ADA, BOB, CEM, "dan"]


def test_an_evaluation_ends_when_all_have_answered_and_the_next_round_opens() -> None:
    state = after(*one_round(), start=started(evaluate_every=1))
    state = after(*(act for c in EVERYBODY for act in (claims(c), evaluates(c))), start=state)
    assert [(c, r, e.metrics) for c, r, e in state.history[0].evaluations] == [
        (ADA, 2, {"accuracy": 0.5}),
        (BOB, 4, {"accuracy": 0.5}),
        (CEM, 8, {"accuracy": 0.5}),
    ]
    assert (opened(state).kind, opened(state).number, opened(state).attempt) == (Kind.TRAIN, 2, 1)


def test_an_evaluation_takes_what_is_here_at_its_deadline() -> None:
    state = after(*one_round(), claims(ADA), evaluates(ADA), tick(100.0), start=started(evaluate_every=1))
    assert len(state.history[0].evaluations) == 1
    assert opened(state).kind is Kind.TRAIN


def test_an_evaluation_does_not_wait_for_the_lost_or_the_failed() -> None:
    state = after(*one_round(), start=started(evaluate_every=1, max_failures=1))
    state = after(claims(ADA), evaluates(ADA), claims(BOB), fails(BOB), start=state)
    assert state.phase is Phase.EVALUATING
    assert after(lost(CEM), start=state).phase is not Phase.EVALUATING


def test_an_evaluation_with_nobody_left_is_skipped_and_not_waited_for() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=started(evaluate_every=1))
    state = after(*map(lost, EVERYBODY), publishes(), start=state)
    assert (state.phase, state.history[0].evaluations) == (Phase.WAITING_FOR_CLIENTS, ())
    assert state.history[0].evaluated_at is not None


def test_an_evaluation_whose_last_clients_are_evicted_ends() -> None:
    state = after(*one_round(), *map(evicts, EVERYBODY), start=started(evaluate_every=1))
    assert state.phase is Phase.WAITING_FOR_CLIENTS


@pytest.mark.parametrize(("every", "evaluated"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_evaluations_come_every_so_often_and_at_the_end(every: int, evaluated: list[int]) -> None:
    state = started(num_rounds=3, evaluate_every=every)
    while state.phase is not Phase.FINISHED:
        acts = one_round() if opened(state).kind is Kind.TRAIN else (tick(100.0),)
        state = after(*acts, start=state)
    assert [r.number for r in state.history if r.evaluated_at is not None] == evaluated


def test_a_federation_that_is_not_founded_waits() -> None:
    assert due(after(), 1e9) is None
    assert founded().phase is Phase.WAITING_FOR_CLIENTS
