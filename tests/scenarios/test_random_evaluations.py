"""Whole rounds one after the other, with any evaluations: the best adapter and the early stop are the model's.

test_random_histories asks a federation everything, and seldom comes far; here every step is a round, so that patience
runs out often. Evaluators come, go silent and train for once; the operator changes what counts; the journal is folded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from best_model import BestModel, check_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import EVERYBODY, RULES, Act, claims, joins, lost, opened, publishes, returns, uploads

from common.errors import TooBusy
from coordinator.federation.events import FederationStopped, evolve
from coordinator.federation.explain import explain, explain_no_best
from coordinator.federation.requests import ChangeRules, Found, Join, Outcome, SubmitEvaluation, Tick
from coordinator.federation.state import Evaluation, Kind, Phase, Profile, State, Stopping
from coordinator.federation.step import step
from coordinator.stores.event_codec import entry_of, event_of
from coordinator.stores.journal import Entry

EVE = "eve"  # who only evaluates, as a rule
# Sums of these are exact: the model may add them up in any order.
METRICS = st.sampled_from([{}, {"accuracy": 0.25}, {"accuracy": 0.5}, {"accuracy": 0.75, "eval_loss": 1.0}])
STOPPINGS = st.builds(
    Stopping,
    metric=st.sampled_from(["accuracy", "accuracy", "accuracy", "eval_loss"]),
    is_larger_better=st.sampled_from([True, True, False]),
    is_central=st.booleans(),
    min_delta=st.sampled_from([0.0, 0.25]),
    patience=st.sampled_from([0, 1, 2, 3]),
)


@dataclass(frozen=True)
class Step:
    """One round, and what happens before it."""

    told: Mapping[str, Mapping[str, float]]  # by client: what it measures; who is not here tells nothing
    eve_is: str  # what she does when the round opens
    stopping: Stopping | None  # the operator's new wish


STEPS = st.builds(
    Step,
    st.dictionaries(st.sampled_from([*EVERYBODY, EVE]), METRICS, min_size=2),
    st.sampled_from(["here", "here", "lost", "training", "evaluating"]),
    st.one_of(st.none(), st.none(), st.none(), STOPPINGS),
)


class Story:
    """A federation, its journal and the model of it."""

    def __init__(self, stopping: Stopping, every: int) -> None:
        self.state, self.model, self.journal, self.now = State(), BestModel(), list[Entry](), 0.0
        rules = replace(RULES, num_rounds=6, evaluate_every=every, stopping=stopping)
        self.ask(Found(rules, "manifest", "adapter-0"))
        self.ask(Join(EVE, f"key-of-{EVE}", Profile(6, 100, evaluates_only=True)))
        for client_id in EVERYBODY:
            self.ask(joins(client_id))

    def ask(self, act: Act) -> Outcome:
        transition = step(self.state, act(self.state) if callable(act) else act, self.now)
        state = self.state
        for event in transition.events:
            self.model.follow(state, event)
            self.journal.append(entry_of(event, len(self.journal) + 1, self.now))
            state = evolve(state, event)
        self.state = transition.state
        self.model.compare(self.state)
        check_tasks(self.state)
        return transition.outcome

    def play(self, story: Step) -> None:
        if story.stopping is not None:
            self.ask(ChangeRules(replace(self.state.known_rules, stopping=story.stopping)))
        self.move_eve(story.eve_is)
        if self.state.phase is Phase.FINISHED:
            return
        for part in opened(self.state).assignments:
            self.ask(claims(part.client_id))
            self.ask(uploads(part.client_id))
        self.ask(publishes())
        if self.state.open is not None and self.state.open.kind is Kind.EVALUATE:
            self.evaluate(story.told)

    def move_eve(self, what: str) -> None:
        if what in ("training", "evaluating"):
            try:
                self.ask(Join(EVE, f"key-of-{EVE}", Profile(6, 100, evaluates_only=what == "evaluating")))
            except TooBusy:
                assert self.state.takeable_by(EVE) is not None
        else:
            self.ask(lost(EVE) if what == "lost" else returns(EVE))

    def evaluate(self, told: Mapping[str, Mapping[str, float]]) -> None:
        round = opened(self.state)
        for part in round.assignments:
            if part.client_id in told:
                self.ask(claims(part.client_id))
                held = opened(self.state).assignment_of(part.client_id)
                assert held is not None
                result = Evaluation(10 if part.client_id in EVERYBODY else 30, told[part.client_id])
                lease = (part.client_id, held.lease_token, round.number, round.attempt, held.slice_digest)
                self.ask(SubmitEvaluation(*lease, result))
        self.now += RULES.round_deadline_seconds
        self.ask(Tick())

    def folded(self) -> State:
        state = State()
        for entry in self.journal:
            state = evolve(state, event_of(entry))
        return state


def stops_of(steps: Iterable[Step], stopping: Stopping, every: int) -> Story:
    """A story played to its end, with what must hold whatever it was."""
    story = Story(stopping, every)
    for each in steps:
        story.play(each)
        assert story.folded() == story.state, "the journal folds to something else"
        assert explain(story.state, story.now)
        if story.state.best is None:
            assert explain_no_best(story.state)
    has_stopped = any(entry.kind == FederationStopped.__name__ for entry in story.journal)
    assert has_stopped == bool(story.state.stopped_early)
    return story


@given(steps=st.lists(STEPS, min_size=3, max_size=8), stopping=STOPPINGS, every=st.sampled_from([1, 1, 2]))
@settings(deadline=None)  # of how many examples: tests/conftest.py
def test_the_best_adapter_and_the_early_stop_are_what_a_small_model_finds(
    steps: list[Step], stopping: Stopping, every: int
) -> None:
    stops_of(steps, stopping, every)


def test_such_stories_do_stop_early() -> None:
    """The property above is not empty: the same evaluation again and again ends a federation."""
    again = Step({client_id: {"accuracy": 0.5} for client_id in [*EVERYBODY, EVE]}, "here", None)
    story = stops_of([again] * 6, Stopping("accuracy", patience=2), 1)
    assert (story.state.round, story.state.phase) == (3, Phase.FINISHED)
    assert story.state.stopped_early == "no improvement of accuracy for 2 evaluations; best 0.5 in round 1"
