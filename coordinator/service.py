"""What the coordinator does for its callers, in domain words; servicers translate, the engine decides.

The order of a submission is the promise: validate, make the bytes durable, append one event, answer.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace

import structlog

from common.adapter import Adapter, AdapterSpec
from common.codec import check_file
from common.errors import InvalidRequest, NothingPublished, RafloraError, UnknownBlob, UnknownTask, WrongSize
from common.transfer import check_digest
from coordinator.aggregation.forecast import CollapseForecast, forecast_collapse
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.federation.explain import explain
from coordinator.federation.requests import (
    AbortRound,
    Claim,
    Fail,
    Join,
    Leave,
    NoteSilence,
    Outcome,
    Publish,
    SubmitEvaluation,
    SubmitUpdate,
    check_join,
)
from coordinator.federation.state import (
    Assignment,
    Client,
    Kind,
    Membership,
    OpenRound,
    Phase,
    Profile,
    part_of,
)
from coordinator.federation.step import Aggregate, Command, member
from coordinator.founding import check_base_model, check_spec, found
from coordinator.manifest import Manifest, RoundPlan, check_unchanged, read_spec_file
from coordinator.merging import make_pool, merge
from coordinator.slices import BlobReference, Slices, read_global_adapter
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import Journal
from coordinator.stores.uploads import Upload, UploadSpool

MAX_METRICS = 64
MAX_EXAMPLES = 1 << 32
MAX_POLL_SECONDS = 45.0
_CHUNK_WAIT_SECONDS = 60.0  # a sender that is silent for longer has gone; it resumes at its offset

log = structlog.get_logger()


@dataclass(frozen=True)
class Task:
    """An order that a client has fetched."""

    kind: Kind
    number: int
    attempt: int
    lease_token: int
    rank: int
    scaling: float
    slice: BlobReference
    plan: RoundPlan
    deadline_seconds: float


@dataclass(frozen=True)
class Progress:
    """What a worker last said of its task."""

    activity: str = ""
    step: int = 0
    total_steps: int = 0
    train_loss: float = 0.0


@dataclass(frozen=True)
class PublishedAdapter:
    """For whoever exports: the effective global adapter of a round."""

    adapter: Adapter
    manifest: Manifest
    round: int


@dataclass
class Counters:
    """Volatile; since this process started."""

    bytes_sent: int = 0
    bytes_received: int = 0
    progress: dict[str, Progress] = field(default_factory=dict)


class CoordinatorService:
    """One federation, served. Everything slow runs in threads; nothing here blocks the event loop."""

    def __init__(
        self,
        config: CoordinatorConfig,
        journal: Journal,
        blobs: FileBlobs,
        on_published: Callable[[PublishedAdapter], None] | None = None,
    ) -> None:
        self.config = config
        self.blobs = blobs
        self.counters = Counters()
        self.uploads = UploadSpool(config.state_dir / "uploads", blobs, config.server.max_uploads)
        self.engine = Engine(config.name, journal, self._carry_out)
        self.manifest: Manifest | None = None
        self._slices: Slices | None = None
        self._on_published = on_published
        self._pool = make_pool(config.aggregation.processes)
        self._founding = asyncio.Lock()
        self._commands = asyncio.TaskGroup()  # an error in one of them is fatal, as in the engine
        self._merging = 0
        self._in_flight: set[str] = set()  # digests adopted whose event is not in the journal yet
        if self.engine.state.manifest_digest:
            content = blobs.verify(self.engine.state.manifest_digest).read_bytes()
            self._adopt(Manifest.from_content(content))
            check_unchanged(self.known_manifest, config)

    @property
    def known_manifest(self) -> Manifest:
        """Raises NothingPublished before the federation is founded."""
        if self.manifest is None:
            raise NothingPublished("no worker has joined yet, so there is no manifest and no adapter")
        return self.manifest

    @property
    def known_slices(self) -> Slices:
        """Likewise."""
        if self._slices is None:
            raise NothingPublished("no worker has joined yet, so there is no manifest and no adapter")
        return self._slices

    async def run(self) -> None:
        """The engine, and the founding if the spec is known from a file. Until cancelled; an error is fatal."""
        async with self._commands:
            self._commands.create_task(self.engine.run())
            if self.manifest is None and self.config.adapter.spec is not None:
                spec, digest = await asyncio.to_thread(read_spec_file, self.config.adapter.spec)
                await self._found_if_new(spec, digest, "adapter.spec")
            await self._sweep()

    def close(self) -> None:
        """Ends the helper processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ membership

    async def join(
        self, client_id: str, enrol_key: str, profile: Profile, spec: AdapterSpec, base_model_digest: str
    ) -> Client:
        """The client with its granted rank. The first one may found the federation."""
        whose, request = f"client {client_id!r}", Join(client_id, enrol_key, profile)
        check_join(request)  # before it may found anything
        check_digest(base_model_digest, whose)
        await self._found_if_new(spec, base_model_digest, whose)
        check_base_model(self.known_manifest.base_model_digest, base_model_digest, whose)
        check_spec(self.known_manifest, spec, whose)
        transition = await self.engine.submit(request)
        self.engine.hear(client_id)
        client = transition.state.clients[client_id]
        if transition.outcome is Outcome.ACCEPTED:
            log.info("client joined", client=client_id, rank=client.rank, examples=profile.num_examples)
        return client

    async def leave(self, client_id: str, enrol_key: str) -> None:
        """The client says good-bye."""
        await self.known_member(client_id, enrol_key)
        await self.engine.submit(Leave(client_id))
        log.info("client left", client=client_id)

    async def known_member(self, client_id: str, enrol_key: str) -> Client:
        """The client behind a call, noted as alive. Raises UnknownClient, Evicted or IdentityConflict."""
        client = member(self.engine.state, client_id, enrol_key)
        self.engine.hear(client_id)
        if client.membership is Membership.LOST:
            await self.engine.submit(NoteSilence(client_id, is_lost=False))
        return client

    # ------------------------------------------------------------ tasks

    async def next_task(self, client_id: str, enrol_key: str, wait_seconds: float) -> Task | None:
        """The client's task, leased to it, as soon as there is one; None after the wait or at the end."""
        deadline = self.engine.now + min(max(wait_seconds, 0.0), MAX_POLL_SECONDS)
        while True:
            version = self.engine.version
            await self.known_member(client_id, enrol_key)
            opened = self.engine.state.open
            assignment = _takeable(opened, self.engine.state.phase, client_id)
            if opened is not None and assignment is not None:
                task = await self._claim(opened, assignment)
                if task is not None:
                    return task
            left = deadline - self.engine.now
            if left <= 0 or self.engine.state.phase is Phase.FINISHED or self.engine.is_stopping:
                return None
            # Who waits here is alive: it must be heard more often than its lease is long.
            await self.engine.wait_for_change(version, min(left, self.config.rounds.lease_ttl_seconds / 3))

    def holds_lease(self, client_id: str, lease_token: int, progress: Progress) -> bool:
        """Whether the holder of the lease should go on; notes its progress."""
        opened = self.engine.state.open
        assignment = opened.assignment_of(client_id) if opened else None
        self.counters.progress[client_id] = progress
        return (
            assignment is not None
            and not assignment.is_done
            and assignment.lease_token == lease_token
            and self.engine.state.phase is not Phase.AGGREGATING
        )

    async def fail_task(self, client_id: str, enrol_key: str, lease_token: int, failure: str) -> bool:
        """Takes a task back; True if the client may be given it again."""
        await self.known_member(client_id, enrol_key)
        transition = await self.engine.submit(Fail(client_id, lease_token, failure[:500]))
        log.warning("task failed", client=client_id, failure=failure[:500])
        opened = transition.state.open
        assignment = opened.assignment_of(client_id) if opened else None
        return assignment is not None and not assignment.is_failed

    # ------------------------------------------------------------ bytes

    async def slice_path(self, client_id: str, enrol_key: str, digest: str) -> str:
        """Checks that the client may have these bytes. Raises UnknownBlob."""
        await self.known_member(client_id, enrol_key)
        check_digest(digest, f"client {client_id!r}")
        if not self.known_slices.owns(digest):
            raise UnknownBlob(f"client {client_id!r}: {digest[:12]} is not a slice of the current adapter; poll again")
        return digest

    async def begin_upload(self, client_id: str, enrol_key: str, reference: BlobReference) -> int:
        """How much of an upload is durable. Raises UnknownTask without a task, WrongSize unless it fits the rank."""
        await self.known_member(client_id, enrol_key)
        check_digest(reference.digest, f"client {client_id!r}")
        opened = self.engine.state.open
        assignment = opened.assignment_of(client_id) if opened and opened.kind is Kind.TRAIN else None
        if assignment is None:
            raise UnknownTask(f"client {client_id!r} has no training task now, so there is nothing to upload")
        if assignment.update is not None and assignment.update.digest == reference.digest:
            return reference.size_bytes  # accepted before; the submission will say so
        expected = self.known_manifest.layout(assignment.rank).size_bytes
        if reference.size_bytes != expected:
            raise WrongSize(
                f"client {client_id!r}: an update of {reference.size_bytes} bytes was announced, but rank "
                f"{assignment.rank} in {self.known_manifest.adapter.wire_dtype} is exactly {expected}"
            )
        return await asyncio.to_thread(self.uploads.begin, client_id, reference.digest, reference.size_bytes)

    async def receive(
        self, client_id: str, enrol_key: str, digest: str, offset: int, chunks: AsyncIterator[bytes]
    ) -> int:
        """Takes a stream of chunks from an offset; what is durable at its end."""
        await self.known_member(client_id, enrol_key)
        upload: Upload = await asyncio.to_thread(self.uploads.open, client_id, digest)
        try:
            while True:
                async with asyncio.timeout(_CHUNK_WAIT_SECONDS):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return await asyncio.to_thread(upload.finish)
                await asyncio.to_thread(upload.append, offset, chunk)
                offset += len(chunk)
                self.counters.bytes_received += len(chunk)
                self.engine.hear(client_id)  # a long upload is a sign of life
        finally:
            await asyncio.to_thread(upload.close)

    async def committed_bytes(self, client_id: str, enrol_key: str, digest: str) -> int:
        """How much of an upload is durable."""
        await self.known_member(client_id, enrol_key)
        return await asyncio.to_thread(self.uploads.committed_bytes, client_id, digest)

    # ------------------------------------------------------------ submissions

    async def submit_update(self, request: SubmitUpdate, enrol_key: str) -> Outcome:
        """Validates, makes durable, records, and only then answers. Bad bytes are forgotten and change nothing."""
        client_id, update = request.client_id, request.update
        await self.known_member(client_id, enrol_key)
        _check_numbers(client_id, update.num_examples, update.metrics, update.training_seconds)
        opened = self.engine.state.open
        assignment = _takeable(opened, self.engine.state.phase, client_id)
        if opened is None or assignment is None or opened.number != request.number or opened.kind is not Kind.TRAIN:
            return (await self.engine.submit(request)).outcome
        path = await asyncio.to_thread(self.uploads.completed_path, client_id, update.digest)
        layout = self.known_manifest.layout(assignment.rank)
        try:
            await asyncio.to_thread(check_file, path, layout, f"client {client_id!r}, round {request.number}")
        except InvalidRequest:
            await asyncio.to_thread(self.uploads.discard, client_id, update.digest)
            raise
        request = replace(request, update=replace(update, size_bytes=layout.size_bytes))
        self._in_flight.add(update.digest)
        try:
            await asyncio.to_thread(self.uploads.commit, client_id, update.digest)
            outcome = (await self.engine.submit(request)).outcome
        finally:
            self._in_flight.discard(update.digest)
        if outcome is Outcome.ACCEPTED:
            log.info("update accepted", client=client_id, round=request.number, digest=update.digest[:12])
            await asyncio.to_thread(self.uploads.discard, client_id, update.digest)
        return outcome

    async def submit_evaluation(self, request: SubmitEvaluation, enrol_key: str) -> Outcome:
        """Records an evaluation."""
        await self.known_member(request.client_id, enrol_key)
        _check_numbers(request.client_id, request.evaluation.num_examples, request.evaluation.metrics)
        return (await self.engine.submit(request)).outcome

    # ------------------------------------------------------------ observers

    def explanation(self) -> str:
        """Why nothing happens, in one sentence."""
        return explain(self.engine.state, self.engine.now)

    def forecast(self) -> CollapseForecast:
        """What a rank-agnostic average would do to these clients."""
        state = self.engine.state
        clients = [c for c in state.clients.values() if c.membership in (Membership.ACTIVE, Membership.LOST)]
        rounds = self.config.rounds
        cohort = max(rounds.min_clients, part_of(rounds.fraction, len(clients)))
        return forecast_collapse([(c.rank, c.profile.num_examples) for c in clients], cohort)

    async def published_slice(self, rank: int) -> tuple[BlobReference, int]:
        """The newest adapter cut to a rank (0: the global one), and its rank. Raises NothingPublished, WrongRank."""
        manifest, state = self.known_manifest, self.engine.state
        if state.round == 0:
            raise NothingPublished("round 1 is not finished, so there is no trained adapter yet")
        rank = rank or manifest.adapter.global_rank
        return await self.known_slices.slice_of(state.adapter_digest, rank), rank

    # ------------------------------------------------------------ inside

    async def _found_if_new(self, spec: AdapterSpec, base_model_digest: str, whose: str) -> None:
        async with self._founding:
            if self.manifest is None:
                check_base_model(self.config.model.base_model_digest, base_model_digest, whose)
                await self._found(spec, base_model_digest)

    async def _found(self, spec: AdapterSpec, base_model_digest: str) -> None:
        manifest = Manifest.of(self.config, spec, base_model_digest)
        request = await asyncio.to_thread(found, manifest, self.blobs)
        transition = await self.engine.submit(request)
        # The journal's, not ours: a caller that hung up after its own was recorded may have come before.
        path = await asyncio.to_thread(self.blobs.verify, transition.state.manifest_digest)
        self._adopt(Manifest.from_content(path.read_bytes()))
        log.info("federation founded", manifest=self.known_manifest.digest[:12], modules=len(spec.modules))

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._slices = Slices(self.blobs, manifest)

    async def _claim(self, opened: OpenRound, assignment: Assignment) -> Task | None:
        manifest = self.known_manifest
        reference = await self.known_slices.slice_of(self.engine.state.adapter_digest, assignment.rank)
        transition = await self.engine.submit(
            Claim(assignment.client_id, opened.number, opened.attempt, reference.digest)
        )
        now_open = transition.state.open
        if transition.outcome is not Outcome.ACCEPTED or now_open is None:
            return None
        leased = now_open.assignment_of(assignment.client_id)
        self.counters.progress[assignment.client_id] = Progress("fetching")
        return Task(
            kind=opened.kind,
            number=opened.number,
            attempt=opened.attempt,
            lease_token=leased.lease_token if leased else 0,
            rank=assignment.rank,
            scaling=manifest.scaling(assignment.rank),
            slice=reference,
            plan=manifest.plan(opened.number, assignment.client_id),
            deadline_seconds=max(0.0, now_open.deadline_at - self.engine.now),
        )

    def _carry_out(self, command: Command) -> None:
        self._commands.create_task(self._aggregate(command))

    async def _aggregate(self, command: Aggregate) -> None:
        self._merging += 1
        try:
            digest = await self._publish(command)
        finally:
            self._merging -= 1
        await self._sweep()
        if self._on_published is not None and digest:
            manifest = self.known_manifest
            try:
                adapter = await asyncio.to_thread(read_global_adapter, self.blobs, manifest, digest)
                await asyncio.to_thread(self._on_published, PublishedAdapter(adapter, manifest, command.number))
            except OSError as error:  # what is published stays published
                log.error("export failed", round=command.number, error=str(error))

    async def _publish(self, command: Aggregate) -> str:
        """Merges and publishes: the adapter's digest, or nothing if the round was aborted, by us or meanwhile."""
        manifest, state = self.known_manifest, self.engine.state
        ranks = {c.rank for c in state.clients.values() if c.membership is not Membership.EVICTED}
        levels = tuple(sorted(ranks | set(manifest.ranks.levels)))
        try:
            merged = await asyncio.to_thread(merge, command, manifest, levels, self.blobs, self._pool)
        except (RafloraError, OSError, MemoryError, BrokenExecutor) as error:
            log.error("aggregation failed", round=command.number, error=str(error))
            opened = self.engine.state.open
            if opened is not None and (opened.number, opened.attempt) == (command.number, command.attempt):
                await self.engine.submit(AbortRound(command.number, f"the aggregation failed: {error}"))
            return ""
        publish = Publish(command.number, command.attempt, merged.adapter_digest, merged.to_json())
        transition = await self.engine.submit(publish)
        return merged.adapter_digest if transition.outcome is Outcome.ACCEPTED else ""

    async def _sweep(self) -> None:
        """Deletes what nothing refers to."""
        if self._slices is not None:
            await self._slices.settle()  # a slice that is being written has no name yet that could be kept
        if self._merging:
            return  # likewise what a merge has written; it sweeps when it is done
        # From here on nothing waits, so that no submission can come in between.
        state, keep = self.engine.state, set(self._in_flight)
        keep |= {state.manifest_digest, state.adapter_digest}
        keep |= {r.adapter_digest for r in state.history[-self.config.store.keep_rounds :]}
        if state.open is not None:
            keep |= {a.update.digest for a in state.open.updates if a.update is not None}
            keep |= {a.slice_digest for a in state.open.assignments}
        if self._slices is not None:
            self._slices.keep_only(state.adapter_digest)
            keep |= self._slices.digests()
        for digest in self.blobs.digests() - keep:
            self.blobs.delete(digest)


def _takeable(opened: OpenRound | None, phase: Phase, client_id: str) -> Assignment | None:
    """The client's part of the open round if it can still be worked on."""
    if opened is None or phase is Phase.AGGREGATING:
        return None
    assignment = opened.assignment_of(client_id)
    return None if assignment is None or assignment.is_done or assignment.is_failed else assignment


def _check_numbers(client_id: str, num_examples: int, metrics: Mapping[str, float], seconds: float = 0.0) -> None:
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise InvalidRequest(f"client {client_id!r}: num_examples {num_examples}; 1 to {MAX_EXAMPLES} are accepted")
    if len(metrics) > MAX_METRICS or any(len(name) > 100 for name in metrics):
        raise InvalidRequest(f"client {client_id!r}: {len(metrics)} metrics; at most {MAX_METRICS} short names")
    bad = [name for name, value in [*metrics.items(), ("training_seconds", seconds)] if not math.isfinite(value)]
    if bad:
        raise InvalidRequest(f"client {client_id!r}: {bad[0]} is not finite")
