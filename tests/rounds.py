"""Small federations for the tests of the state machine: three clients, round numbers, and requests in one word each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.federation.requests import (
    Claim,
    Evict,
    Fail,
    Found,
    Join,
    NoteSilence,
    Outcome,
    Publish,
    Request,
    Revoke,
    SubmitEvaluation,
    SubmitUpdate,
    Tick,
)
from coordinator.federation.state import Assignment, Evaluation, OpenRound, Profile, Rules, State, Update
from coordinator.federation.step import Transition, step

RULES = Rules(
    num_rounds=2,
    global_rank=8,
    seed=7,
    min_clients=3,
    fraction=1.0,
    quorum=2,
    round_deadline_seconds=100.0,
    lease_ttl_seconds=10.0,
    evaluate_every=0,
)
REPORT = '{"report": {}, "aggregation_seconds": 0.0}'
ADA, BOB, CEM = "ada", "bob", "cem"
EVERYBODY = (ADA, BOB, CEM)
RANKS = {ADA: 2, BOB: 4, CEM: 8}

# A step of a story: a request, or one that depends on the state (the lease token, say).
Act = Request | Callable[[State], Request]


@dataclass(frozen=True)
class At:
    """The request at this federation time."""

    seconds: float
    act: Act


def after(*acts: Act | At, start: State = State()) -> State:
    """The state after a story; time stands still unless an act says otherwise."""
    state, now = start, 0.0
    for entry in acts:
        now, act = (entry.seconds, entry.act) if isinstance(entry, At) else (now, entry)
        state = transition(state, act, now).state
    return state


def transition(state: State, act: Act, now: float = 0.0) -> Transition:
    """What one act brings about."""
    return step(state, act(state) if callable(act) else act, now)


def outcome(state: State, act: Act, now: float = 0.0) -> Outcome:
    """What becomes of one act."""
    return transition(state, act, now).outcome


def founded(**rules: object) -> State:
    """A federation without clients, with some of RULES changed."""
    return after(Found(replace(RULES, **rules), "manifest", "adapter-0"))


def started(**rules: object) -> State:
    """The same with ada, bob and cem, so that round 1 is open."""
    return after(*map(joins, EVERYBODY), start=founded(**rules))


def joins(client_id: str, *, key: str = "", max_rank: int = 0, num_examples: int = 10) -> Join:
    return Join(client_id, key or f"key-of-{client_id}", Profile(max_rank or RANKS.get(client_id, 4), num_examples))


def claims(client_id: str, *, held: int = 0) -> Act:
    """Fetches the task of the open round; `held` is the lease that the same process was given before."""
    return lambda state: Claim(
        client_id, opened(state).kind, opened(state).number, opened(state).attempt, slice_of(state, client_id), held
    )


def uploads(client_id: str, digest: str = "", *, token: int = 0, **changes: object) -> Act:
    """Submits an update with the lease that the client holds."""

    def act(state: State) -> SubmitUpdate:
        round = opened(state)
        update = Update(digest or f"update of {client_id}", 100, num_examples=10)
        held = token or part(state, client_id).lease_token
        slice_digest = slice_of(state, client_id)
        submission = SubmitUpdate(client_id, held, round.number, round.attempt, slice_digest, update)
        return replace(submission, **changes)

    return act


def evaluates(client_id: str, **changes: object) -> Act:
    """Submits an evaluation with the lease that the client holds."""

    def act(state: State) -> SubmitEvaluation:
        round, held = opened(state), part(state, client_id).lease_token
        result = Evaluation(10, {"accuracy": 0.5})
        slice_digest = slice_of(state, client_id)
        return replace(SubmitEvaluation(client_id, held, round.number, round.attempt, slice_digest, result), **changes)

    return act


def fails(client_id: str) -> Act:
    return lambda state: Fail(client_id, part(state, client_id).lease_token, "out_of_memory")


def trains(client_id: str) -> tuple[Act, Act]:
    """Fetches and uploads."""
    return claims(client_id), uploads(client_id)


def publishes(digest: str = "") -> Act:
    """The aggregation of the closed round is durable."""
    return lambda state: Publish(
        opened(state).number, opened(state).attempt, digest or f"adapter-{opened(state).number}", REPORT
    )


def lost(client_id: str) -> NoteSilence:
    return NoteSilence(client_id, is_lost=True)


def returns(client_id: str) -> NoteSilence:
    return NoteSilence(client_id, is_lost=False)


def evicts(client_id: str) -> Evict:
    return Evict(client_id, "sends noise")


def revokes(client_id: str) -> Revoke:
    return Revoke(client_id, "taken back")


def tick(seconds: float) -> At:
    return At(seconds, Tick())


def opened(state: State) -> OpenRound:
    assert state.open is not None, "no round is open"
    return state.open


def part(state: State, client_id: str) -> Assignment:
    found = opened(state).assignment_of(client_id)
    assert found is not None, f"{client_id} has no part in the round"
    return found


def slice_of(state: State, client_id: str) -> str:
    return f"slice of {state.adapter_digest} for {client_id}"


def one_round(*client_ids: str) -> tuple[Act, ...]:
    """These clients train, and the result is published."""
    return (*(act for client_id in client_ids or EVERYBODY for act in trains(client_id)), publishes())
