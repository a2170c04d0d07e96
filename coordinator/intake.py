"""What clients send: uploads and submissions.

The order of a submission is the promise: validate, make the bytes durable, append one event, answer.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from common.codec import check_file
from common.errors import InvalidRequest, UnknownTask, WrongSize
from common.transfer import check_digest
from coordinator.federation.requests import Outcome, SubmitEvaluation, SubmitUpdate
from coordinator.federation.state import Client, Kind
from coordinator.founding import Foundation
from coordinator.slices import BlobReference
from coordinator.stores.uploads import Upload, UploadSpool

MAX_METRICS = 64
MAX_EXAMPLES = 1 << 32
_CHUNK_WAIT_SECONDS = 60.0  # a sender that is silent for longer has gone; it resumes at its offset

T = TypeVar("T")

log = structlog.get_logger()


class Intake:
    """Takes bytes in and commits them. `known_member` says who may, and notes that it is alive."""

    def __init__(self, foundation: Foundation, known_member: Callable[[str, str], Awaitable[Client]]) -> None:
        config = foundation.config
        self.bytes_received = 0  # since this process started
        self._foundation = foundation
        self._engine = foundation.engine
        self._known_member = known_member
        self._uploads = UploadSpool(config.state_dir / "uploads", foundation.blobs, config.server.max_uploads)
        self._unfinished: set[asyncio.Task[Any]] = set()

    async def begin_upload(self, client_id: str, enrol_key: str, reference: BlobReference) -> int:
        """How much of an upload is durable. Raises UnknownTask without a task, WrongSize unless it fits the rank."""
        await self._known_member(client_id, enrol_key)
        check_digest(reference.digest, f"client {client_id!r}")
        opened = self._engine.state.open
        assignment = opened.assignment_of(client_id) if opened and opened.kind is Kind.TRAIN else None
        if assignment is None:
            raise UnknownTask(f"client {client_id!r} has no training task now, so there is nothing to upload")
        if assignment.update is not None and assignment.update.digest == reference.digest:
            return reference.size_bytes  # accepted before; the submission will say so
        expected = self._foundation.known_manifest.layout(assignment.rank).size_bytes
        if reference.size_bytes != expected:
            raise WrongSize(
                f"client {client_id!r}: an update of {reference.size_bytes} bytes was announced, but rank "
                f"{assignment.rank} in {self._foundation.known_manifest.adapter.wire_dtype} is exactly {expected}"
            )
        return await asyncio.to_thread(self._uploads.begin, client_id, reference.digest, reference.size_bytes)

    async def receive(
        self, client_id: str, enrol_key: str, digest: str, offset: int, chunks: AsyncIterator[bytes]
    ) -> int:
        """Takes a stream of chunks from an offset; what is durable at its end."""
        await self._known_member(client_id, enrol_key)
        upload: Upload = await self._to_the_end(asyncio.to_thread(self._uploads.open, client_id, digest), _close)
        try:
            while True:
                async with asyncio.timeout(_CHUNK_WAIT_SECONDS):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return await asyncio.to_thread(upload.finish)
                await asyncio.to_thread(upload.append, offset, chunk)
                offset += len(chunk)
                self.bytes_received += len(chunk)
                self._engine.hear(client_id)  # a long upload is a sign of life
        finally:
            await asyncio.to_thread(upload.close)

    async def committed_bytes(self, client_id: str, enrol_key: str, digest: str) -> int:
        """How much of an upload is durable."""
        await self._known_member(client_id, enrol_key)
        return await asyncio.to_thread(self._uploads.committed_bytes, client_id, digest)

    async def submit_update(self, request: SubmitUpdate, enrol_key: str) -> Outcome:
        """Validates, makes durable, records, and only then answers. Bad bytes are forgotten and change nothing."""
        client_id, update = request.client_id, request.update
        await self._known_member(client_id, enrol_key)
        _check_numbers(client_id, update.num_examples, update.metrics, update.training_seconds)
        state = self._engine.state
        assignment = state.takeable_by(client_id)
        if (
            state.open is None
            or assignment is None
            or (state.open.number, state.open.kind)
            != (
                request.number,
                Kind.TRAIN,
            )
        ):
            return (await self._engine.submit(request)).outcome
        path = await asyncio.to_thread(self._uploads.completed_path, client_id, update.digest)
        layout = self._foundation.known_manifest.layout(assignment.rank)
        try:
            await asyncio.to_thread(check_file, path, layout, f"client {client_id!r}, round {request.number}")
        except InvalidRequest:
            await asyncio.to_thread(self._uploads.discard, client_id, update.digest)
            raise
        request = replace(request, update=replace(update, size_bytes=layout.size_bytes))
        return await self._to_the_end(self._commit(request))

    async def submit_evaluation(self, request: SubmitEvaluation, enrol_key: str) -> Outcome:
        """Records an evaluation."""
        await self._known_member(request.client_id, enrol_key)
        _check_numbers(request.client_id, request.evaluation.num_examples, request.evaluation.metrics)
        return (await self._engine.submit(request)).outcome

    async def _commit(self, request: SubmitUpdate) -> Outcome:
        client_id, digest = request.client_id, request.update.digest
        with self._foundation.pinned(digest):
            await asyncio.to_thread(self._uploads.commit, client_id, digest)
            outcome = (await self._engine.submit(request)).outcome
        if outcome is Outcome.ACCEPTED:
            log.info("update accepted", client=client_id, round=request.number, digest=digest[:12])
            await asyncio.to_thread(self._uploads.discard, client_id, digest)
        return outcome

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
