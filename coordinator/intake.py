"""What clients send: uploads and submissions.

The order of a submission is the promise: validate, make the bytes durable, append one event, answer.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import structlog

from common.codec import Layout, check_file, read_module
from common.errors import AdapterMismatch, InvalidRequest, TooBusy, UnknownTask, WrongRank, WrongSize
from common.transfer import check_digest
from coordinator.federation.requests import Outcome, SubmitEvaluation, SubmitUpdate
from coordinator.federation.state import Assignment, Client, Kind
from coordinator.founding import Foundation
from coordinator.slices import BlobReference
from coordinator.stores.uploads import Upload

MAX_METRICS = 64
MAX_EXAMPLES = 1 << 32
CHUNK_WAIT_SECONDS = 60.0  # a sender that is silent for longer has gone; it resumes at its offset
STREAM_SECONDS = 600.0  # then it resumes too: who sends byte by byte must not hold a place that others need

T = TypeVar("T")

log = structlog.get_logger()


class Intake:
    """Takes bytes in and commits them. `known_member` says who may, and notes that it is alive."""

    def __init__(self, foundation: Foundation, known_member: Callable[[str, str], Awaitable[Client]]) -> None:
        self.bytes_received = 0  # since this process started
        self._foundation = foundation
        self._engine = foundation.engine
        self._known_member = known_member
        self._uploads = foundation.uploads
        self._unfinished: set[asyncio.Task[Any]] = set()
        # By client; gone with the last user.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def begin_upload(self, client_id: str, enrol_key: str, reference: BlobReference) -> int:
        """How much of an upload is durable. Raises UnknownTask without a task, WrongRank or WrongSize if none fits."""
        await self._known_member(client_id, enrol_key)
        check_digest(reference.digest, f"client {client_id!r}")
        opened = self._engine.state.open
        assignment = opened.assignment_of(client_id) if opened and opened.kind is Kind.TRAIN else None
        if assignment is None:
            raise UnknownTask(f"client {client_id!r} has no training task now, so there is nothing to upload")
        if assignment.update is not None and assignment.update.digest == reference.digest:
            return reference.size_bytes  # accepted before; the submission will say so
        self._check_size(assignment, reference.size_bytes)
        return await self._foundation.on_disk(self._uploads.begin, client_id, reference.digest, reference.size_bytes)

    async def receive(
        self, client_id: str, enrol_key: str, digest: str, offset: int, chunks: AsyncIterator[bytes]
    ) -> int:
        """Takes a stream of chunks from an offset; what is durable at its end. Raises TooBusy if it takes too long."""
        await self._known_member(client_id, enrol_key)
        on_disk, whose = self._foundation.on_disk, f"client {client_id!r}"
        upload: Upload = await self._to_the_end(on_disk(self._uploads.open, client_id, digest), _close)
        ends_at = asyncio.get_running_loop().time() + STREAM_SECONDS
        try:
            while True:
                chunk = await _next_of(chunks, ends_at, whose)
                if chunk is None:
                    return await on_disk(upload.finish)
                if not chunk:
                    raise InvalidRequest(f"{whose}: an empty chunk at byte {offset}")
                await on_disk(upload.append, offset, chunk)
                offset += len(chunk)
                self.bytes_received += len(chunk)
                self._engine.hear(client_id)  # a long upload is a sign of life
        finally:
            await on_disk(upload.close)

    async def committed_bytes(self, client_id: str, enrol_key: str, digest: str) -> int:
        """How much of an upload is durable."""
        await self._known_member(client_id, enrol_key)
        return await self._foundation.on_disk(self._uploads.committed_bytes, client_id, digest)

    async def submit_update(self, request: SubmitUpdate, enrol_key: str) -> Outcome:
        """Validates, makes durable, records, and only then answers. Bad bytes are forgotten and change nothing."""
        client_id, update = request.client_id, request.update
        await self._known_member(client_id, enrol_key)
        _check_numbers(client_id, update.num_examples, update.metrics, update.training_seconds)
        # One at a time for each client: a repetition finds what became of the first, not its half-moved files.
        turn = self._turns.setdefault(client_id, asyncio.Lock())
        await turn.acquire()
        return await self._to_the_end(self._submit_in_turn(request, turn))

    async def submit_evaluation(self, request: SubmitEvaluation, enrol_key: str) -> Outcome:
        """Records an evaluation."""
        await self._known_member(request.client_id, enrol_key)
        _check_numbers(request.client_id, request.evaluation.num_examples, request.evaluation.metrics)
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
        path = await on_disk(self._uploads.completed_path, client_id, update.digest)
        manifest, whose = self._foundation.known_manifest, f"client {client_id!r}, round {request.number}"
        layout = manifest.layout(assignment.rank)
        try:
            await on_disk(check_file, path, layout, whose)
            if manifest.freezes_lora_A and assignment.slice_digest:
                handed_out = self._foundation.blobs.open(assignment.slice_digest)
                await on_disk(check_lora_A_is_kept, path, handed_out, layout, whose)
        except InvalidRequest:
            await on_disk(self._uploads.discard, client_id, update.digest)
            raise
        return await self._commit(replace(request, update=replace(update, size_bytes=layout.size_bytes)))

    async def _commit(self, request: SubmitUpdate) -> Outcome:
        client_id, digest = request.client_id, request.update.digest
        with self._foundation.pinned(digest):
            await self._foundation.on_disk(self._uploads.commit, client_id, digest)
            outcome = (await self._engine.submit(request)).outcome
        if outcome is Outcome.ACCEPTED:
            log.info("update accepted", client=client_id, round=request.number, digest=digest[:12])
            await self._foundation.on_disk(self._uploads.discard, client_id, digest)
        return outcome

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

    async def _to_the_end(self, work: Coroutine[Any, Any, T], undo: Callable[[T], None] | None = None) -> T:
        """The work's result. If the caller hangs up, the work goes on to its end, and `undo` takes its result back."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                task.add_done_callback(lambda done: _undo(done, undo))
            raise


def check_lora_A_is_kept(update: Path, handed_out: Path, layout: Layout, whose: str) -> None:
    """Raises AdapterMismatch unless every lora_A of an update is that of the slice it was trained from.

    A worker that does not know the plan's `freezes_lora_a` would train it, and the method would average nonsense.
    """
    for module in layout.spec.modules:
        kept, found = (read_module(path, layout, module.name).lora_A for path in (handed_out, update))
        if not np.array_equal(kept, found):
            raise AdapterMismatch(
                f"{whose}: {module.name}.lora_A was trained, but this federation's method keeps lora_A as it is; "
                "is the worker older than the coordinator?"
            )


async def _next_of(chunks: AsyncIterator[bytes], ends_at: float, whose: str) -> bytes | None:
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


def _undo(done: "asyncio.Task[T]", undo: Callable[[T], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())


def _close(upload: Upload) -> None:
    upload.close()


def _check_numbers(client_id: str, num_examples: int, metrics: Mapping[str, float], seconds: float = 0.0) -> None:
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise InvalidRequest(f"client {client_id!r}: num_examples {num_examples}; 1 to {MAX_EXAMPLES} are accepted")
    if len(metrics) > MAX_METRICS or any(len(name) > 100 for name in metrics):
        raise InvalidRequest(f"client {client_id!r}: {len(metrics)} metrics; at most {MAX_METRICS} short names")
    bad = [name for name, value in [*metrics.items(), ("training_seconds", seconds)] if not math.isfinite(value)]
    if bad:
        raise InvalidRequest(f"client {client_id!r}: {bad[0]} is not finite")
