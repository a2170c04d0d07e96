"""Why nothing happens, and why there is no best adapter, in one sentence, for people."""

from coordinator.federation.due import awaited
from coordinator.federation.requests import DIVERGED
from coordinator.federation.scores import reason_not_counted
from coordinator.federation.state import Kind, OpenRound, Phase, State


def explain(state: State, now: float) -> str:
    """What the federation waits for: "2 of 3 updates, quorum 2, deadline in 42 s; waiting for bob"."""
    if state.phase is Phase.WAITING_FOR_SPEC:
        return "waiting for the first worker to say which layers are adapted"
    if state.stopped_early:
        return f"finished early, after {state.round} of {state.known_rules.num_rounds} rounds: {state.stopped_early}"
    if state.phase is Phase.FINISHED:
        return f"finished: {state.round} of {state.known_rules.num_rounds} rounds are published"
    if state.open is None:
        return _between_rounds(state)
    if state.phase is Phase.AGGREGATING:
        return f"round {state.open.number} is closed with {len(state.open.contributions)} updates; aggregating"
    return _in_round(state, state.open, now) + ("; paused after this round" if state.is_paused else "")


def explain_no_best(state: State) -> str:
    """Why no published adapter is the best one; asked only if none is."""
    rules, evaluated = state.known_rules, state.newest_evaluated
    if not rules.evaluate_every:
        return "no adapter is the best: rounds.evaluate_every is 0, so no round is evaluated"
    if evaluated is None:
        return f"no adapter is the best yet: {state.round} rounds are published, and none of them is evaluated"
    why = reason_not_counted(evaluated, rules.stopping) or "nobody took part"
    return f"no adapter is the best yet: round {evaluated.number} was evaluated, but does not count: {why}"


def _between_rounds(state: State) -> str:
    if state.is_paused:
        why = f" because {state.pause_reason}" if state.pause_reason else ""
        what = f"the evaluation of round {state.round}" if state.is_evaluation_due else f"round {state.round + 1}"
        # Resumed after this, it would only come to the same end again.
        advice = "" if state.pause_reason.startswith(DIVERGED) else "; `raflora resume` goes on"
        return f"paused before {what}{why}{advice}"
    here, needed = len(state.training_clients), state.known_rules.min_clients
    evaluators = len(state.active_clients) - here
    noun = "evaluator, who trains" if evaluators == 1 else "evaluators, who train"
    beside = f", beside {evaluators} {noun} nothing" if evaluators else ""
    given_up = f"; round {state.round + 1} was given up: {state.last_abandoned}" if state.last_abandoned else ""
    return f"waiting for clients: {here} of {needed} are here{beside}{given_up}"


def _in_round(state: State, opened: OpenRound, now: float) -> str:
    total = len(opened.assignments)
    left = max(0.0, opened.deadline_at - now)
    undone = [a for a in opened.assignments if not a.is_done]
    done = total - len(undone)
    missing = [a.client_id for a in awaited(state, opened)]
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    waiting = f"; waiting for {names}" if missing else ""
    if opened.kind is Kind.EVALUATE:
        return f"evaluating round {opened.number}: {done} of {total} clients, at most {left:.0f} s more{waiting}"
    quorum = state.known_rules.quorum_of(total)
    extended = " (extended once)" if opened.is_extended else ""
    absent = [a.client_id for a in undone if a.is_failed]
    absent += [a.client_id for a in undone if not a.is_failed and not state.clients[a.client_id].is_active]
    lost = f"; lost or failed: {', '.join(absent[:3])}" if absent else ""
    return f"{done} of {total} updates, quorum {quorum}, deadline in {left:.0f} s{extended}{waiting}{lost}"
