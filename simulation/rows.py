"""The rows of a run, from its journal's state alone. Pure."""

import json
from collections.abc import Sequence
from typing import Any

from coordinator.aggregation.forecast import forecast_collapse
from coordinator.aggregation.report import RoundReport
from coordinator.federation.state import Phase, RoundRecord, State
from coordinator.manifest import Manifest
from simulation.federation import has_diverged
from simulation.population import SimulatedClient
from simulation.results import AccuracyRow, PartitionRow, Results, RoundRow, RunKey, RunRow
from simulation.schedule import FINISHED, RunPlan

DIVERGED, STOPPED = "diverged", "stopped"


def results_of(run: RunPlan, manifest: Manifest, population: Sequence[SimulatedClient], state: State) -> Results:
    """What a run measured, published round by published round."""
    bodies = [(record, json.loads(record.report_json)) for record in state.history]
    key = run.key
    return Results(
        runs=(_run_row(run, manifest, population, state),),
        rounds=tuple(_round_row(key, manifest, record, body) for record, body in bodies),
        partitions=tuple(row for record, body in bodies for row in _partition_rows(key, record, body)),
        accuracy=tuple(
            AccuracyRow(key=key, round=record.number, **measured)
            for record, body in bodies
            for measured in body["accuracy"]
        ),
    )


def _run_row(run: RunPlan, manifest: Manifest, population: Sequence[SimulatedClient], state: State) -> RunRow:
    bodies = [json.loads(record.report_json) for record in state.history]
    census = [(client.rank, client.num_examples) for client in population]
    return RunRow(
        key=run.key,
        method=run.arm.method,
        status=_status(state, bodies),
        rounds=state.round,
        smallest_rank=min(client.rank for client in population),
        global_rank=manifest.adapter.global_rank,
        download_bytes=sum(body["simulation"]["download_bytes"] for body in bodies),
        upload_bytes=sum(body["simulation"]["upload_bytes"] for body in bodies),
        forecast_factor=forecast_collapse(census, run.experiment.clients.per_round).factor,
        initial_energy_ratio=_initial_energy_ratio([RoundReport.from_json(body["report"]) for body in bodies]),
        seconds=sum(body["simulation"]["seconds"] for body in bodies),
    )


def _status(state: State, bodies: Sequence[dict[str, Any]]) -> str:
    """How a run ended. Numbers that are not finite any more are told from clients that did not answer."""
    if state.phase is not Phase.FINISHED:
        return f"{DIVERGED if has_diverged(state.pause_reason) else STOPPED}: {state.pause_reason}"
    if ranks := bodies[-1]["diverged_ranks"]:
        at = ", ".join(str(rank) for rank in ranks)
        return f"{DIVERGED}: the evaluation after round {state.round} is not finite at rank {at}"
    return FINISHED


def _initial_energy_ratio(reports: Sequence[RoundReport]) -> float:
    first = next((report for report in reports if report.rho > 0.0), None)
    return 0.0 if first is None else (1.0 - first.rho) / first.rho


def _round_row(key: RunKey, manifest: Manifest, record: RoundRecord, body: dict[str, Any]) -> RoundRow:
    report, measured = RoundReport.from_json(body["report"]), body["simulation"]
    updates = [contribution.update for contribution in record.contributions]
    num_examples = sum(update.num_examples for update in updates)
    return RoundRow(
        key=key,
        round=record.number,
        learning_rate_now=manifest.learning_rate(record.number),
        train_loss=sum(update.metrics["train_loss"] * update.num_examples for update in updates) / num_examples,
        contributors=len(updates),
        rho=report.rho,
        effective_rank=report.effective_rank,
        rank_99=report.rank_99,
        energy=report.energy,
        norm=report.norm,
        energy_lost=report.energy_lost,
        download_bytes=measured["download_bytes"],
        upload_bytes=measured["upload_bytes"],
    )


def _partition_rows(key: RunKey, record: RoundRecord, body: dict[str, Any]) -> list[PartitionRow]:
    return [
        PartitionRow(
            key=key,
            round=record.number,
            low=partition.low,
            high=partition.high,
            energy_share=partition.energy_share,
            contributors=partition.contributors,
            effective_contributors=partition.effective_contributors,
        )
        for partition in RoundReport.from_json(body["report"]).partitions
    ]
