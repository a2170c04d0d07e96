"""Tells the log what the federation does: one line a round, and why it waits when it waits."""

from collections.abc import Mapping, Sequence, Set

import structlog

from coordinator.federation.scores import scores_of
from coordinator.federation.state import Kind, Phase, RoundRecord, State
from coordinator.merging import report_from_json
from coordinator.service import CoordinatorService
from coordinator.warnings import Sign, evaluation_signs, signs_of

_REMIND_SECONDS = 60.0
log = structlog.get_logger()


async def narrate(service: CoordinatorService) -> None:
    """Until the coordinator stops."""
    engine = service.engine
    told = engine.state  # what is in the journal already was told when it happened
    log.info("starting" if told == State() else "going on", why=service.explanation())
    signs: Set[str] = {sign.about for sign in _signs(service, told)}
    version = -1
    while True:
        version_now = await engine.wait_for_change(version, _REMIND_SECONDS)
        state = engine.state
        if engine.is_stopping:
            return
        if version_now == version and state.phase is not Phase.FINISHED:
            log.info("still waiting", why=service.explanation())
        _tell(service, told, state)
        if state.history is not told.history:
            signs = _tell_of_signs(_signs(service, state), signs)
        version, told = version_now, state


def _tell(service: CoordinatorService, before: State, state: State) -> None:
    _tell_of_clients(before, state)
    _tell_of_rounds(service, before, state)
    if state.is_paused and not before.is_paused:
        log.warning("paused", why=service.explanation())
    if state.phase is Phase.FINISHED and before.phase is not Phase.FINISHED:
        early = {"early": state.stopped_early} if state.stopped_early else {}
        log.info("finished", rounds=state.round, adapter=state.adapter_digest[:12], **early)


def _signs(service: CoordinatorService, state: State) -> Sequence[Sign]:
    return (*signs_of(state.history, service.config.aggregation.options), *evaluation_signs(state))


def _tell_of_signs(signs: Sequence[Sign], known: Set[str]) -> Set[str]:
    """Each once, also one that comes and goes with the cohorts; the status repeats it as long as it lasts."""
    for sign in signs:
        if sign.about not in known:
            log.warning(sign.about, why=sign.sentence)
    return known | {sign.about for sign in signs}


def _tell_of_clients(before: State, state: State) -> None:
    if state.clients is before.clients:
        return  # most changes are of the round's
    for client_id, client in state.clients.items():
        known = before.clients.get(client_id)
        if known is None:
            what = "evaluator joined" if client.profile.evaluates_only else "client joined"
            log.info(what, client=client_id, rank=client.rank, examples=client.profile.num_examples)
        elif client.membership is not known.membership:
            log.info(f"client {client.membership.value}", client=client_id, rank=client.rank)
        elif client.rank != known.rank:
            why = client.rank_reason
            log.info("client has another rank", client=client_id, rank=client.rank, before=known.rank, why=why)


def _tell_of_rounds(service: CoordinatorService, before: State, state: State) -> None:
    for record in state.history[len(before.history) :]:
        report, _ = report_from_json(record.report_json)
        shares = {f"{p.low + 1}-{p.high}": round(p.energy_share, 4) for p in report.partitions}
        log.info("round published", round=record.number, updates=len(record.contributions), energy=shares)
    evaluated = state.history[-1] if state.history else None
    was = before.history[-1] if before.history else None
    if evaluated is not None and evaluated.evaluations and (was is None or was.evaluated_at != evaluated.evaluated_at):
        _tell_of_scores(evaluated)
    if state.best is not None and (before.best is None or before.best.round != state.best.round):
        best = state.best
        log.info("best adapter", round=best.round, metric=best.metric, value=round(best.value, 4))
    was_open = before.open
    if state.last_abandoned and was_open and (state.open is None or state.open.attempt != was_open.attempt):
        log.warning("round given up", round=state.round + 1, why=state.last_abandoned)
    opened = state.open
    if opened is None:
        return
    if was_open is None or opened.opened_at != was_open.opened_at:
        if opened.kind is Kind.TRAIN and opened.number == 1 and opened.attempt == 1:
            log.info("forecast", collapse=service.forecast().sentence)
        cohort = {a.client_id: a.rank for a in opened.assignments}
        kind = opened.kind.value
        log.info("round opened", round=opened.number, kind=kind, attempt=opened.attempt, cohort=cohort)
    elif opened.is_extended and not was_open.is_extended:
        log.warning("round extended", round=opened.number, why=service.explanation())


def _tell_of_scores(evaluated: RoundRecord) -> None:
    scores = scores_of(evaluated)
    told = {
        "federated": _rounded(scores.federated.metrics),
        "by_rank": {rank: _rounded(score.metrics) for rank, score in scores.by_rank} if len(scores.by_rank) > 1 else {},
        "central": _rounded(scores.central.metrics),
    }
    log.info("round evaluated", round=evaluated.number, **{name: what for name, what in told.items() if what})


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}
