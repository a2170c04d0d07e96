"""The course of a federation for TensorBoard, MLflow and Weights & Biases: one step a round, for the operator's eyes.

Sent are the numbers of `values_of_round` and `values_of_evaluation` and nothing of a single client.
"""

from collections.abc import Mapping

from common.trackers import Run, Trackers, check_installed
from coordinator.config import CoordinatorConfig
from coordinator.federation.scores import scores_of
from coordinator.federation.state import RoundRecord
from coordinator.merging import report_from_json
from coordinator.service import CoordinatorService

_LOOK_SECONDS = 60.0


def trackers_of(config: CoordinatorConfig) -> Trackers:
    """What the settings name. Raises ConfigError if a library is missing."""
    check_installed(config.tracking)
    settings = {
        "method": config.aggregation.method,
        "base_model": config.model.base_model,
        "task": config.model.task,
        "global_rank": str(config.adapter.global_rank),
        "num_rounds": str(config.rounds.num_rounds),
        "learning_rate": str(config.training.learning_rate),
        "batch_size": str(config.training.batch_size),
        "seed": str(config.rounds.seed),
    }
    name = config.tracking.run_name or config.name
    return Trackers.of(config.tracking, Run(config.name, name, config.state_dir, settings))


def values_of_round(record: RoundRecord) -> dict[str, float]:
    """What a published round says of itself."""
    report, aggregation_seconds = report_from_json(record.report_json)
    updates = [contribution.update for contribution in record.contributions]
    examples = sum(update.num_examples for update in updates)
    losses = [u.metrics["train_loss"] * u.num_examples for u in updates if "train_loss" in u.metrics]
    values = {
        "round/updates": float(len(updates)),
        "round/examples": float(examples),
        "round/training_seconds": record.closed_at - record.opened_at,
        "round/aggregation_seconds": aggregation_seconds,
        "round/received_bytes": float(sum(update.size_bytes for update in updates)),
        "ranks/rho": report.rho,
        "ranks/effective_rank": report.effective_rank,
        "ranks/energy_lost": report.energy_lost,
    }
    if losses and len(losses) == len(updates):
        values["round/train_loss"] = sum(losses) / examples
    for partition in report.partitions:
        values[f"energy/{partition.low + 1}-{partition.high}"] = partition.energy_share
    return values


def values_of_evaluation(record: RoundRecord) -> dict[str, float]:
    """What its evaluations say: over the clients that train, of each rank, and over the evaluators."""
    scores = scores_of(record)
    values = {**_under("federated", scores.federated.metrics), **_under("central", scores.central.metrics)}
    for rank, score in scores.by_rank:
        if score.clients > 1:  # one client's own number is nobody's business here
            values |= _under(f"federated_rank_{rank}", score.metrics)
    return values


async def track(service: CoordinatorService, trackers: Trackers) -> None:
    """Until the coordinator stops."""
    engine = service.engine
    told = engine.state.history  # of an earlier start, or of before this one
    version = -1
    while not engine.is_stopping:
        version = await engine.wait_for_change(version, _LOOK_SECONDS)
        state = engine.state
        for record in state.history[max(0, len(told) - 1) :]:
            before = told[record.number - 1] if record.number <= len(told) else None
            if before is None:
                trackers.note(record.number, values_of_round(record))
            if record.evaluations and record.evaluated_at != (before.evaluated_at if before else None):
                trackers.note(record.number, values_of_evaluation(record))
        told = state.history


def _under(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{metric}": value for metric, value in metrics.items()}
