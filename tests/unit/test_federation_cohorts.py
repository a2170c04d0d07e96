"""What a state remembers of its cohort as it goes along is what looking at everybody anew would give."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rounds import (
    EVERYBODY,
    claims,
    evaluates,
    evicts,
    fails,
    joins,
    lost,
    one_round,
    opened,
    returns,
    started,
    transition,
    uploads,
)

from common.errors import RafloraError
from coordinator.federation.due import awaited, due
from coordinator.federation.explain import explain
from coordinator.federation.requests import Leave, Tick
from coordinator.federation.state import Contribution, State, Tally
from coordinator.stores.event_codec import snapshot_of, state_of

VERBS = (claims, uploads, evaluates, fails, lost, returns, evicts, joins, Leave)
ACTS = st.tuples(st.sampled_from(VERBS), st.sampled_from((*EVERYBODY, "dan")))
TIMES = st.sampled_from((0.0, 0.0, 0.0, 101.0, 250.0))


def check(state: State) -> None:
    """Compares a state that has lived with the same state as it comes from disk, which remembers nothing."""
    fresh = state_of(snapshot_of(state))
    assert state == fresh
    assert state.active_clients == tuple(fresh.clients[c] for c in sorted(fresh.clients) if fresh.clients[c].is_active)
    for now in (0.0, 1000.0):
        assert (due(state, now), explain(state, now)) == (due(fresh, now), explain(fresh, now))
    if state.open is None or fresh.open is None:
        return
    parts = fresh.open.assignments
    assert state.open.tally == Tally(
        updates=sum(a.update is not None for a in parts),
        outstanding=sum(not a.is_done and not a.is_failed for a in parts),
    )
    assert awaited(state, state.open) == awaited(fresh, fresh.open)
    updates = tuple(Contribution(a.client_id, a.rank, a.update) for a in parts if a.update is not None)
    assert state.open.contributions == updates
    for client_id in (*EVERYBODY, "dan"):
        assert state.open.assignment_of(client_id) == next((a for a in parts if a.client_id == client_id), None)


@given(
    acts=st.lists(st.tuples(ACTS, TIMES), max_size=30),
    quorum=st.sampled_from((0.5, 1.0, 2.0)),
    evaluate_every=st.integers(0, 1),
)
def test_what_is_remembered_is_what_looking_anew_gives(
    acts: list[tuple[tuple[object, str], float]], quorum: float, evaluate_every: int
) -> None:
    state = started(quorum=quorum, evaluate_every=evaluate_every)
    for (verb, client_id), now in acts:
        assert callable(verb)
        try:
            state = transition(state, verb(client_id), now).state
        except (RafloraError, AssertionError):  # the story asks for what is not there: no round, no part in it
            state = transition(state, Tick(), now).state
        check(state)


@given(order=st.permutations(EVERYBODY))
def test_updates_come_in_any_order_and_count_in_that_of_the_names(order: list[str]) -> None:
    state = started(quorum=1.0)
    for number, client_id in enumerate(order, start=1):
        state = transition(state, claims(client_id)).state
        state = transition(state, uploads(client_id)).state
        assert opened(state).tally == Tally(number, len(EVERYBODY) - number)
        check(state)
    assert [c.client_id for c in opened(state).contributions] == list(EVERYBODY)


def test_a_round_with_one_part_replaced_is_equal_to_one_made_anew() -> None:
    before = opened(started())
    part = replace(before.assignments[1], lease_token=3)
    after = before.with_assignment(part)
    assert after == replace(before, assignments=(before.assignments[0], part, before.assignments[2]))
    assert before == opened(started())
    assert after.tally == before.tally == Tally(0, 3)


def test_a_history_is_part_of_what_is_compared() -> None:
    state = started()
    for act in one_round():
        state = transition(state, act).state
        check(state)
    assert state.round == 1
