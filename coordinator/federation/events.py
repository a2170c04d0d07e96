"""What has happened, as it stands in the journal, and how each event changes the state.

Events are facts: they hold every decision (cohort, ranks, input list), so a replay never decides anew and
later versions of the rules cannot rewrite an old federation. Names are for ever; an unknown one is refused at start.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from coordinator.federation.ranks import SET_BY_OPERATOR
from coordinator.federation.scores import best_after
from coordinator.federation.state import (
    Assignment,
    Client,
    Contribution,
    Evaluation,
    Kind,
    Membership,
    OpenRound,
    Phase,
    RoundRecord,
    Rules,
    State,
    Update,
)


@dataclass(frozen=True)
class FederationFounded:
    """The manifest is frozen and the seeded adapter of round 0 exists."""

    rules: Rules
    manifest_digest: str
    adapter_digest: str


@dataclass(frozen=True)
class RulesChanged:
    """The operator restarted the coordinator with other rules for rounds."""

    rules: Rules


@dataclass(frozen=True)
class ClientJoined:
    """A client is new, came back, or brought a new profile."""

    client: Client


@dataclass(frozen=True)
class MembershipChanged:
    """A client was lost, returned, left or was evicted."""

    client_id: str
    membership: Membership
    reason: str = ""


@dataclass(frozen=True)
class ClientRevoked:
    """The operator took a client's identity back: it has left, and the open round is without it."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class RankSet:
    """An operator granted a rank."""

    client_id: str
    rank: int


@dataclass(frozen=True)
class RoundOpened:
    """Cohort, ranks and order are fixed."""

    kind: Kind
    number: int
    attempt: int
    opened_at: float
    deadline_at: float
    cohort: tuple[tuple[str, int], ...]  # client id, rank; by client id


@dataclass(frozen=True)
class TaskClaimed:
    """A client fetched its task; every older lease of it is dead."""

    client_id: str
    lease_token: int
    slice_digest: str


@dataclass(frozen=True)
class UpdateAccepted:
    """Acknowledged only after this is in the journal."""

    client_id: str
    update: Update


@dataclass(frozen=True)
class EvaluationAccepted:
    """Likewise."""

    client_id: str
    evaluation: Evaluation


@dataclass(frozen=True)
class TaskFailed:
    """A client gave its task back."""

    client_id: str
    failure: str
    is_final: bool


@dataclass(frozen=True)
class RoundExtended:
    """The deadline passed without a quorum; it is moved once."""

    deadline_at: float


@dataclass(frozen=True)
class RoundClosed:
    """The input list is frozen: these updates, in this order, and no others."""

    inputs: tuple[Contribution, ...]
    closed_at: float


@dataclass(frozen=True)
class RoundAbandoned:
    """No quorum, or an operator's or the aggregation's veto; the last adapter stays."""

    reason: str
    is_pausing: bool = False


@dataclass(frozen=True)
class AdapterPublished:
    """The round's adapter is durable and is now the global one."""

    adapter_digest: str
    report_json: str
    published_at: float


@dataclass(frozen=True)
class EvaluationClosed:
    """What is here is the round's evaluation."""

    evaluated_at: float


@dataclass(frozen=True)
class FederationStopped:
    """Further rounds are not worth it: the federation ends before its last one."""

    reason: str


@dataclass(frozen=True)
class PauseSet:
    """An operator paused or resumed."""

    is_paused: bool


@dataclass(frozen=True)
class LeasesSkipped:
    """The journal was restored from a backup: leases up to this one may have been given in the time that is lost."""

    last_lease_token: int


Event: TypeAlias = (
    FederationFounded
    | RulesChanged
    | ClientJoined
    | MembershipChanged
    | ClientRevoked
    | RankSet
    | RoundOpened
    | TaskClaimed
    | UpdateAccepted
    | EvaluationAccepted
    | TaskFailed
    | RoundExtended
    | RoundClosed
    | RoundAbandoned
    | AdapterPublished
    | EvaluationClosed
    | FederationStopped
    | PauseSet
    | LeasesSkipped
)


def evolve(state: State, event: Event) -> State:  # noqa: C901, PLR0912 - one branch a kind of event
    """The state after an event. Total: whatever is in the journal was decided when it was written."""
    match event:
        case FederationFounded(rules, manifest_digest, adapter_digest):
            return replace(
                state,
                phase=Phase.WAITING_FOR_CLIENTS,
                rules=rules,
                manifest_digest=manifest_digest,
                adapter_digest=adapter_digest,
            )
        case RulesChanged(rules):
            return replace(state, rules=rules)
        case ClientJoined(client):
            return _with_client(state, client)
        case MembershipChanged():
            return _membership_changed(state, event)
        case ClientRevoked(client_id, reason):
            client = replace(state.clients[client_id], membership=Membership.LEFT, last_failure=reason)
            return _without_part(_with_client(state, client), client_id)
        case RankSet(client_id, rank):
            client = replace(state.clients[client_id], rank=rank, rank_is_set=True, rank_reason=SET_BY_OPERATOR)
            return _with_client(state, client)
        case RoundOpened():
            return _opened(state, event)
        case TaskClaimed(client_id, token, slice_digest):
            assignment = replace(_assignment(state, client_id), lease_token=token, slice_digest=slice_digest)
            return replace(_with_assignment(state, assignment), last_lease_token=token)
        case UpdateAccepted(client_id, update):
            return _with_assignment(state, replace(_assignment(state, client_id), update=update))
        case EvaluationAccepted(client_id, evaluation):
            return _with_assignment(state, replace(_assignment(state, client_id), evaluation=evaluation))
        case TaskFailed():
            return _task_failed(state, event)
        case RoundExtended(deadline_at):
            return replace(state, open=replace(_open(state), deadline_at=deadline_at, is_extended=True))
        case RoundClosed(_, closed_at):
            return replace(state, phase=Phase.AGGREGATING, closed_at=closed_at)
        case RoundAbandoned(reason, is_pausing):
            return replace(
                _without_round(state),
                is_paused=state.is_paused or is_pausing,
                pause_reason=reason if is_pausing else state.pause_reason,
                last_abandoned=reason,
            )
        case AdapterPublished():
            return _published(state, event)
        case EvaluationClosed(evaluated_at):
            return _evaluated(state, evaluated_at)
        case FederationStopped(reason):
            return replace(state, phase=Phase.FINISHED, stopped_early=reason)
        case LeasesSkipped(last_lease_token):
            return replace(state, last_lease_token=last_lease_token)
        case PauseSet(is_paused):
            return replace(state, is_paused=is_paused, pause_reason="")
        case _:
            assert_never(event)


def _open(state: State) -> OpenRound:
    assert state.open is not None, "an event of a round, but none is open"  # noqa: S101
    return state.open


def _assignment(state: State, client_id: str) -> Assignment:
    assignment = _open(state).assignment_of(client_id)
    assert assignment is not None, f"{client_id} has no part in the open round"  # noqa: S101
    return assignment


def _with_assignment(state: State, assignment: Assignment) -> State:
    return replace(state, open=_open(state).with_assignment(assignment))


def _with_client(state: State, client: Client) -> State:
    return replace(state, clients={**state.clients, client.client_id: client})


def _without_round(state: State) -> State:
    is_over = state.round >= state.known_rules.num_rounds and not state.is_evaluation_due
    return replace(state, open=None, phase=Phase.FINISHED if is_over else Phase.WAITING_FOR_CLIENTS)


def _membership_changed(state: State, event: MembershipChanged) -> State:
    client = state.clients[event.client_id]
    failure = event.reason if event.membership is Membership.EVICTED else client.last_failure
    state = _with_client(state, replace(client, membership=event.membership, last_failure=failure))
    return _without_part(state, event.client_id) if event.membership is Membership.EVICTED else state


def _without_part(state: State, client_id: str) -> State:
    """The open round without this client; as it is if its inputs are frozen."""
    if state.open is None or state.phase is Phase.AGGREGATING:
        return state
    kept = tuple(a for a in state.open.assignments if a.client_id != client_id)
    return replace(state, open=replace(state.open, assignments=kept))


def _opened(state: State, event: RoundOpened) -> State:
    opened = OpenRound(
        kind=event.kind,
        number=event.number,
        attempt=event.attempt,
        opened_at=event.opened_at,
        deadline_at=event.deadline_at,
        assignments=tuple(Assignment(client_id, rank) for client_id, rank in event.cohort),
    )
    phase = Phase.TRAINING if event.kind is Kind.TRAIN else Phase.EVALUATING
    return replace(state, open=opened, phase=phase, attempt=event.attempt)


def _task_failed(state: State, event: TaskFailed) -> State:
    assignment = _assignment(state, event.client_id)
    failed = replace(
        assignment,
        failures=assignment.failures + 1,
        failure=event.failure,
        is_failed=event.is_final,
        lease_token=0,
    )
    state = _with_assignment(state, failed)
    return _with_client(state, replace(state.clients[event.client_id], last_failure=event.failure))


def _published(state: State, event: AdapterPublished) -> State:
    opened = _open(state)
    contributions = opened.contributions
    record = RoundRecord(
        number=opened.number,
        attempts=opened.attempt,
        adapter_digest=event.adapter_digest,
        opened_at=opened.opened_at,
        closed_at=state.closed_at,
        published_at=event.published_at,
        contributions=contributions,
        report_json=event.report_json,
    )
    clients = dict(state.clients)
    for contribution in contributions:
        client = clients[contribution.client_id]
        clients[client.client_id] = replace(client, rounds_contributed=client.rounds_contributed + 1)
    return _without_round(
        replace(
            state,
            adapter_digest=event.adapter_digest,
            round=opened.number,
            last_abandoned="",
            attempt=0,
            clients=clients,
            history=(*state.history, record),
        )
    )


def _evaluated(state: State, evaluated_at: float) -> State:
    assignments = state.open.assignments if state.open is not None else ()
    evaluations = tuple((a.client_id, a.rank, a.evaluation) for a in assignments if a.evaluation is not None)
    record = replace(state.history[-1], evaluations=evaluations, evaluated_at=evaluated_at)
    best = best_after(state.best, record, state.known_rules.stopping)
    return _without_round(replace(state, attempt=0, history=(*state.history[:-1], record), best=best))
