"""What clients send: uploads and submissions.

The order of a submission is the promise: validate, make the bytes durable, append one event, answer.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog

from common.errors import (
    CorruptTransfer,
    InspectionFailed,
    InvalidRequest,
    TooBusy,
    UnknownBlob,
    UnknownTask,
    WrongRank,
    WrongSize,
)
from common.failpoints import reach
from common.side_by_side import OneBehind
from common.transfer import check_digest
from coordinator.federation.leases import check_lease_holds
from coordinator.federation.requests import MAX_EXAMPLES, Outcome, SubmitEvaluation, SubmitUpdate
from coordinator.federation.state import Assignment, Client, Kind
from coordinator.founding import Foundation
from coordinator.inspection import Inspection
from coordinator.inspectors import Allowance, Inspectors
from coordinator.limits import Ledger, partition_bounds
from coordinator.slices import BlobReference
from coordinator.stores.uploads import Arrival

MAX_METRICS = 64
MAX_WRITES = 4  # chunks that are hashed and written at one time: more threads would keep the event loop from its turn
SMALL_CHUNK_BYTES = 64 << 10
_METRIC_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
SHARES = frozenset({"accuracy", "accuracy_norm", "exact_match", "token_accuracy"})  # of all examples or tokens
MAX_METRIC = 1e30  # weighted means over a federation stay finite
MAX_TRAINING_SECONDS = 1e9
CHUNK_WAIT_SECONDS = 60.0  # a sender that is silent for longer has gone; it resumes at its offset
STREAM_SECONDS = 600.0  # then it resumes too: who sends byte by byte must not hold a place that others need

T = TypeVar("T")

log = structlog.get_logger()


class Intake:
    """Takes bytes in and commits them. `known_member` says who may, and notes that it is alive."""

    def __init__(
        self,
        foundation: Foundation,
        known_member: Callable[[str, str], Awaitable[Client]],
        organisation_of: Callable[[str], str] = str,  # without certificates a client is its own organisation
        inspectors: Inspectors | None = None,
    ) -> None:
        limits = foundation.config.limits
        self.ledger = Ledger(limits, organisation_of, foundation.engine.state, foundation.engine.now)
        self._inspectors = inspectors or Inspectors(
            Allowance(limits.inspection_seconds, limits.inspection_memory_bytes)
        )
        self._foundation = foundation
        self._engine = foundation.engine
        self._known_member = known_member
        self._uploads = foundation.uploads
        self._writes = asyncio.Semaphore(MAX_WRITES)
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._announced: dict[str, tuple[str, int]] = {}  # by client: the digest it may send, and under which lease
        # By client; gone with the last user.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Ends the inspections that are under way."""
        self._inspectors.close()

    async def begin_upload(self, client_id: str, enrol_key: str, lease_token: int, reference: BlobReference) -> int:
        """How much of an upload is durable.

        Raises UnknownTask without a task or lease, LeaseSuperseded, WrongRank or WrongSize if no task fits.
        """
        await self._known_member(client_id, enrol_key)
        check_digest(reference.digest, f"client {client_id!r}")
        assignment = self._training_task_of(client_id)
        if assignment.update is not None and assignment.update.digest == reference.digest:
            return reference.size_bytes  # accepted before; the submission will say so
        # Before anything is touched: an announcement drops what this client sent before.
        check_lease_holds(assignment, lease_token, f"client {client_id!r}")
        self._check_size(assignment, reference.size_bytes)
        self.ledger.announce(client_id, reference.digest, reference.size_bytes, self._engine.now)
        self._announced[client_id] = (reference.digest, lease_token)
        return await self._foundation.on_disk(self._uploads.begin, client_id, reference.digest, reference.size_bytes)

    async def receive(
        self, client_id: str, enrol_key: str, digest: str, offset: int, chunks: AsyncIterator[bytes | memoryview]
    ) -> int:
        """Takes a stream of chunks from an offset; what is durable at its end.

        Raises UnknownBlob if it was not announced since this process started, LeaseSuperseded if a newer lease was
        given since then, TooBusy if it takes too long.
        """
        await self._known_member(client_id, enrol_key)
        check_digest(digest, f"client {client_id!r}")
        announced, lease_token = self._announced.get(client_id, ("", 0))
        if announced != digest:
            raise UnknownBlob(f"client {client_id!r}: no upload of {digest[:12]} is open; announce it first")
        check_lease_holds(self._training_task_of(client_id), lease_token, f"client {client_id!r}")
        return await self._receive(client_id, digest, offset, chunks)

    async def _receive(
        self, client_id: str, digest: str, offset: int, chunks: AsyncIterator[bytes | memoryview]
    ) -> int:
        on_disk, whose = self._foundation.on_disk, f"client {client_id!r}"
        arrival = self._uploads.arrival(client_id, digest)
        ends_at = asyncio.get_running_loop().time() + STREAM_SECONDS
        writing = OneBehind()  # hashed and written while the next chunk arrives
        place = ExitStack()
        place.enter_context(self.ledger.stream(client_id))  # until nothing is written any more
        try:
            while (chunk := await _next_of(chunks, ends_at, whose)) is not None:
                if not chunk:
                    raise InvalidRequest(f"{whose}: an empty chunk at byte {offset}")
                await writing.start(partial(self._write, arrival, offset, chunk))
                offset += len(chunk)
                del chunk  # a sender that falls silent must not hold a megabyte
                self._engine.hear(client_id)  # a long upload is a sign of life
            await writing.settle()
            return arrival.committed_bytes if arrival.is_complete else await on_disk(arrival.end)
        except CorruptTransfer:
            self.ledger.forget(client_id)
            raise
        finally:
            await self._to_the_end(self._wind_up(writing, arrival, place))

    async def _write(self, arrival: Arrival, offset: int, chunk: bytes | memoryview) -> None:
        # A small chunk waits for the disk and not for a processor, and the disk serves many at once.
        async with self._writes if len(chunk) > SMALL_CHUNK_BYTES else nullcontext():
            await self._foundation.on_disk(arrival.take, offset, chunk)

    async def _wind_up(self, writing: OneBehind, arrival: Arrival, place: ExitStack) -> None:
        with place:
            await writing.abandon()
            if arrival.has_to_be_closed:
                await self._foundation.on_disk(arrival.close)

    async def committed_bytes(self, client_id: str, enrol_key: str, digest: str) -> int:
        """How much of an upload is durable."""
        await self._known_member(client_id, enrol_key)
        return await self._foundation.on_disk(self._uploads.committed_bytes, client_id, digest)

    async def submit_update(self, request: SubmitUpdate, enrol_key: str) -> Outcome:
        """Validates, makes durable, records, and only then answers. Bad bytes are forgotten and change nothing."""
        client_id, update = request.client_id, request.update
        await self._known_member(client_id, enrol_key)
        _check_numbers(client_id, update.num_examples, update.metrics, update.training_seconds)
        self.ledger.check_examples(client_id, update.num_examples)
        # One at a time for each client: a repetition finds what became of the first, not its half-moved files.
        turn = self._turns.setdefault(client_id, asyncio.Lock())
        await turn.acquire()
        return await self._to_the_end(self._submit_in_turn(request, turn))

    async def submit_evaluation(self, request: SubmitEvaluation, enrol_key: str) -> Outcome:
        """Records an evaluation."""
        await self._known_member(request.client_id, enrol_key)
        _check_numbers(request.client_id, request.evaluation.num_examples, request.evaluation.metrics)
        self.ledger.check_examples(request.client_id, request.evaluation.num_examples)
        return (await self._engine.submit(request)).outcome

    async def _submit_in_turn(self, request: SubmitUpdate, turn: asyncio.Lock) -> Outcome:
        try:
            return await self._submit(request)
        finally:
            turn.release()

    async def _submit(self, request: SubmitUpdate) -> Outcome:
        client_id, update, on_disk = request.client_id, request.update, self._foundation.on_disk
        state = self._engine.state
        assignment = state.takeable_by(client_id)
        opened, asked = state.open, (request.number, Kind.TRAIN)
        if opened is None or assignment is None or (opened.number, opened.kind) != asked:
            return (await self._engine.submit(request)).outcome
        path = await on_disk(self._uploads.checked_path, client_id, update.digest)
        try:
            size_bytes = await self._inspect(path, request, assignment)
        except InvalidRequest as error:
            if isinstance(error, InspectionFailed):
                log.error("inspection failed", client=client_id, round=request.number, why=str(error))
            self.ledger.forget(client_id)
            await on_disk(self._uploads.discard, client_id, update.digest)
            raise
        reach("update.checked")
        return await self._commit(replace(request, update=replace(update, size_bytes=size_bytes)))

    async def _inspect(self, path: Path, request: SubmitUpdate, assignment: Assignment) -> int:
        """The file's length, after a process of its own has looked at it. Raises AdapterMismatch and its kin."""
        manifest, limits = self._foundation.known_manifest, self._foundation.config.limits
        keeps_lora_A = manifest.freezes_lora_A and assignment.slice_digest
        bounds: tuple[int, ...] = ()
        if limits.max_partition_norm is not None:
            clients = self._engine.state.clients.values()
            ranks = [client.rank for client in clients if not client.profile.evaluates_only]
            bounds = partition_bounds(ranks, assignment.rank)
        inspection = Inspection(
            path=path,
            layout=manifest.layout(assignment.rank),
            whose=f"client {request.client_id!r}, round {request.number}",
            handed_out=self._foundation.blobs.open(assignment.slice_digest) if keeps_lora_A else None,
            bounds=bounds,
            scaling=manifest.scaling(assignment.rank),
        )
        norms = await self._inspectors.inspect(inspection)
        self.ledger.check_norms(request.client_id, inspection.bounds, norms)
        return inspection.layout.size_bytes

    async def _commit(self, request: SubmitUpdate) -> Outcome:
        client_id, digest = request.client_id, request.update.digest
        with self._foundation.pinned(digest):
            await self._foundation.on_disk(self._uploads.commit, client_id, digest)
            reach("update.stored")
            outcome = (await self._engine.submit(request)).outcome
        reach("update.recorded")
        if outcome is Outcome.ACCEPTED:
            log.info("update accepted", client=client_id, round=request.number, digest=digest[:12])
            self.ledger.forget(client_id)
            await self._foundation.on_disk(self._uploads.discard, client_id, digest)
        return outcome

    def _training_task_of(self, client_id: str) -> Assignment:
        opened = self._engine.state.open
        assignment = opened.assignment_of(client_id) if opened and opened.kind is Kind.TRAIN else None
        if assignment is None:
            raise UnknownTask(f"client {client_id!r} has no training task now, so there is nothing to upload")
        return assignment

    def _check_size(self, assignment: Assignment, size_bytes: int) -> None:
        manifest, rank = self._foundation.known_manifest, assignment.rank
        expected = manifest.layout(rank).size_bytes
        if size_bytes == expected:
            return
        announced = f"client {assignment.client_id!r}: an update of {size_bytes} bytes was announced"
        needed = f"rank {rank} in {manifest.adapter.wire_dtype} is exactly {expected}"
        # Sizes are linear in the rank but for some digits of the header, so three ranks at most can be meant;
        # trying them all would let a bad request hold the event loop.
        per_rank = manifest.layout(rank + 1).size_bytes - expected
        nearest = rank + round((size_bytes - expected) / per_rank)
        for other in range(max(1, nearest - 1), min(manifest.adapter.global_rank, nearest + 1) + 1):
            if manifest.layout(other).size_bytes == size_bytes:
                raise WrongRank(f"{announced}, which is rank {other}, but its task is of rank {rank}: {needed}")
        raise WrongSize(f"{announced}, but {needed}")

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result. If the caller hangs up, the work goes on to its end."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return await asyncio.shield(task)


async def _next_of(chunks: AsyncIterator[bytes | memoryview], ends_at: float, whose: str) -> bytes | memoryview | None:
    """The next chunk, or None after the last. Raises TooBusy if it does not come in time."""
    now = asyncio.get_running_loop().time()
    try:
        if now >= ends_at:
            raise TimeoutError
        async with asyncio.timeout_at(min(now + CHUNK_WAIT_SECONDS, ends_at)):
            return await anext(chunks, None)
    except TimeoutError:
        raise TooBusy(
            f"{whose}: an upload that is silent for {CHUNK_WAIT_SECONDS:g} s or takes longer than "
            f"{STREAM_SECONDS:g} s gives its place to others; begin it again, it goes on where it was"
        ) from None


def _check_numbers(client_id: str, num_examples: int, metrics: Mapping[str, float], seconds: float = 0.0) -> None:
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise InvalidRequest(f"client {client_id!r}: num_examples {num_examples}; 1 to {MAX_EXAMPLES} are accepted")
    if len(metrics) > MAX_METRICS:
        raise InvalidRequest(f"client {client_id!r}: {len(metrics)} metrics; at most {MAX_METRICS} are accepted")
    for name in metrics:
        # They stand in logs, on terminals and in columns of tables.
        if not _METRIC_NAME.fullmatch(name):
            raise InvalidRequest(
                f"client {client_id!r}: {name[:63]!r} cannot be a metric's name; a small letter and up to 62 more "
                "small letters, digits and underscores are accepted"
            )
    bad = [name for name, value in [*metrics.items(), ("training_seconds", seconds)] if not math.isfinite(value)]
    if bad:
        raise InvalidRequest(f"client {client_id!r}: {bad[0]} is not finite")
    huge = next((name for name, value in metrics.items() if abs(value) > MAX_METRIC), None)
    if huge is not None:
        raise InvalidRequest(f"client {client_id!r}: {huge} is {metrics[huge]:g}; at most {MAX_METRIC:g} is accepted")
    off = next((name for name in sorted(SHARES & metrics.keys()) if not 0.0 <= metrics[name] <= 1.0), None)
    if off is not None:
        raise InvalidRequest(f"client {client_id!r}: {off} is {metrics[off]:g}; 0 to 1 is accepted, it is a share")
    if not 0.0 <= seconds <= MAX_TRAINING_SECONDS:
        raise InvalidRequest(
            f"client {client_id!r}: training_seconds {seconds:g}; 0 to {MAX_TRAINING_SECONDS:g} are accepted"
        )
