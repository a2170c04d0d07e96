"""Carries out the command Aggregate: frozen inputs in, a durable global adapter and its report out."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog

from common.adapter import Adapter
from common.codec import MAX_MAGNITUDE, encode, name_of_lora_A, name_of_lora_B
from common.errors import NotFinite, RafloraError
from common.failpoints import reach
from coordinator.aggregation.report import RoundReport
from coordinator.aggregation.round import AggregationInput, AggregationJob, aggregate, initialise_pool
from coordinator.federation.requests import DIVERGED
from coordinator.federation.step import Aggregate
from coordinator.manifest import Manifest
from coordinator.stores.blobs import FileBlobs

MAX_THREADS = 4  # each holds a module's factors; more cores are worth processes
MAX_SHARE = 0.1  # of what an update may hold: who starts from an adapter at that bound could send nothing back

log = structlog.get_logger()


class Diverged(RafloraError):
    """The merged adapter holds numbers that no trained one does; trying again will not mend that."""

    reason = "diverged"


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


def make_pool(processes: int) -> Executor:
    """Who merges modules: fresh processes (a fork would inherit gRPC's threads and the state lock), or threads here.

    numpy works without the interpreter's lock, so threads use the cores too; processes never hold up the event loop.
    """
    if processes == 0:
        return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="merge")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=initialise_pool)


def merge(
    command: Aggregate,
    manifest: Manifest,
    levels: tuple[int, ...],
    blobs: FileBlobs,
    pool: Executor,
) -> Merged:
    """Verifies every input's digest, aggregates, and makes the result durable. Blocking.

    Raises CorruptStore if a blob changed on disk, NotFinite if the result is not finite, Diverged if it is absurd.
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
        aggregated = aggregate(job, pool.map)
    except np.linalg.LinAlgError as error:
        raise NotFinite(f"round {command.number}: the singular values did not converge: {error}") from error
    reach("adapter.merged")
    check_slices(aggregated.adapter, manifest, levels)
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
        half_passes=report.certificate.half_passes,
        residual=float(f"{report.certificate.residual:.2g}"),
        captured=round(report.certificate.captured, 6),
        seconds=round(seconds, 3),
    )
    return Merged(digest, report, seconds)


def check_slices(adapter: Adapter, manifest: Manifest, ranks: Iterable[int]) -> None:
    """Whether clients of these ranks, and of the global one, could train on from their slices. Raises Diverged."""
    largest, where = max(_magnitudes(adapter, manifest, {*ranks, manifest.adapter.global_rank}))
    if largest > MAX_SHARE * MAX_MAGNITUDE:
        raise Diverged(
            f"{DIVERGED}: {where} holds {largest:.3g}, at most {MAX_SHARE * MAX_MAGNITUDE:g} is "
            "published; the last adapter stays; a lower training.learning_rate needs a new federation"
        )


def _magnitudes(adapter: Adapter, manifest: Manifest, ranks: Iterable[int]) -> Iterator[tuple[float, str]]:
    """The largest number of every tensor as it would be handed out, and its name."""
    yield 0.0, "nothing"
    for name, tensor in adapter.tensors.items():
        yield float(np.abs(tensor).max(initial=0.0)), name
    for name, factors in adapter.modules.items():
        yield float(np.abs(factors.lora_A).max(initial=0.0)), name_of_lora_A(name)
        columns = np.maximum.accumulate(np.abs(factors.lora_B).max(axis=0))  # [rank]: of the first 1, 2, 3 ... columns
        for rank in ranks:
            yield float(columns[min(rank, adapter.rank) - 1]) / manifest.scaling(rank), name_of_lora_B(name)
