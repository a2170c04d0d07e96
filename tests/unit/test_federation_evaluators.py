"""Evaluators: they train nothing, count for nothing that trains, and evaluate every adapter that is evaluated."""

import json
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

from common.errors import InvalidRequest, TooBusy
from coordinator.federation.due import due
from coordinator.federation.events import FederationStopped
from coordinator.federation.explain import explain, explain_no_best
from coordinator.federation.requests import ChangeRules, Join, Leave, Outcome, Pause, Resume
from coordinator.federation.state import Evaluation, Kind, Phase, Profile, RankPolicy, State, Stopping
from coordinator.stores.event_codec import entry_of, event_of, snapshot_of, state_of
from coordinator.stores.journal import Entry

EVE = "eve"


def looks_on(client_id: str = EVE, *, max_rank: int = 8) -> Join:
    """Joins as an evaluator."""
    return Join(client_id, f"key-of-{client_id}", Profile(max_rank, 1_000, evaluates_only=True))


def with_eve(**rules: object) -> State:
    """Round 1 is open, and Eve was there before."""
    return after(looks_on(), *map(joins, EVERYBODY), start=founded(**rules))


def cohort(state: State) -> list[str]:
    return [a.client_id for a in opened(state).assignments]


# ---------------------------------------------------------------- rounds


def test_an_evaluator_is_in_no_cohort_that_trains_and_in_every_one_that_evaluates() -> None:
    state = with_eve(evaluate_every=1)
    assert cohort(state) == [ADA, BOB, CEM]
    state = after(*one_round(), start=state)
    assert (opened(state).kind, cohort(state)) == (Kind.EVALUATE, [ADA, BOB, CEM, EVE])


def test_an_evaluator_counts_neither_for_min_clients_nor_for_a_quorum() -> None:
    state = after(looks_on(), joins(ADA), joins(BOB), start=founded())
    assert state.open is None
    state = after(joins(CEM), start=state)
    assert opened(state).tally.outstanding == 3
    assert state.known_rules.quorum_of(len(opened(state).assignments)) == 2


def test_evaluators_alone_wait_and_the_explanation_says_for_whom() -> None:
    state = after(looks_on(), start=founded())
    assert state.open is None
    assert explain(state, 0.0) == "waiting for clients: 0 of 3 are here, beside 1 evaluator, who trains nothing"
    state = after(looks_on("fay"), joins(ADA), start=state)
    assert explain(state, 0.0) == "waiting for clients: 1 of 3 are here, beside 2 evaluators, who train nothing"


def test_an_evaluation_by_evaluators_alone_is_one() -> None:
    state = after(*(act for c in EVERYBODY for act in trains(c)), start=with_eve(evaluate_every=1))
    state = after(*map(lost, EVERYBODY), publishes(), claims(EVE), evaluates(EVE), start=state)
    assert [(c, r, e.is_central) for c, r, e in state.history[0].evaluations] == [(EVE, 8, True)]


def test_what_an_evaluator_found_stays_central_whatever_it_becomes() -> None:
    state = after(*one_round(), start=with_eve(evaluate_every=1))
    everybody = (act for c in (*EVERYBODY, EVE) for act in (claims(c), evaluates(c)))
    state = after(*everybody, joins(EVE, num_examples=10), start=state)
    assert not state.clients[EVE].profile.evaluates_only
    assert [c for c, _, e in state.history[0].evaluations if e.is_central] == [EVE]


# ---------------------------------------------------------------- ranks and the census


def test_an_evaluator_has_the_rank_that_it_declares_up_to_the_global_one() -> None:
    state = after(looks_on(max_rank=3), looks_on("fay", max_rank=64), start=founded())
    assert [(c.rank, c.rank_reason) for c in state.clients.values()] == [
        (3, "evaluator: declared 3"),
        (8, "evaluator: declared 64, the global rank is 8"),
    ]


@pytest.mark.parametrize(
    "policy",
    [
        {"rank_policy": RankPolicy.CYCLE, "rank_levels": (1, 2)},
        {"rank_policy": RankPolicy.HARDWARE, "rank_levels": (1, 2)},
        {"rank_policy": RankPolicy.TABLE, "rank_table": (("*", 1),)},
    ],
)
def test_no_policy_is_about_evaluators(policy: dict[str, object]) -> None:
    assert after(looks_on(), start=founded(**policy)).clients[EVE].rank == 8


def test_an_evaluator_takes_no_turn_of_the_cycle() -> None:
    policy = {"rank_policy": RankPolicy.CYCLE, "rank_levels": (1, 2)}
    names = [ADA, EVE, BOB, "fay", CEM]
    state = after(*(looks_on(n) if n in (EVE, "fay") else joins(n, max_rank=8) for n in names), start=founded(**policy))
    assert [state.clients[c].rank for c in EVERYBODY] == [1, 2, 1]


def test_the_ranks_of_the_federation_are_those_that_are_trained() -> None:
    state = after(looks_on(max_rank=5), joins(ADA), joins(BOB), start=founded())
    assert state.rank_levels == (2, 4)
    assert [c.client_id for c in state.enrolled_to_train] == [ADA, BOB]
    assert [c.client_id for c in state.training_clients] == [ADA, BOB]


# ---------------------------------------------------------------- from one part to the other


def test_who_holds_a_task_ends_it_as_what_it_was() -> None:
    state = after(looks_on(), start=started(evaluate_every=1))
    for story in ((), (claims(ADA),), (Leave(ADA),)):
        with pytest.raises(TooBusy, match=r"'ada' trains and has a task in round 1; it may join to evaluate when"):
            transition(after(*story, start=state), looks_on(ADA))
    state = after(*one_round(), start=state)
    with pytest.raises(TooBusy, match=r"'ada' trains and has a task in round 1"):
        transition(state, looks_on(ADA))


def test_who_has_done_or_lost_its_part_may_change_it() -> None:
    done = after(*trains(ADA), start=started())
    state = after(looks_on(ADA), *trains(BOB), *trains(CEM), start=done)
    assert next((c.client_id, c.update.num_examples) for c in opened(state).contributions) == (ADA, 10)
    assert state.clients[ADA].profile.evaluates_only
    assert after(looks_on("dan"), joins("dan"), start=started()).clients["dan"].profile.evaluates_only is False


def test_another_profile_of_the_same_part_is_welcome_in_the_middle_of_a_round() -> None:
    assert outcome(started(), joins(ADA, max_rank=7)) is Outcome.ACCEPTED
    state = after(*one_round(), claims(EVE), start=with_eve(evaluate_every=1))
    assert outcome(state, looks_on(max_rank=4)) is Outcome.ACCEPTED
    assert part(state, EVE).rank == 8


# ---------------------------------------------------------------- the best and the end

STOPPING = Stopping("accuracy", patience=2)


def scored(state: State, accuracy: float, *, central: float | None = None) -> State:
    """Trains a round, publishes it and lets everybody evaluate it."""
    state = after(*one_round(), start=state)
    for a in opened(state).assignments:
        value = central if a.client_id == EVE else accuracy
        metrics = {} if value is None else {"accuracy": value}
        state = after(
            claims(a.client_id),
            evaluates(a.client_id, evaluation=Evaluation(10, metrics)),
            start=state,
        )
    return state


def test_the_best_round_is_remembered_and_patience_ends_the_federation_early() -> None:
    state = started(num_rounds=9, evaluate_every=1, stopping=STOPPING)
    for accuracy in (0.5, 0.87, 0.6):
        state = scored(state, accuracy)
        assert opened(state).kind is Kind.TRAIN
    assert state.best is not None
    assert (state.best.round, state.best.adapter_digest, state.best.evaluations_since) == (2, "adapter-2", 1)
    state = scored(state, 0.87)
    assert (state.phase, state.round, state.open, state.is_paused) == (Phase.FINISHED, 4, None, False)
    assert state.stopped_early == "no improvement of accuracy for 2 evaluations; best 0.87 in round 2"
    assert explain(state, 0.0) == f"finished early, after 4 of 9 rounds: {state.stopped_early}"
    assert state.adapter_digest == "adapter-4"
    assert {"adapter-2", "adapter-4"} <= state.required_blobs
    assert due(state, 1e9) is None
    assert outcome(state, Pause()) is Outcome.DUPLICATE


def test_evaluators_decide_where_the_central_metric_counts() -> None:
    state = with_eve(num_rounds=9, evaluate_every=1, stopping=replace(STOPPING, is_central=True, patience=1))
    state = scored(scored(state, 0.1, central=0.9), 0.8, central=0.7)
    assert state.best is not None
    assert (state.best.round, state.best.value, state.phase) == (1, 0.9, Phase.FINISHED)


def test_a_metric_that_nobody_tells_stops_nothing() -> None:
    state = started(num_rounds=4, evaluate_every=1, stopping=Stopping("f1", patience=1))
    for _ in range(4):
        state = scored(state, 0.5)
    assert (state.phase, state.best, state.stopped_early) == (Phase.FINISHED, None, "")
    assert explain(state, 0.0) == "finished: 4 of 4 rounds are published"
    assert explain_no_best(state) == (
        "no adapter is the best yet: round 4 was evaluated, but does not count: "
        "evaluation.metric 'f1' was not among accuracy"
    )


def test_the_last_round_ends_a_federation_by_itself() -> None:
    state = started(num_rounds=2, evaluate_every=1, stopping=replace(STOPPING, patience=1))
    state = scored(scored(state, 0.5), 0.5)
    assert (state.phase, state.stopped_early) == (Phase.FINISHED, "")


def test_a_paused_federation_ends_when_it_is_resumed() -> None:
    state = scored(started(num_rounds=9, evaluate_every=1, stopping=replace(STOPPING, patience=1)), 0.5)
    state = after(*one_round(), start=state)
    state = after(*(act for c in EVERYBODY for act in (claims(c), evaluates(c))), start=after(Pause(), start=state))
    assert (state.open, state.is_paused, state.stopped_early) == (None, True, "")
    state = after(Resume(), start=state)
    assert (state.phase, state.stopped_early[:14]) == (Phase.FINISHED, "no improvement")


def test_patience_that_is_lowered_with_a_restart_ends_a_federation_that_has_waited_long_enough() -> None:
    state = started(num_rounds=9, evaluate_every=1, stopping=Stopping("accuracy"))
    for accuracy in (0.9, 0.5, 0.5):
        state = scored(state, accuracy)
    changed = ChangeRules(replace(state.known_rules, stopping=STOPPING))
    assert opened(state).number == 4  # it is open, so it is trained, published and evaluated before anything ends
    state = scored(after(changed, start=state), 0.5)
    assert (state.round, state.stopped_early[:32]) == (4, "no improvement of accuracy for 3")


def test_why_nothing_is_the_best_yet() -> None:
    assert explain_no_best(after(*one_round(), start=started())) == (
        "no adapter is the best: rounds.evaluate_every is 0, so no round is evaluated"
    )
    waiting = after(*one_round(), start=started(evaluate_every=1, stopping=STOPPING))
    assert explain_no_best(waiting) == (
        "no adapter is the best yet: 1 rounds are published, and none of them is evaluated"
    )
    assert "nobody took part" in explain_no_best(after(tick(100.0), start=waiting))


# ---------------------------------------------------------------- journals


def test_an_old_journal_without_stopping_and_evaluators_is_read() -> None:
    state = scored(started(num_rounds=3, evaluate_every=1), 0.5)
    old = json.loads(snapshot_of(state))
    for name in ("best", "stopped_early"):
        del old[name]
    del old["rules"]["stopping"]
    for client in old["clients"].values():
        del client["profile"]["evaluates_only"]
    for record in old["history"]:
        for _, _, evaluation in record["evaluations"]:
            del evaluation["is_central"]
    assert state_of(json.dumps(old)) == state
    assert state.best is None  # nothing counted under the old rules


def test_the_end_stands_in_the_journal_as_a_fact() -> None:
    event = FederationStopped("no improvement of accuracy for 3 evaluations; best 0.87 in round 9")
    entry = entry_of(event, 7, 1.0)
    assert (entry.kind, event_of(Entry(7, 1.0, entry.kind, entry.body))) == ("FederationStopped", event)


# ---------------------------------------------------------------- what an evaluation weighs


@pytest.mark.parametrize(("told", "allowed"), [(7, 7), (2_000, 2_000), (0, 10 * 10)])
def test_an_evaluation_weighs_no_more_than_its_client_joined_with(told: int, allowed: int) -> None:
    """Who trains on 10 examples and told how many it evaluates on, or, as an older worker, did not."""
    ada = Join(ADA, f"key-of-{ADA}", Profile(8, 10, num_eval_examples=told))
    state = after(ada, *one_round(ADA), claims(ADA), start=founded(evaluate_every=1, min_clients=1))
    assert opened(state).kind is Kind.EVALUATE
    whole, more = (Evaluation(count, {"accuracy": 1.0}) for count in (allowed, allowed + 1))
    assert outcome(state, evaluates(ADA, evaluation=whole)) is Outcome.ACCEPTED
    with pytest.raises(InvalidRequest, match=f"'ada': an evaluation on {allowed + 1} examples, but .*{allowed}"):
        transition(state, evaluates(ADA, evaluation=more))
