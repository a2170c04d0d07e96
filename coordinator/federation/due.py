"""What time and the state alone bring about: open, close, extend, abandon, stop."""

from collections.abc import Iterator

from coordinator.federation.events import (
    EvaluationClosed,
    Event,
    FederationStopped,
    RoundAbandoned,
    RoundClosed,
    RoundExtended,
    RoundOpened,
)
from coordinator.federation.ranks import select_cohort
from coordinator.federation.scores import reason_to_stop
from coordinator.federation.state import Assignment, Kind, OpenRound, Phase, State


def due(state: State, now: float) -> Event | None:
    """The next event that nobody has to ask for, or None."""
    if state.open is None:
        return _due_between_rounds(state, now)
    if state.phase is Phase.AGGREGATING:
        return None
    if state.open.kind is Kind.EVALUATE:
        is_over = not _is_awaiting(state, state.open) or now >= state.open.deadline_at
        return EvaluationClosed(now) if is_over else None
    return _due_in_training(state, state.open, now)


def awaited(state: State, opened: OpenRound) -> tuple[Assignment, ...]:
    """The parts of a round that may still come: not done, not failed, and their client is here."""
    return tuple(_awaited(state, opened))


def next_deadline(state: State) -> float | None:
    """When a Tick is needed even if nothing happens; federation seconds."""
    return None if state.open is None or state.phase is Phase.AGGREGATING else state.open.deadline_at


def _awaited(state: State, opened: OpenRound) -> Iterator[Assignment]:
    return (a for a in opened.assignments if not a.is_done and not a.is_failed and state.clients[a.client_id].is_active)


def _is_awaiting(state: State, opened: OpenRound) -> bool:
    return opened.tally.outstanding > 0 and any(True for _ in _awaited(state, opened))


def _due_between_rounds(state: State, now: float) -> Event | None:
    if state.phase is not Phase.WAITING_FOR_CLIENTS or state.is_paused:
        return None
    rules = state.known_rules
    deadline = now + rules.round_deadline_seconds
    if state.is_evaluation_due:
        clients = state.active_clients
        if not clients:
            return EvaluationClosed(now)  # nobody is left to ask
        everybody = tuple((c.client_id, c.rank) for c in clients)
        return RoundOpened(Kind.EVALUATE, state.round, state.attempt + 1, now, deadline, everybody)
    if reason := reason_to_stop(state.best, rules.stopping):
        return FederationStopped(reason)
    if len(state.clients) < rules.min_clients or len(state.training_clients) < rules.min_clients:
        return None
    number, attempt = state.round + 1, state.attempt + 1
    cohort = select_cohort(rules, state.training_clients, number, attempt)
    return RoundOpened(Kind.TRAIN, number, attempt, now, deadline, cohort)


def _due_in_training(state: State, opened: OpenRound, now: float) -> Event | None:
    rules = state.known_rules
    quorum, have = rules.quorum_of(len(opened.assignments)), opened.tally.updates
    is_late = now >= opened.deadline_at
    if have >= quorum and (is_late or not _is_awaiting(state, opened)):
        return RoundClosed(opened.contributions, now)
    if have + opened.tally.outstanding < quorum:
        reason = f"only {have} of {quorum} updates, and too many clients failed: {_failures(opened)}"
        return RoundAbandoned(reason, opened.attempt % rules.max_attempts == 0)
    if is_late and not opened.is_extended:
        return RoundExtended(now + rules.round_deadline_seconds)
    if is_late:
        reason = f"only {have} of {quorum} updates after the deadline was extended once"
        return RoundAbandoned(reason, opened.attempt % rules.max_attempts == 0)
    return None


def _failures(opened: OpenRound) -> str:
    failed = [f"{a.client_id} ({a.failure})" for a in opened.assignments if a.is_failed]
    return ", ".join(failed[:3]) or "their clients were evicted"
