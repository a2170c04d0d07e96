"""Any history at all: requests in any order, repeated, late, with clocks that jump and restarts in between.

The model is small: what was acknowledged, the highest lease, the highest round. Whatever happens, the journal folds
to the state that is served, nothing acknowledged is lost or counted twice, and a refusal changes nothing.
Evaluators come and go among the clients: they train nothing, and the best adapter is the one that the model has found.
"""

from collections.abc import Iterable
from dataclasses import replace

from best_model import BestModel, check_tasks
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rounds import REPORT, RULES

from common.errors import RafloraError
from coordinator.federation.due import awaited, due
from coordinator.federation.events import (
    ClientRevoked,
    Event,
    MembershipChanged,
    RoundAbandoned,
    RoundClosed,
    UpdateAccepted,
    evolve,
)
from coordinator.federation.explain import explain
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
from coordinator.federation.state import Evaluation, Kind, Membership, Phase, Profile, State, Stopping, Update
from coordinator.federation.step import pending, step
from coordinator.stores.event_codec import entry_of, event_of, snapshot_of, state_of
from coordinator.stores.journal import Entry

CLIENTS = st.sampled_from(["ada", "bob", "cem", "dan", "eve"])
SMALL = st.integers(0, 3)
# How a request differs from a good one; the simplest first.
TWISTS = st.sampled_from(
    (
        "",
        "older lease",
        "newer lease",
        "no lease",
        "older round",
        "newer round",
        "far round",
        "other attempt",
        "other slice",
    )
)
# Sums of these are exact: the model may add them up in any order.
METRICS = st.sampled_from([{}, {"accuracy": 0.25}, {"accuracy": 0.5}, {"accuracy": 0.75, "eval_loss": 1.0}])
STOPPINGS = st.builds(
    Stopping,
    metric=st.sampled_from(["accuracy", "accuracy", "eval_loss", ""]),
    is_larger_better=st.booleans(),
    is_central=st.booleans(),
    min_delta=st.sampled_from([0.0, 0.25]),
    patience=st.integers(0, 2),
)
RULE_SETS = st.builds(
    replace,
    st.just(RULES),
    num_rounds=st.integers(1, 5),
    min_clients=st.integers(1, 3),
    fraction=st.sampled_from([0.3, 0.7, 1.0]),
    quorum=st.sampled_from([0.4, 1.0, 2.0]),
    evaluate_every=st.integers(0, 2),
    max_failures=st.integers(1, 2),
    max_attempts=st.integers(1, 3),
    stopping=STOPPINGS,
)


class Histories(RuleBasedStateMachine):
    """One federation, asked everything."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.now = State(), 0.0
        self.journal: list[Entry] = []
        self.snapshot: tuple[int, str] = (0, snapshot_of(State()))
        self.asked: list[Request] = []  # for repetitions
        self.acknowledged: dict[tuple[int, int, str], str] = {}  # round, attempt, client: digest
        self.highest_lease = self.highest_round = 0
        self.best = BestModel()

    # ------------------------------------------------------------ one request

    def ask(self, request: Request) -> None:
        before, held = snapshot_of(self.state), self.lease_of(getattr(request, "client_id", ""))
        try:
            transition = step(self.state, request, self.now)
        except RafloraError:
            assert snapshot_of(self.state) == before
            return
        self.asked.append(request)
        if transition.outcome is not Outcome.ACCEPTED and not isinstance(request, Tick):
            own = [e for e in transition.events if not _is_brought_by_time(e)]
            assert not own, f"{transition.outcome} changed something: {own}"
        self.journal += [entry_of(e, len(self.journal) + 1 + i, self.now) for i, e in enumerate(transition.events)]
        self.follow(transition.events)
        self.state = transition.state
        assert all(command in pending(self.state) for command in transition.commands)
        if isinstance(request, SubmitUpdate) and transition.outcome is Outcome.ACCEPTED:
            assert transition.events[0] == UpdateAccepted(request.client_id, request.update)
            assert request.lease_token == held, "a dead lease was honoured"

    def follow(self, events: Iterable[Event]) -> None:
        """What the model makes of the events: an update counts until its round is given up or its client shut out."""
        state = self.state
        for event in events:
            opened = state.open
            self.best.follow(state, event)
            if isinstance(event, UpdateAccepted):
                assert opened is not None
                key = (opened.number, opened.attempt, event.client_id)
                assert key not in self.acknowledged, "two updates for one task"
                self.acknowledged[key] = event.update.digest
            if isinstance(event, RoundClosed):
                assert opened is not None
                assert {c.client_id: c.update.digest for c in event.inputs} == self.held()
            if isinstance(event, RoundAbandoned) and opened is not None:
                self.acknowledged = {k: d for k, d in self.acknowledged.items() if k[0] != opened.number}
            is_eviction = isinstance(event, MembershipChanged) and event.membership is Membership.EVICTED
            is_shut_out = is_eviction or isinstance(event, ClientRevoked)
            if is_shut_out and opened is not None and state.phase is Phase.TRAINING:
                self.acknowledged.pop((opened.number, opened.attempt, event.client_id), None)
            state = evolve(state, event)
            self.state = state

    def held(self) -> dict[str, str]:
        opened = self.state.open
        assert opened is not None
        return {k[2]: d for k, d in self.acknowledged.items() if k[:2] == (opened.number, opened.attempt)}

    # ------------------------------------------------------------ what may be asked

    @initialize(rules=RULE_SETS, clients=st.integers(0, 4), has_evaluator=st.booleans())
    def found(self, rules, clients: int, has_evaluator: bool) -> None:
        self.ask(Found(rules, "manifest", "adapter-0"))
        for client_id in ["ada", "bob", "cem", "dan"][:clients]:
            self.join(client_id, 4, client_id, False)
        if has_evaluator:
            self.join("eve", 7, "eve", True)

    @rule(
        client_id=CLIENTS,
        max_rank=st.integers(0, 9),
        key=st.sampled_from(["", "other"]),
        evaluates_only=st.sampled_from([False, False, True]),
    )
    def join(self, client_id: str, max_rank: int, key: str, evaluates_only: bool) -> None:
        profile = Profile(max_rank, 10, evaluates_only=evaluates_only)
        self.ask(Join(client_id, client_id if key in ("", client_id) else key, profile))

    @rule(patience=st.integers(0, 2), is_central=st.booleans())
    def change_rules(self, patience: int, is_central: bool) -> None:
        rules = self.state.known_rules
        self.ask(
            ChangeRules(replace(rules, stopping=replace(rules.stopping, patience=patience, is_central=is_central)))
        )

    @rule(client_id=CLIENTS, twist=TWISTS, kind=st.sampled_from(Kind), asks_again=st.booleans())
    def claim(self, client_id: str, twist: str, kind: Kind, asks_again: bool) -> None:
        number, attempt = self.a_round(twist)
        held_token = self.a_token(client_id, twist) if asks_again else 0
        self.ask(Claim(client_id, kind, number, attempt, self.slice_of(client_id), held_token))

    @rule(client_id=CLIENTS, digest=st.sampled_from(["one", "two"]), twist=TWISTS)
    def submit_update(self, client_id: str, digest: str, twist: str) -> None:
        number, attempt = self.a_round(twist)
        update = Update(f"{digest} of {client_id}", 100, 10, {"train_loss": 0.1 + 0.2}, 1e-9)
        slice_digest = "yesterday's" if twist == "other slice" else self.slice_of(client_id)
        token = self.a_token(client_id, twist)
        self.ask(SubmitUpdate(client_id, token, number, attempt, slice_digest, update))

    @rule(metrics=METRICS)
    def everybody_works(self, metrics: dict[str, float]) -> None:
        """The open round to its end, so that many are published and evaluated."""
        for part in self.state.open.assignments if self.state.open else ():
            self.work(part.client_id, metrics)
        if self.state.phase is Phase.AGGREGATING:
            self.publish("")

    @rule(client_id=CLIENTS, metrics=METRICS)
    def work(self, client_id: str, metrics: dict[str, float]) -> None:
        """What a good client does, so that rounds also succeed."""
        opened = self.state.open
        if opened is None:
            return
        self.ask(Claim(client_id, opened.kind, opened.number, opened.attempt, self.slice_of(client_id)))
        part = opened.assignment_of(client_id) and self.state.open and self.state.open.assignment_of(client_id)
        if part:
            update = Update(f"good of {client_id}", 100, 10)
            who = (client_id, part.lease_token, opened.number, opened.attempt, self.slice_of(client_id))
            self.ask(SubmitUpdate(*who, update))
            self.ask(SubmitEvaluation(*who, Evaluation(10, metrics)))

    @rule(client_id=CLIENTS, twist=TWISTS, metrics=METRICS, num_examples=st.sampled_from([10, 30]))
    def submit_evaluation(self, client_id: str, twist: str, metrics: dict[str, float], num_examples: int) -> None:
        number, attempt = self.a_round(twist)
        token = self.a_token(client_id, twist)
        evaluation = Evaluation(num_examples, metrics)
        self.ask(SubmitEvaluation(client_id, token, number, attempt, self.slice_of(client_id), evaluation))

    @rule(client_id=CLIENTS, twist=TWISTS)
    def fail(self, client_id: str, twist: str) -> None:
        self.ask(Fail(client_id, self.a_token(client_id, twist), "out_of_memory"))

    @rule(client_id=CLIENTS, is_lost=st.booleans())
    def note_silence(self, client_id: str, is_lost: bool) -> None:
        self.ask(NoteSilence(client_id, is_lost))

    @rule(client_id=CLIENTS)
    def leave(self, client_id: str) -> None:
        self.ask(Leave(client_id))

    @rule(client_id=CLIENTS)
    def evict(self, client_id: str) -> None:
        self.ask(Evict(client_id, "noise"))

    @rule(client_id=CLIENTS)
    def revoke(self, client_id: str) -> None:
        self.ask(Revoke(client_id, "taken back"))

    @rule(client_id=CLIENTS, rank=st.integers(0, 9))
    def set_rank(self, client_id: str, rank: int) -> None:
        self.ask(SetRank(client_id, rank))

    @rule(order=st.sampled_from([Pause(), Resume(), Resume()]))
    def pause_or_resume(self, order: Request) -> None:
        self.ask(order)

    @rule(number=SMALL, kind=st.sampled_from([CloseRound, AbortRound]))
    def close_or_abort(self, number: int, kind: type[CloseRound] | type[AbortRound]) -> None:
        self.ask(kind(number))

    @rule(twist=TWISTS)
    def publish(self, twist: str) -> None:
        number, attempt = self.a_round(twist)
        self.ask(Publish(number, attempt, f"adapter-{number}", REPORT))

    @rule(data=st.data())
    def repeat_something(self, data) -> None:
        if self.asked:
            self.ask(data.draw(st.sampled_from(self.asked)))

    @rule(seconds=st.sampled_from([0.0, 1.0, 99.0, 100.0, 1e7]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.ask(Tick())

    @rule()
    def restart(self) -> None:
        self.state = self.folded(*self.snapshot)

    @rule()
    def save_snapshot(self) -> None:
        self.snapshot = (len(self.journal), snapshot_of(self.state))

    # ------------------------------------------------------------ what always holds

    @invariant()
    def the_journal_folds_to_the_state_that_is_served(self) -> None:
        assert self.folded(0, snapshot_of(State())) == self.state
        assert self.folded(*self.snapshot) == self.state

    @invariant()
    def nothing_acknowledged_is_lost_or_counted_twice(self) -> None:
        opened = self.state.open
        if opened is not None and self.state.phase in (Phase.TRAINING, Phase.AGGREGATING):
            assert {c.client_id: c.update.digest for c in opened.contributions} == self.held()
        for record in self.state.history:
            counted = {c.client_id: c.update.digest for c in record.contributions}
            assert len(counted) == len(record.contributions)
            known = {k[2]: d for k, d in self.acknowledged.items() if k[:2] == (record.number, record.attempts)}
            assert counted == known

    @invariant()
    def what_is_to_be_done_follows_from_the_state(self) -> None:
        commands = pending(self.state)
        assert bool(commands) == (self.state.phase is Phase.AGGREGATING)
        for command in commands:
            assert command.previous_digest == self.state.adapter_digest
            assert {c.client_id: c.update.digest for c in command.inputs} == self.held()

    @invariant()
    def leases_and_rounds_only_rise(self) -> None:
        opened = self.state.open
        tokens = [a.lease_token for a in opened.assignments if a.lease_token] if opened else []
        assert len(set(tokens)) == len(tokens)
        assert all(token <= self.state.last_lease_token for token in tokens)
        assert self.state.last_lease_token >= self.highest_lease
        assert self.state.round >= self.highest_round
        assert [r.number for r in self.state.history] == list(range(1, self.state.round + 1))
        self.highest_lease, self.highest_round = self.state.last_lease_token, self.state.round

    @invariant()
    def evaluators_only_evaluate_and_the_best_adapter_is_the_best(self) -> None:
        self.best.compare(self.state)
        check_tasks(self.state)

    @invariant()
    def nothing_is_left_over_that_was_due(self) -> None:
        if self.state.rules is not None:
            # The clock may have gone on since the last request, but only a Tick or a request looks at it.
            assert due(self.state, self.now) is None, "the cascade ended too early"

    @invariant()
    def it_can_always_say_why(self) -> None:
        assert explain(self.state, self.now)
        if self.state.open is not None:
            awaited(self.state, self.state.open)

    # ------------------------------------------------------------ little helpers

    def folded(self, sequence: int, snapshot: str) -> State:
        state = state_of(snapshot)
        for entry in self.journal[sequence:]:
            state = evolve(state, event_of(entry))
        return state

    def a_round(self, twist: str) -> tuple[int, int]:
        opened = self.state.open
        number, attempt = (opened.number, opened.attempt) if opened else (self.state.round, 1)
        numbers = {"older round": number - 1, "newer round": number + 1, "far round": number + 2}
        return numbers.get(twist, number), attempt + 1 if twist == "other attempt" else attempt

    def a_token(self, client_id: str, twist: str) -> int:
        held = self.lease_of(client_id)
        return {"no lease": 0, "older lease": max(0, held - 1), "newer lease": held + 1}.get(twist, held)

    def lease_of(self, client_id: str) -> int:
        part = self.state.open.assignment_of(client_id) if self.state.open else None
        return part.lease_token if part else 0

    def slice_of(self, client_id: str) -> str:
        return f"slice of {self.state.adapter_digest} for {client_id}"


def _is_brought_by_time(event: Event) -> bool:
    return type(event).__name__ in {
        "RoundOpened", "RoundClosed", "RoundExtended", "RoundAbandoned", "EvaluationClosed", "FederationStopped"
    }  # fmt: skip


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=max(150, settings.default.max_examples),  # the same everywhere; make histories searches others
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
