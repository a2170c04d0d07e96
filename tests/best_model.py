"""What random histories hold the evaluators and the best adapter against: a small model that reads only events."""

from dataclasses import replace

from coordinator.federation.events import EvaluationClosed, Event, FederationStopped, RoundOpened
from coordinator.federation.state import Kind, Phase, State, Stopping


class BestModel:
    """Follows a federation event by event, and then compares."""

    def __init__(self) -> None:
        self.best: tuple[int, float, int] | None = None  # round, value, evaluations since
        self._found_by = Stopping()

    def follow(self, state: State, event: Event) -> None:
        """`state` is that before the event."""
        match event:
            case RoundOpened():
                _check_cohort(state, event)
                assert event.kind is Kind.EVALUATE or not self._is_patience_over(state), "it should have stopped"
            case EvaluationClosed():
                self._note_evaluation(state)
            case FederationStopped():
                assert self._is_patience_over(state)

    def compare(self, state: State) -> None:
        """Whether the state has come to the same."""
        best = state.best
        assert (best and (best.round, best.value, best.evaluations_since)) == self.best
        if best is not None:
            assert best.adapter_digest == state.history[best.round - 1].adapter_digest
            assert best.adapter_digest in state.required_blobs
        if state.stopped_early:
            assert state.phase is Phase.FINISHED
            assert state.round < state.known_rules.num_rounds

    def _note_evaluation(self, state: State) -> None:
        stopping, opened = state.known_rules.stopping, state.open
        told = [
            (part.evaluation.metrics[stopping.metric], part.evaluation.num_examples)
            for part in (opened.assignments if opened else ())
            if part.evaluation is not None
            and part.evaluation.is_central == stopping.is_central
            and stopping.metric in part.evaluation.metrics
        ]
        if not told:
            return
        value = sum(each * examples for each, examples in told) / sum(examples for _, examples in told)
        sign = 1 if stopping.is_larger_better else -1
        if self.best is None or not self._asks_the_same(stopping) or sign * (value - self.best[1]) > stopping.min_delta:
            self.best, self._found_by = (state.round, value, 0), stopping
        else:
            self.best = (*self.best[:2], self.best[2] + 1)

    def _asks_the_same(self, stopping: Stopping) -> bool:
        return replace(stopping, patience=0, min_delta=0) == replace(self._found_by, patience=0, min_delta=0)

    def _is_patience_over(self, state: State) -> bool:
        stopping = state.known_rules.stopping
        return self.best is not None and self._asks_the_same(stopping) and 0 < stopping.patience <= self.best[2]


def check_tasks(state: State) -> None:
    """Nobody trains who only evaluates, and nothing is counted of evaluators."""
    for client in state.clients.values():
        if client.profile.evaluates_only and state.takeable_by(client.client_id) is not None:
            assert state.open is not None
            assert state.open.kind is Kind.EVALUATE, "an evaluator holds a task to train"
    here = [c for c in state.clients.values() if c.membership in ("active", "lost")]
    assert state.rank_levels == tuple(sorted({c.rank for c in here if not c.profile.evaluates_only}))


def _check_cohort(state: State, opening: RoundOpened) -> None:
    """A round that trains invites no evaluator, and enough others; one that evaluates invites everybody."""
    active = {c.client_id for c in state.clients.values() if c.is_active}
    evaluators = {c for c in active if state.clients[c].profile.evaluates_only}
    invited = {client_id for client_id, _ in opening.cohort}
    if opening.kind is Kind.EVALUATE:
        assert invited == active
    else:
        assert not invited & evaluators
        assert len(active - evaluators) >= len(invited) >= state.known_rules.min_clients
