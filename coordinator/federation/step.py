"""One step of the federation: a request and the time, to events, commands and an outcome.

    transition = step(state, SubmitUpdate(...), now)

The caller appends transition.events to the journal, adopts transition.state, carries out transition.commands and
only then answers. A refused request raises a typed error and there is nothing to append.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from common.errors import (
    InvalidRequest,
    StaleRound,
    StaleSlice,
    UnknownClient,
    UnknownTask,
    UpdateConflict,
    WrongRank,
)
from coordinator.federation.due import due
from coordinator.federation.events import (
    AdapterPublished,
    ClientJoined,
    ClientRevoked,
    EvaluationAccepted,
    EvaluationClosed,
    Event,
    FederationFounded,
    MembershipChanged,
    PauseSet,
    RankSet,
    RoundAbandoned,
    RoundClosed,
    RulesChanged,
    TaskClaimed,
    TaskFailed,
    UpdateAccepted,
    evolve,
)
from coordinator.federation.leases import check_lease_was_given
from coordinator.federation.members import check_num_evaluated, enrolled
from coordinator.federation.requests import (
    AbortRound,
    ChangeRules,
    Claim,
    CloseRound,
    Evict,
    Fail,
    Found,
    Join,
    Leave,
    NoteSilence,
    Outcome,
    Pause,
    Publish,
    Request,
    Resume,
    Revoke,
    SetRank,
    SubmitEvaluation,
    SubmitUpdate,
    Tick,
)
from coordinator.federation.state import (
    Assignment,
    Client,
    Contribution,
    Kind,
    Membership,
    OpenRound,
    Phase,
    State,
)

_MAX_CASCADE = 8  # one request can at most close, publish and open; more would be a loop of ours


@dataclass(frozen=True)
class Aggregate:
    """Merge these updates into the adapter; answer with Publish or AbortRound."""

    number: int
    attempt: int
    previous_digest: str
    inputs: tuple[Contribution, ...]


Command: TypeAlias = Aggregate


@dataclass(frozen=True)
class Transition:
    """What a request brings about."""

    state: State
    events: tuple[Event, ...] = ()
    commands: tuple[Command, ...] = ()
    outcome: Outcome = Outcome.ACCEPTED


_Decision: TypeAlias = tuple[Outcome, tuple[Event, ...]]
_NOTHING: _Decision = (Outcome.DUPLICATE, ())


def step(state: State, request: Request, now: float) -> Transition:
    """The request's own events, then everything that is due after them. Raises typed errors, changing nothing."""
    outcome, decided = _DECISIONS[type(request)](state, request, now)
    events: list[Event] = []
    after = state
    for event in decided:
        after = evolve(after, event)
        events.append(event)
    for _ in range(_MAX_CASCADE):
        next_event = due(after, now)
        if next_event is None:
            break
        after = evolve(after, next_event)
        events.append(next_event)
    commands = tuple(c for c in pending(after) if c not in pending(state))
    return Transition(after, tuple(events), commands, outcome)


def pending(state: State) -> tuple[Command, ...]:
    """The commands that are not finished; after a restart, all of them."""
    if state.phase is not Phase.AGGREGATING or state.open is None:
        return ()
    inputs = state.open.contributions
    return (Aggregate(state.open.number, state.open.attempt, state.adapter_digest, inputs),)


# ---------------------------------------------------------------- what workers ask


def _join(state: State, request: Join, _now: float) -> _Decision:
    client = enrolled(state, request)
    return _NOTHING if client == state.clients.get(client.client_id) else (Outcome.ACCEPTED, (ClientJoined(client),))


def _leave(state: State, request: Leave, _now: float) -> _Decision:
    if _known(state, request.client_id).membership in (Membership.LEFT, Membership.EVICTED):
        return _NOTHING  # an evicted client must not turn into one that may join again
    return Outcome.ACCEPTED, (MembershipChanged(request.client_id, Membership.LEFT),)


def _claim(state: State, request: Claim, _now: float) -> _Decision:
    opened = state.open
    asked = (request.kind, request.number, request.attempt)
    if opened is None or (opened.kind, opened.number, opened.attempt) != asked:
        return Outcome.STALE, ()
    assignment = opened.assignment_of(request.client_id)
    if assignment is None or assignment.is_done or assignment.is_failed:
        return Outcome.STALE, ()
    if state.phase is Phase.AGGREGATING:
        return Outcome.ROUND_CLOSED, ()
    is_held = 0 < request.held_token == assignment.lease_token
    if is_held and request.slice_digest == assignment.slice_digest:
        return _NOTHING  # who asks again holds it already: there is nobody to keep out, and nothing to record
    token = state.last_lease_token + 1
    return Outcome.ACCEPTED, (TaskClaimed(request.client_id, token, request.slice_digest),)


def _submit_update(state: State, request: SubmitUpdate, _now: float) -> _Decision:
    assignment = _submitted_to(state, request, Kind.TRAIN)
    if isinstance(assignment, Outcome):
        return assignment, ()
    if assignment.update is not None:
        if assignment.update.digest == request.update.digest:
            return _NOTHING
        raise UpdateConflict(
            f"client {request.client_id!r}, round {request.number}: update {request.update.digest[:12]}, but "
            f"{assignment.update.digest[:12]} was accepted before; the first one stays"
        )
    if state.phase is Phase.AGGREGATING:
        return Outcome.ROUND_CLOSED, ()
    _check_lease_and_slice(assignment, request)
    if request.lease_token < assignment.lease_token:
        return Outcome.SUPERSEDED, ()
    declared = state.clients[request.client_id].profile.num_examples
    if request.update.num_examples > declared:
        raise InvalidRequest(
            f"client {request.client_id!r}: num_examples {request.update.num_examples}, but it joined with {declared}"
        )
    return Outcome.ACCEPTED, (UpdateAccepted(request.client_id, request.update),)


def _submit_evaluation(state: State, request: SubmitEvaluation, _now: float) -> _Decision:
    assignment = _submitted_to(state, request, Kind.EVALUATE)
    if isinstance(assignment, Outcome):
        return assignment, ()
    if assignment.evaluation is not None:
        return _NOTHING
    _check_lease_and_slice(assignment, request)
    if request.lease_token < assignment.lease_token:
        return Outcome.SUPERSEDED, ()
    client = state.clients[request.client_id]
    check_num_evaluated(client, request.evaluation.num_examples)
    is_central = client.profile.evaluates_only
    evaluation = replace(request.evaluation, is_central=is_central)
    return Outcome.ACCEPTED, (EvaluationAccepted(request.client_id, evaluation),)


def _fail(state: State, request: Fail, _now: float) -> _Decision:
    assignment = state.open.assignment_of(request.client_id) if state.open else None
    if assignment is None or assignment.is_done or assignment.is_failed or state.phase is Phase.AGGREGATING:
        return Outcome.STALE, ()
    if request.lease_token == 0 or request.lease_token != assignment.lease_token:
        return Outcome.SUPERSEDED, ()  # 0 is nobody's lease, also while nobody has fetched the task
    is_final = assignment.failures + 1 >= state.known_rules.max_failures
    return Outcome.ACCEPTED, (TaskFailed(request.client_id, request.failure, is_final),)


def _submitted_to(state: State, request: SubmitUpdate | SubmitEvaluation, kind: Kind) -> Assignment | Outcome:
    """The assignment a submission is for, or what became of a submission whose round is over."""
    opened = state.open
    if opened is not None and (opened.number, opened.attempt, opened.kind) == (
        request.number,
        request.attempt,
        kind,
    ):
        assignment = opened.assignment_of(request.client_id)
        if assignment is None:
            raise UnknownTask(f"client {request.client_id!r} has no task in round {request.number}")
        return assignment
    if request.number > state.round + 1:
        raise StaleRound(f"round {request.number} has not been opened; the newest is {state.round + 1}")
    return Outcome.DUPLICATE if _is_in_history(state, request) else Outcome.STALE


def _is_in_history(state: State, request: SubmitUpdate | SubmitEvaluation) -> bool:
    record = next((r for r in reversed(state.history) if r.number == request.number), None)
    if record is None:
        return False
    if isinstance(request, SubmitUpdate):
        return any(
            (c.client_id, c.update.digest) == (request.client_id, request.update.digest) for c in record.contributions
        )
    return any(client_id == request.client_id for client_id, _, _ in record.evaluations)


def _check_lease_and_slice(assignment: Assignment, request: SubmitUpdate | SubmitEvaluation) -> None:
    who = f"client {request.client_id!r}, round {request.number}"
    check_lease_was_given(assignment, request.lease_token, who)
    if request.lease_token == assignment.lease_token and request.slice_digest != assignment.slice_digest:
        raise StaleSlice(
            f"{who}: made from slice {request.slice_digest[:12]!r}, but {assignment.slice_digest[:12]!r} was handed out"
        )


# ---------------------------------------------------------------- what operators ask


def _pause(state: State, _request: Pause, _now: float) -> _Decision:
    is_moot = state.is_paused or state.phase is Phase.FINISHED
    return _NOTHING if is_moot else (Outcome.ACCEPTED, (PauseSet(True),))


def _resume(state: State, _request: Resume, _now: float) -> _Decision:
    return (Outcome.ACCEPTED, (PauseSet(False),)) if state.is_paused else _NOTHING


def _close_round(state: State, request: CloseRound, now: float) -> _Decision:
    opened = _named_round(state, request.number)
    if opened.kind is Kind.EVALUATE:
        return Outcome.ACCEPTED, (EvaluationClosed(now),)
    if not opened.contributions:
        raise InvalidRequest(f"round {opened.number} holds no update yet, so it cannot be closed; abort it instead")
    return Outcome.ACCEPTED, (RoundClosed(opened.contributions, now),)


def _abort_round(state: State, request: AbortRound, now: float) -> _Decision:
    opened = _named_round(state, request.number, may_aggregate=True)
    if opened.kind is Kind.EVALUATE:
        return Outcome.ACCEPTED, (EvaluationClosed(now),)
    is_pausing = opened.attempt % state.known_rules.max_attempts == 0
    return Outcome.ACCEPTED, (RoundAbandoned(request.reason, is_pausing),)


def _named_round(state: State, number: int, *, may_aggregate: bool = False) -> OpenRound:
    if state.open is None or state.open.number != number:
        now_open = f"round {state.open.number}" if state.open else "none"
        raise StaleRound(f"round {number} is not open; open is {now_open}")
    if state.phase is Phase.AGGREGATING and not may_aggregate:
        raise StaleRound(f"round {number} is closed already and is being aggregated")
    return state.open


def _evict(state: State, request: Evict, _now: float) -> _Decision:
    client = _known(state, request.client_id)
    if client.membership is Membership.EVICTED:
        return _NOTHING
    evicted = MembershipChanged(request.client_id, Membership.EVICTED, request.reason)
    return Outcome.ACCEPTED, (evicted, *_unmerged(state, request.client_id, "was evicted"))


def _revoke(state: State, request: Revoke, _now: float) -> _Decision:
    client, opened = _known(state, request.client_id), state.open
    if client.membership is Membership.EVICTED:
        return _NOTHING
    abandoned = _unmerged(state, request.client_id, "was revoked")
    is_frozen = opened is None or state.phase is Phase.AGGREGATING
    has_part = opened is not None and not is_frozen and opened.assignment_of(request.client_id) is not None
    if client.membership is Membership.LEFT and not has_part and not abandoned:
        return _NOTHING
    return Outcome.ACCEPTED, (ClientRevoked(request.client_id, request.reason), *abandoned)


def _unmerged(state: State, client_id: str, why: str) -> tuple[RoundAbandoned, ...]:
    """The end of a closed round that holds an update of this client.

    It must not be merged, and the frozen list must not change: the round is opened again.
    """
    opened = state.open
    if opened is None or state.phase is not Phase.AGGREGATING or not _contributed(opened, client_id):
        return ()
    return (RoundAbandoned(f"{client_id} {why}", opened.attempt % state.known_rules.max_attempts == 0),)


def _contributed(opened: OpenRound, client_id: str) -> bool:
    return any(contribution.client_id == client_id for contribution in opened.contributions)


def _set_rank(state: State, request: SetRank, _now: float) -> _Decision:
    client = _known(state, request.client_id)
    highest = min(client.profile.max_rank, state.known_rules.global_rank)
    if not 1 <= request.rank <= highest:
        raise WrongRank(
            f"client {request.client_id!r}: rank {request.rank}, but 1 to {highest} is possible (the client declares "
            f"{client.profile.max_rank}, the global adapter has {state.known_rules.global_rank})"
        )
    return Outcome.ACCEPTED, (RankSet(request.client_id, request.rank),)


def _known(state: State, client_id: str) -> Client:
    client = state.clients.get(client_id)
    if client is None:
        known = ", ".join(sorted(state.clients)[:5]) or "nobody"
        raise UnknownClient(f"client {client_id!r} never joined; known: {known}")
    return client


# ---------------------------------------------------------------- what the engine asks


def _found(state: State, request: Found, _now: float) -> _Decision:
    if state.rules is not None:
        return _NOTHING
    founded = FederationFounded(request.rules, request.manifest_digest, request.adapter_digest)
    return Outcome.ACCEPTED, (founded,)


def _change_rules(state: State, request: ChangeRules, _now: float) -> _Decision:
    return _NOTHING if request.rules == state.rules else (Outcome.ACCEPTED, (RulesChanged(request.rules),))


def _note_silence(state: State, request: NoteSilence, _now: float) -> _Decision:
    client = _known(state, request.client_id)
    expected, next_one = (
        (Membership.ACTIVE, Membership.LOST) if request.is_lost else (Membership.LOST, Membership.ACTIVE)
    )
    if client.membership is not expected:
        return _NOTHING
    return Outcome.ACCEPTED, (MembershipChanged(request.client_id, next_one),)


def _publish(state: State, request: Publish, now: float) -> _Decision:
    opened = state.open
    is_awaited = opened is not None and (opened.number, opened.attempt) == (request.number, request.attempt)
    if state.phase is not Phase.AGGREGATING or not is_awaited:
        return Outcome.STALE, ()  # the round was aborted meanwhile
    return Outcome.ACCEPTED, (AdapterPublished(request.adapter_digest, request.report_json, now),)


def _tick(_state: State, _request: Tick, _now: float) -> _Decision:
    return _NOTHING


_DECISIONS: Mapping[type[Request], Callable[[State, Any, float], _Decision]] = {
    Join: _join,
    Leave: _leave,
    Claim: _claim,
    SubmitUpdate: _submit_update,
    SubmitEvaluation: _submit_evaluation,
    Fail: _fail,
    Pause: _pause,
    Resume: _resume,
    CloseRound: _close_round,
    AbortRound: _abort_round,
    Evict: _evict,
    Revoke: _revoke,
    SetRank: _set_rank,
    Found: _found,
    ChangeRules: _change_rules,
    NoteSilence: _note_silence,
    Publish: _publish,
    Tick: _tick,
}
