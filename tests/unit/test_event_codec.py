"""A snapshot is made in pieces, and reads as if it had been made in one."""

from dataclasses import replace

from pydantic import TypeAdapter
from rounds import ADA, after, claims, one_round, started, uploads

from coordinator.federation.state import State
from coordinator.stores.event_codec import snapshot_of, state_of

WHOLE = TypeAdapter(State)


def test_a_snapshot_in_pieces_is_the_state_as_a_whole() -> None:
    one_open = after(*one_round(), claims(ADA), uploads(ADA), start=started(num_rounds=3))
    for state in (State(), started(), one_open, after(*one_round(), start=one_open)):
        assert snapshot_of(state) == WHOLE.dump_json(state).decode()
        assert state_of(snapshot_of(state)) == state


def test_what_a_client_says_cannot_pass_for_the_history() -> None:
    state = started()
    said = {c: replace(client, last_failure='"history":[]') for c, client in state.clients.items()}
    liar = replace(state, clients={**said, "history": said[ADA]}, pause_reason='"history":[]')
    assert snapshot_of(liar) == WHOLE.dump_json(liar).decode()
    assert state_of(snapshot_of(liar)) == liar


def test_what_a_state_remembers_of_its_cohort_is_not_written() -> None:
    state = after(claims(ADA), uploads(ADA), start=started())
    assert state.open is not None
    before = snapshot_of(state_of(snapshot_of(state)))
    assert (state.open.tally.updates, len(state.open.contributions), len(state.active_clients)) == (1, 1, 3)
    assert snapshot_of(state) == before
