"""Carries out the command Aggregate: frozen inputs in, a durable global adapter and its report out."""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog

from common.codec import encode
from common.errors import NotFinite
from common.failpoints import reach
from coordinator.aggregation.report import RoundReport
from coordinator.aggregation.round import AggregationInput, AggregationJob, aggregate, initialise_pool
from coordinator.federation.step import Aggregate
from coordinator.manifest import Manifest
from coordinator.stores.blobs import FileBlobs

log = structlog.get_logger()


@dataclass(frozen=True)
class Merged:
    """What a round brought about."""

    adapter_digest: str
    report: RoundReport
    seconds: float

    def to_json(self) -> str:
        """For the journal."""
        return json.dumps({"report": self.report.to_json(), "aggregation_seconds": self.seconds})


def report_from_json(text: str) -> tuple[RoundReport, float]:
    """The report and the seconds that the aggregation took."""
    content = json.loads(text)
    return RoundReport.from_json(content["report"]), float(content["aggregation_seconds"])


def make_pool(processes: int) -> ProcessPoolExecutor | None:
    """A pool of fresh processes (a fork would inherit gRPC's threads and the state lock), or None for none."""
    if processes == 0:
        return None
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=initialise_pool)


def merge(
    command: Aggregate,
    manifest: Manifest,
    levels: tuple[int, ...],
    blobs: FileBlobs,
    pool: ProcessPoolExecutor | None,
) -> Merged:
    """Verifies every input's digest, aggregates, and makes the result durable. Blocking.

    Raises CorruptStore if a blob changed on disk, NotFinite if the result is not finite.
    """
    started = time.perf_counter()
    job = AggregationJob(
        spec=manifest.spec,
        wire_dtype=manifest.adapter.wire_dtype,
        global_rank=manifest.adapter.global_rank,
        previous=blobs.verify(command.previous_digest),
        inputs=tuple(
            AggregationInput(
                client_id=c.client_id,
                path=blobs.verify(c.update.digest),
                rank=c.rank,
                scaling=manifest.scaling(c.rank),
                num_examples=c.update.num_examples,
            )
            for c in command.inputs
        ),
        options=manifest.aggregation.options,
        levels=levels,
    )
    try:
        aggregated = aggregate(job, pool.map if pool else map)
    except np.linalg.LinAlgError as error:
        raise NotFinite(f"round {command.number}: the singular values did not converge: {error}") from error
    reach("adapter.merged")
    digest = blobs.put(encode(aggregated.adapter))
    reach("adapter.stored")
    report = aggregated.report
    seconds = time.perf_counter() - started
    log.info(
        "aggregated",
        round=command.number,
        updates=len(command.inputs),
        rho=round(report.rho, 4),
        effective_rank=round(report.effective_rank, 2),
        seconds=round(seconds, 3),
    )
    return Merged(digest, report, seconds)
