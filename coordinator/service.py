"""What the coordinator does for its callers, in domain words; servicers translate, the engine decides."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

import structlog

from common.adapter import AdapterSpec
from common.errors import (
    CorruptStore,
    CorruptTransfer,
    IdentityConflict,
    InvalidRequest,
    NoBestAdapter,
    NothingPublished,
    RafloraError,
    UnknownBlob,
)
from common.plain import plain
from common.transfer import check_digest
from coordinator.aggregation.forecast import CollapseForecast, forecast_collapse
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.federation.explain import explain, explain_no_best
from coordinator.federation.members import enrolled, member
from coordinator.federation.requests import (
    ChangeRules,
    Claim,
    Fail,
    Join,
    Leave,
    NoteSilence,
    Outcome,
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
from coordinator.federation.step import Command
from coordinator.founding import Foundation, check_base_model, check_spec
from coordinator.identity.security import Security, security_of
from coordinator.intake import Intake
from coordinator.limits import check_founding_size
from coordinator.manifest import Manifest, RoundPlan
from coordinator.pace import Pace
from coordinator.publishing import PublishedAdapter, Publisher
from coordinator.revocation import Revocation
from coordinator.sessions import Sessions, conflict_of
from coordinator.slices import BlobReference
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import Journal

MAX_POLL_SECONDS = 45.0
MAX_FAILURE_CHARS = 500

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
class PublishedSlice:
    """A published adapter, cut to a rank."""

    reference: BlobReference
    rank: int
    round: int  # that published it


@dataclass(frozen=True)
class Progress:
    """What a worker last said of its task."""

    activity: str = ""
    step: int = 0
    total_steps: int = 0
    train_loss: float = 0.0


@dataclass
class Counters:
    """Volatile; since this process started."""

    bytes_sent: int = 0  # of adapters, on the wire: of byte planes what they take
    bytes_received: int = 0
    progress: dict[str, Progress] = field(default_factory=dict)
    refusals: deque[str] = field(default_factory=lambda: deque(maxlen=3))  # the newest workers that could not join


class CoordinatorService:
    """One federation, served. Everything slow runs in threads; nothing here blocks the event loop."""

    def __init__(
        self,
        config: CoordinatorConfig,
        journal: Journal,
        blobs: FileBlobs,
        on_published: Callable[[PublishedAdapter], None] | None = None,
        security: Security | None = None,
        *,
        on_best: Callable[[PublishedAdapter], None] | None = None,
    ) -> None:
        self.config = config
        self.security = security or security_of(config.server)
        self.blobs = blobs
        self.counters = Counters()
        self.sessions = Sessions()
        self.engine = Engine(config.name, journal, self._carry_out)
        self.foundation = Foundation(config, self.engine, blobs)
        self.intake = Intake(self.foundation, self.known_member, self.security.organisation_of)
        self._publisher = Publisher(self.foundation, on_published, on_best)
        self._revocation = Revocation(self.engine, self.security.gate)
        self._pace = Pace(config.limits.changes)
        self._commands = asyncio.TaskGroup()  # an error in one of them is fatal, as in the engine

    async def run(self) -> None:
        """The engine, and the founding if the spec is known from a file. Until cancelled; an error is fatal."""
        async with self._commands:
            self._commands.create_task(self.engine.run())
            self._commands.create_task(self._revocation.watch())
            self._commands.create_task(self._publisher.watch_best())
            await self.foundation.when_there_is_room("the federation is not started", self._start)

    def close(self) -> None:
        """Ends the helper processes."""
        self.intake.close()
        self._publisher.close()

    async def _start(self) -> None:
        await self.foundation.found_from_file()
        await self._apply_rules()
        await self._publisher.sweep()

    def _carry_out(self, command: Command) -> None:
        self._commands.create_task(self._merge(command))

    async def _merge(self, command: Command) -> None:
        # A site that was revoked before the round was closed is not merged, however fast the round was.
        what = f"round {command.number} is closed but not yet merged"
        await self.foundation.when_there_is_room(what, self._revocation.apply)
        await self._publisher.carry_out(command)

    # ------------------------------------------------------------ membership

    async def join(
        self, client_id: str, enrol_key: str, profile: Profile, spec: AdapterSpec, base_model_digest: str
    ) -> Client:
        """The client with its granted rank. The first one may found the federation."""
        try:
            return await self._admit(Join(client_id, enrol_key, profile), spec, base_model_digest)
        except RafloraError as error:
            self.counters.refusals.append(plain(str(error), MAX_FAILURE_CHARS))
            raise

    async def _admit(self, request: Join, spec: AdapterSpec, base_model_digest: str) -> Client:
        client_id, whose = request.client_id, f"client {request.client_id[:80]!r}"
        check_join(request)  # before it may found anything
        self.intake.ledger.check_examples(
            client_id, max(request.profile.num_examples, request.profile.num_eval_examples)
        )
        check_digest(base_model_digest, whose)
        if self.foundation.manifest is None:
            check_founding_size(self.config.limits, spec, self.config.adapter.global_rank, whose)
        await self.foundation.found_if_new(spec, base_model_digest, whose)
        check_base_model(self.foundation.known_manifest.base_model_digest, base_model_digest, whose)
        check_spec(self.foundation.known_manifest, spec, whose)
        known = self.engine.state.clients.get(client_id)
        if known is not None and enrolled(self.engine.state, request) != known:
            self._check_pace(client_id)
        transition = await self.engine.submit(request)
        if known is not None and transition.outcome is Outcome.ACCEPTED:
            self._spend(client_id)
        self.engine.hear(client_id)
        return transition.state.clients[client_id]

    async def make_way(self, client_id: str, enrol_key: str) -> None:
        """Frees a name from its earlier key, for a caller to whom the registry gave the name with this key."""
        known = self.engine.state.clients.get(client_id)
        if known is None or known.membership not in (Membership.ACTIVE, Membership.LOST):
            return
        try:
            member(self.engine.state, client_id, enrol_key)
        except IdentityConflict:
            log.info("client comes back with a new key", client=client_id)
            await self.engine.submit(Leave(client_id))

    async def leave(self, client_id: str, enrol_key: str) -> None:
        """The client says good-bye."""
        await self.known_member(client_id, enrol_key)
        self._check_pace(client_id)
        if (await self.engine.submit(Leave(client_id))).outcome is Outcome.ACCEPTED:
            self._spend(client_id)

    async def known_member(self, client_id: str, enrol_key: str) -> Client:
        """The client behind a call, noted as alive. Raises UnknownClient, Evicted or IdentityConflict."""
        client = member(self.engine.state, client_id, enrol_key)
        self.engine.hear(client_id)
        if client.membership is Membership.LOST:
            await self.engine.submit(NoteSilence(client_id, is_lost=False))
        return client

    # ------------------------------------------------------------ tasks

    async def next_task(self, client_id: str, enrol_key: str, wait_seconds: float, session: str = "") -> Task | None:
        """The client's task, leased to it, as soon as there is one; None after the wait or at the end.

        Raises IdentityConflict if a newer session speaks for the client, or begins to.
        """
        await self.known_member(client_id, enrol_key)
        self.sessions.hear(client_id, session, self.engine.now)
        if not isfinite(wait_seconds):  # a timer that is due at NaN would never let the others come in order
            raise InvalidRequest(f"client {client_id!r}: wait_seconds {wait_seconds}; a finite number is expected")
        deadline = self.engine.now + min(max(wait_seconds, 0.0), MAX_POLL_SECONDS)
        while True:
            version = self.engine.version
            await self.known_member(client_id, enrol_key)
            if not self.sessions.is_newest(client_id, session):
                raise conflict_of(client_id)  # or a caller that has died would take the task from its successor
            opened = self.engine.state.open
            assignment = self.engine.state.takeable_by(client_id)
            if opened is not None and assignment is not None:
                task = await self._claim(opened, assignment, session)
                if task is not None:
                    return task
            left = deadline - self.engine.now
            if left <= 0 or self.engine.state.phase is Phase.FINISHED or self.engine.is_stopping:
                return None
            # Who waits here is alive: it must be heard more often than its lease is long.
            longest = self.config.rounds.lease_ttl_seconds / 3
            await self.engine.wait_for_news(client_id, version, min(left, longest))

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
        """Takes a task back; True if the client may be given it again.

        If its slice kept arriving damaged, what is on the disk is looked at and mended before the answer.
        """
        await self.known_member(client_id, enrol_key)
        failure = plain(failure, MAX_FAILURE_CHARS)
        self._check_pace(client_id)
        transition = await self.engine.submit(Fail(client_id, lease_token, failure))
        if transition.outcome is Outcome.ACCEPTED:
            self._spend(client_id)
            log.warning("task failed", client=client_id, failure=failure)
        opened = transition.state.open
        assignment = opened.assignment_of(client_id) if opened else None
        if transition.outcome is Outcome.ACCEPTED and assignment and _is_of_damaged_bytes(failure):
            await self._mend_slice(assignment)
        return assignment is not None and not assignment.is_failed

    # ------------------------------------------------------------ bytes

    async def slice_path(self, client_id: str, enrol_key: str, digest: str) -> str:
        """Checks that the client may have these bytes. Raises UnknownBlob."""
        await self.known_member(client_id, enrol_key)
        check_digest(digest, f"client {client_id!r}")
        opened = self.engine.state.open
        assignment = opened.assignment_of(client_id) if opened else None
        # What was handed out stays good over a restart, when no slice has been made yet.
        was_handed_out = assignment is not None and assignment.slice_digest == digest
        if not was_handed_out and not self.foundation.slices.owns(digest):
            raise UnknownBlob(f"client {client_id!r}: {digest[:12]} is not a slice of the current adapter; poll again")
        return digest

    # ------------------------------------------------------------ observers

    def explanation(self) -> str:
        """Why nothing happens, in one sentence."""
        if self.foundation.is_founding:
            return "being founded on adapter.spec"
        return explain(self.engine.state, self.engine.now)

    def forecast(self) -> CollapseForecast:
        """What a rank-agnostic average would do to these clients."""
        clients, rounds = self.engine.state.enrolled_to_train, self.config.rounds
        cohort = max(rounds.min_clients, part_of(rounds.fraction, len(clients)))
        return forecast_collapse([(c.rank, c.profile.num_examples) for c in clients], cohort)

    async def published_slice(self, rank: int, *, best: bool = False) -> PublishedSlice:
        """The newest adapter, or the best one, cut to a rank (0: the global one).

        Raises NothingPublished, NoBestAdapter or WrongRank.
        """
        manifest, state = self.foundation.known_manifest, self.engine.state
        if state.round == 0:
            raise NothingPublished("round 1 is not finished, so there is no trained adapter yet")
        if best and state.best is None:
            raise NoBestAdapter(explain_no_best(state))
        digest, number = state.adapter_digest, state.round
        if best and state.best is not None:
            digest, number = state.best.adapter_digest, state.best.round
        rank = rank or manifest.adapter.global_rank
        return PublishedSlice(await self.foundation.slices.slice_of(digest, rank), rank, number)

    # ------------------------------------------------------------ inside

    def _check_pace(self, client_id: str) -> None:
        self._pace.check(client_id, self.engine.now, self.engine.state.round)

    def _spend(self, client_id: str) -> None:
        self._pace.spend(client_id, self.engine.now, self.engine.state.round)

    async def _apply_rules(self) -> None:
        """What the operator may change with a restart: when rounds open and close."""
        manifest = self.foundation.manifest
        if manifest is not None:
            wanted = Manifest.of(self.config, manifest.spec, manifest.base_model_digest).rules
            if (await self.engine.submit(ChangeRules(wanted))).outcome is Outcome.ACCEPTED:
                log.info("rules changed", why=self.explanation())

    async def _mend_slice(self, assignment: Assignment) -> None:
        """So that neither the next try nor anybody else of this rank gets damaged bytes."""
        try:
            await self.foundation.slices.mend(
                self.engine.state.adapter_digest, assignment.rank, assignment.slice_digest
            )
        except CorruptStore as error:  # whoever asks for a task is told so from now on
            log.error("the global adapter is damaged, so no slice can be made of it", why=str(error))

    async def _claim(self, opened: OpenRound, assignment: Assignment, session: str) -> Task | None:
        manifest, client_id = self.foundation.known_manifest, assignment.client_id
        held_token = self.sessions.lease_of(client_id, session)
        is_first = not assignment.lease_token and not assignment.failures
        if not is_first and assignment.lease_token != held_token:
            self._check_pace(client_id)
        reference = await self.foundation.slices.slice_of(self.engine.state.adapter_digest, assignment.rank)
        transition = await self.engine.submit(
            Claim(client_id, opened.kind, opened.number, opened.attempt, reference.digest, held_token)
        )
        now_open = transition.state.open
        if transition.outcome not in (Outcome.ACCEPTED, Outcome.DUPLICATE) or now_open is None:
            return None
        leased = now_open.assignment_of(client_id)
        lease_token = leased.lease_token if leased else 0
        if transition.outcome is Outcome.ACCEPTED:
            self._spend(client_id)
            self.sessions.note_lease(client_id, session, lease_token)
        self.counters.progress[client_id] = Progress("fetching")
        return Task(
            kind=opened.kind,
            number=opened.number,
            attempt=opened.attempt,
            lease_token=lease_token,
            rank=assignment.rank,
            scaling=manifest.scaling(assignment.rank),
            slice=reference,
            plan=manifest.plan(opened.number, client_id),
            deadline_seconds=max(0.0, now_open.deadline_at - self.engine.now),
        )


def _is_of_damaged_bytes(failure: str) -> bool:
    """Whether a task failed because bytes kept arriving that are not those of their digest."""
    return failure.partition(":")[0] == CorruptTransfer.reason
