"""The federation's state as messages for people and machines: nothing is asked of anybody and nothing changed."""

from collections.abc import Sequence
from dataclasses import asdict
from math import inf

from raflora.v1 import status_pb2 as pb

from common.version import software_version
from coordinator.federation.explain import explain
from coordinator.federation.scores import Score, scores_of
from coordinator.federation.state import (
    Assignment,
    Best,
    Client,
    Contribution,
    Kind,
    Phase,
    RoundRecord,
    State,
)
from coordinator.manifest import Manifest
from coordinator.merging import report_from_json
from coordinator.service import CoordinatorService, Progress
from coordinator.warnings import founding_warnings, uncovered_rounds, warnings_of

FRESH_CLIENTS = 100  # for so few, everybody who looks is given a status of his own
# Above that a status costs the event loop 10 to 20 µs a client: shared for so long, at most a tenth of its time.
SHARED_SECONDS_A_CLIENT = 2.5e-4


class SharedStatus:
    """One status for all who look in the same moment; the moment is longer the more clients there are."""

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service
        self._made_at = -inf
        self._made_in: tuple[object, ...] = ()
        self._status = pb.FederationStatus()

    def newest(self) -> pb.FederationStatus:
        """Everything at a glance; the phase, the round and whether it is paused are never old. Not to be changed."""
        engine = self._service.engine
        state, now = engine.state, engine.now
        stands = (state.phase, state.round, state.attempt, state.is_paused)
        shared_seconds = SHARED_SECONDS_A_CLIENT * max(0, len(state.clients) - FRESH_CLIENTS)
        if stands != self._made_in or now - self._made_at >= shared_seconds:
            self._status = status_of(self._service)
            self._made_at, self._made_in = now, stands
        return self._status


def status_of(service: CoordinatorService) -> pb.FederationStatus:
    """Everything at a glance."""
    engine, config, state = service.engine, service.config, service.engine.state
    opened = state.open
    status = pb.FederationStatus(
        federation=config.name,
        software_version=software_version(),
        phase=f"PHASE_{state.phase.name}",
        paused=state.is_paused,
        round=opened.number if opened else state.round + (state.phase is not Phase.FINISHED),
        num_rounds=config.rounds.num_rounds,
        explanation=explain(state, engine.now),
        method=config.aggregation.method,
        manifest_digest=state.manifest_digest,
        adapter_digest=state.adapter_digest,
        global_rank=config.adapter.global_rank,
        base_model=config.model.base_model,
        task=config.model.task,
        bytes_sent=service.counters.bytes_sent,
        bytes_received=service.counters.bytes_received,
        uptime_seconds=engine.uptime_seconds,
        clients_connected=len(state.active_clients),
        clients_known=len(state.clients),
        forecast=forecast_of(service),
        warnings=[
            *warnings_of(state, config.aggregation.options),
            *founding_warnings(config, is_founded=service.foundation.manifest is not None),
            *service.sessions.alarms(engine.now),
            *service.foundation.warnings(),
            *(f"a worker could not join: {why}" for why in service.counters.refusals),
        ],
        security=service.security.sentence,
        disk_bytes=service.foundation.disk.room().used_bytes,
        disk_free_bytes=service.foundation.disk.room().free_bytes,
        uploads_open=service.foundation.uploads.open_streams,
    )
    if opened is not None:
        status.quorum = state.known_rules.quorum_of(len(opened.assignments)) if opened.kind is Kind.TRAIN else 0
        status.deadline_seconds = max(0.0, opened.deadline_at - engine.now)
        status.assignments.extend(_assignment(service, a) for a in opened.assignments)
    if state.best is not None:
        status.best.CopyFrom(_best(state.best, state))
    if service.foundation.manifest is not None and state.history:
        status.last_round.CopyFrom(rounds_of(state, service.foundation.manifest, state.history[-1:])[0])
    return status


def _best(best: Best, state: State) -> pb.BestAdapter:
    return pb.BestAdapter(
        round=best.round,
        digest=best.adapter_digest,
        metric=best.metric,
        value=best.value,
        source="central" if best.is_central else "federated",
        evaluations_since=best.evaluations_since,
        patience=state.known_rules.stopping.patience,
    )


def forecast_of(service: CoordinatorService) -> pb.CollapseForecast:
    """What a rank-agnostic average would do to these clients."""
    forecast = service.forecast()
    return pb.CollapseForecast(
        smallest_rank=forecast.smallest_rank,
        largest_rank=forecast.largest_rank,
        factor=forecast.factor,
        half_life_rounds=forecast.half_life_rounds,
        sentence=forecast.sentence,
    )


def rounds_of(state: State, manifest: Manifest, records: Sequence[RoundRecord]) -> list[pb.RoundSummary]:
    """Finished rounds, as they stand in the journal."""
    return [_round(state, manifest, record) for record in records]


def client_summary(service: CoordinatorService, client: Client) -> pb.ClientSummary:
    """One client."""
    manifest = service.foundation.manifest
    return pb.ClientSummary(
        client_id=client.client_id,
        max_rank=client.profile.max_rank,
        lora_rank=client.rank,
        device=client.profile.device,
        memory_bytes=client.profile.memory_bytes,
        num_examples=client.profile.num_examples,
        rank_reason=client.rank_reason,
        evaluates_only=client.profile.evaluates_only,
        quantization=client.profile.measured.quantization if client.profile.measured else "",
        examples_per_second=client.profile.examples_per_second,
        micro_batch=client.profile.measured.micro_batch if client.profile.measured else 0,
        membership=client.membership,
        silent_seconds=service.engine.silent_seconds(client.client_id),
        rounds_contributed=client.rounds_contributed,
        software_version=client.profile.software_version,
        last_failure=client.last_failure,
        slice_bytes=manifest.layout(client.rank).size_bytes if manifest else 0,
        organisation=service.security.organisation_of(client.client_id),
    )


def _assignment(service: CoordinatorService, assignment: Assignment) -> pb.AssignmentStatus:
    silent = service.engine.silent_seconds(assignment.client_id)
    status = pb.AssignmentStatus(
        client_id=assignment.client_id,
        lora_rank=assignment.rank,
        state=_assignment_state(assignment),
        silent_seconds=silent,
        late=not assignment.is_done and silent > service.config.rounds.lease_ttl_seconds / 2,
        failures=assignment.failures,
        last_failure=assignment.failure,
    )
    if assignment.lease_token > 0 and not assignment.is_done:
        progress = service.counters.progress.get(assignment.client_id, Progress())
        status.activity = _activity(service, assignment, progress)
        status.step, status.total_steps = progress.step, progress.total_steps
        status.train_loss = progress.train_loss
    return status


def _activity(service: CoordinatorService, assignment: Assignment, progress: Progress) -> str:
    client = service.engine.state.clients[assignment.client_id]
    return progress.activity if client.is_active else client.membership.value


def _assignment_state(assignment: Assignment) -> pb.AssignmentState:
    if assignment.is_done:
        return pb.ASSIGNMENT_STATE_DONE
    if assignment.is_failed:
        return pb.ASSIGNMENT_STATE_FAILED
    return pb.ASSIGNMENT_STATE_WORKING if assignment.lease_token else pb.ASSIGNMENT_STATE_WAITING


def _round(state: State, manifest: Manifest, record: RoundRecord) -> pb.RoundSummary:
    report, aggregation_seconds = report_from_json(record.report_json)
    uncovered = uncovered_rounds([r for r in state.history if r.number <= record.number])
    scores = scores_of(record)
    return pb.RoundSummary(
        round=record.number,
        attempts=record.attempts,
        adapter_digest=record.adapter_digest,
        partitions=[
            pb.RankPartition(
                low=p.low,
                high=p.high,
                energy_share=p.energy_share,
                contributors=p.contributors,
                effective_contributors=p.effective_contributors,
                rounds_uncovered=uncovered.get((p.low, p.high), 0),
            )
            for p in report.partitions
        ],
        rho=report.rho,
        effective_rank=report.effective_rank,
        rank_99=report.rank_99,
        energy=report.energy,
        energy_lost=report.energy_lost,
        contributions=[_contribution(c) for c in record.contributions],
        evaluations=[
            pb.EvaluationSummary(
                client_id=c, lora_rank=r, num_examples=e.num_examples, metrics=dict(e.metrics), central=e.is_central
            )
            for c, r, e in record.evaluations
        ],
        accuracy=scores.federated.metrics.get("accuracy", 0.0),
        eval_loss=scores.federated.metrics.get("eval_loss", 0.0),
        rank_levels=[_rank_level(rank, score) for rank, score in scores.by_rank],
        federated_metrics=dict(scores.federated.metrics),
        central_metrics=dict(scores.central.metrics),
        # What one clean transfer each costs; the running totals in the status include repetitions.
        bytes_sent=sum(manifest.layout(c.rank).size_bytes for c in record.contributions),
        bytes_received=sum(c.update.size_bytes for c in record.contributions),
        training_seconds=record.closed_at - record.opened_at,
        aggregation_seconds=aggregation_seconds,
        evaluation_seconds=max(0.0, (record.evaluated_at or 0.0) - record.published_at),
        learning_rate=manifest.learning_rate(record.number),
        train_loss=_mean(
            [c.update.metrics.get("train_loss") for c in record.contributions],
            [c.update.num_examples for c in record.contributions],
        ),
        certificate=pb.AggregationCertificate(**asdict(report.certificate)),
    )


def _rank_level(rank: int, score: Score) -> pb.RankLevelSummary:
    return pb.RankLevelSummary(
        lora_rank=rank, clients=score.clients, num_examples=score.num_examples, metrics=dict(score.metrics)
    )


def _contribution(contribution: Contribution) -> pb.Contribution:
    update = contribution.update
    return pb.Contribution(
        client_id=contribution.client_id,
        lora_rank=contribution.rank,
        num_examples=update.num_examples,
        digest=update.digest,
        size_bytes=update.size_bytes,
        train_loss=update.metrics.get("train_loss", 0.0),
        training_seconds=update.training_seconds,
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else 0.0
