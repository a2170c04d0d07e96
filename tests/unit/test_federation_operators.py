"""The operator's levers, and what the federation says of itself in a sentence."""

from dataclasses import replace

import pytest
from rounds import (
    ADA,
    BOB,
    CEM,
    EVERYBODY,
    Act,
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
    started,
    tick,
    trains,
    transition,
)

from common.errors import InvalidRequest, StaleRound
from coordinator.federation.explain import explain
from coordinator.federation.requests import AbortRound, ChangeRules, CloseRound, Leave, Outcome, Pause, Resume, SetRank
from coordinator.federation.state import Kind, Phase, State
from coordinator.federation.step import pending


def test_a_paused_federation_finishes_its_round_and_opens_no_other() -> None:
    state = after(Pause(), *one_round(), start=started())
    assert (state.round, state.open) == (1, None)
    assert opened(after(Resume(), start=state)).number == 2


def test_pausing_and_resuming_twice_are_duplicates() -> None:
    state = after(Pause(), start=started())
    assert outcome(state, Pause()) is Outcome.DUPLICATE
    assert outcome(after(Resume(), start=state), Resume()) is Outcome.DUPLICATE


def test_a_paused_federation_evaluates_when_it_goes_on() -> None:
    state = after(Pause(), *one_round(), start=started(evaluate_every=1))
    assert state.open is None
    assert opened(after(Resume(), start=state)).kind is Kind.EVALUATE


def test_a_pause_outlives_a_given_up_round() -> None:
    state = after(Pause(), tick(100.0), tick(200.0), start=started())
    assert (state.open, state.is_paused, state.pause_reason) == (None, True, "")


def test_closing_takes_what_is_here_below_the_quorum_too() -> None:
    state = after(*trains(ADA), CloseRound(1), start=started())
    assert [c.client_id for c in pending(state)[0].inputs] == [ADA]


def test_a_round_without_updates_cannot_be_closed() -> None:
    with pytest.raises(InvalidRequest, match="abort it instead"):
        transition(started(), CloseRound(1))


def test_closing_or_aborting_an_evaluation_ends_it() -> None:
    state = after(*one_round(), claims(ADA), evaluates(ADA), start=started(evaluate_every=1))
    for request in (CloseRound(1), AbortRound(1)):
        ended = after(request, start=state)
        assert len(ended.history[0].evaluations) == 1
        assert (opened(ended).kind, opened(ended).number) == (Kind.TRAIN, 2)


def test_aborting_throws_the_updates_away_and_opens_another_attempt() -> None:
    state = after(*trains(ADA), AbortRound(1), start=started())
    assert (opened(state).attempt, opened(state).contributions) == (2, ())


def test_aborting_works_while_aggregating() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), AbortRound(1), start=started())
    assert (state.phase, opened(state).attempt, pending(state)) == (Phase.TRAINING, 2, ())


def test_the_last_attempt_that_is_aborted_pauses_with_its_reason() -> None:
    state = after(AbortRound(1, "the aggregation failed: disk full"), start=started(max_attempts=1))
    assert (state.is_paused, state.pause_reason) == (True, "the aggregation failed: disk full")


@pytest.mark.parametrize("request_", [CloseRound(2), AbortRound(2), CloseRound(0)])
def test_only_the_open_round_can_be_closed_or_aborted(request_: CloseRound | AbortRound) -> None:
    with pytest.raises(StaleRound, match=f"round {request_.number} is not open; open is round 1"):
        transition(started(), request_)
    with pytest.raises(StaleRound, match="open is none"):
        transition(founded(), request_)


def test_a_closed_round_cannot_be_closed_again() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=started())
    with pytest.raises(StaleRound, match="closed already"):
        transition(state, CloseRound(1))


def test_evicting_twice_is_a_duplicate() -> None:
    assert outcome(after(evicts(ADA), start=started()), evicts(ADA)) is Outcome.DUPLICATE


def test_a_rank_that_is_set_counts_from_the_next_round_on() -> None:
    state = after(SetRank(CEM, 3), start=started())
    assert part(state, CEM).rank == 8
    assert part(after(*one_round(), start=state), CEM).rank == 3


# ---------------------------------------------------------------- in a sentence

TRAINED = tuple(act for c in EVERYBODY for act in trains(c))


@pytest.mark.parametrize(
    ("story", "sentence"),
    [
        ((), "0 of 3 updates, quorum 2, deadline in 100 s; waiting for ada, bob, cem"),
        ((*trains(BOB), tick(58.0)), "1 of 3 updates, quorum 2, deadline in 42 s; waiting for ada, cem"),
        (
            (*trains(ADA), claims(BOB), fails(BOB), claims(BOB), fails(BOB), lost(CEM)),
            "1 of 3 updates, quorum 2, deadline in 100 s; lost or failed: bob, cem",
        ),
        ((tick(100.0),), "0 of 3 updates, quorum 2, deadline in 100 s (extended once); waiting for ada, bob, cem"),
        (
            (Pause(), *trains(ADA), *trains(BOB)),
            "2 of 3 updates, quorum 2, deadline in 100 s; waiting for cem; paused after this round",
        ),
        (TRAINED, "round 1 is closed with 3 updates; aggregating"),
        ((Pause(), *TRAINED, publishes()), "paused before round 2; `raflora resume` goes on"),
        (
            (Leave(ADA), AbortRound(1)),
            "waiting for clients: 2 of 3 are here; round 1 was given up: aborted by the operator",
        ),
        ((*one_round(), *one_round()), "finished: 2 of 2 rounds are published"),
    ],
)
def test_the_sentence_says_what_is_waited_for(story: tuple[Act | At, ...], sentence: str) -> None:
    seconds = max([act.seconds for act in story if isinstance(act, At)], default=0.0)
    assert explain(after(*story, start=started()), seconds) == sentence


def test_an_evaluation_is_explained_too() -> None:
    state = after(*one_round(), claims(ADA), evaluates(ADA), start=started(evaluate_every=1))
    assert explain(state, 10.0) == "evaluating round 1: 1 of 3 clients, at most 90 s more; waiting for bob, cem"


def test_a_pause_before_the_last_evaluation_does_not_name_a_round_that_will_never_be() -> None:
    state = after(Pause(), *one_round(), start=started(num_rounds=1, evaluate_every=1))
    assert explain(state, 0.0) == "paused before the evaluation of round 1; `raflora resume` goes on"


def test_a_pause_of_its_own_says_why() -> None:
    state = after(*(tick(100.0 * i) for i in range(1, 3)), start=started(max_attempts=1))
    assert explain(state, 200.0) == (
        "paused before round 1 because only 0 of 2 updates after the deadline was extended once; "
        "`raflora resume` goes on"
    )


def test_a_large_cohort_is_named_by_its_first_three() -> None:
    state = after(*(joins(f"w{i}") for i in range(5)), start=founded(min_clients=5))
    assert explain(state, 0.0).endswith("waiting for w0, w1, w2 and 2 more")


def test_before_it_is_founded_it_waits_for_a_spec() -> None:
    assert explain(State(), 0.0) == "waiting for the first worker to say which layers are adapted"


def test_other_rules_count_from_the_restart_on() -> None:
    state = after(Leave(ADA), AbortRound(1), start=started())
    assert state.open is None
    smaller = replace(state.known_rules, min_clients=2, quorum=2)
    state = after(ChangeRules(smaller), start=state)
    assert [a.client_id for a in opened(state).assignments] == [BOB, CEM]
    assert outcome(state, ChangeRules(smaller)) is Outcome.DUPLICATE
