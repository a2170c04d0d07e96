"""A simulated federation: the service's state machine, manifest, slices and aggregation, driven by one loop.

Requests, digests, wire rounding, seeds and cohorts are those of the service, so what is published is, byte for byte,
what a coordinator and its workers would publish. Time is simulated: it moves only where a deadline is waited for.
Nothing here reads a clock to decide anything, or touches a file.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from common.adapter import Adapter, Factors, effective, initial_adapter, slice_adapter
from common.codec import check_numbers, decode, digest_of, encode
from common.errors import NotFinite, OutOfBounds, RafloraError
from coordinator.aggregation.methods.hetlora import pruned_rank
from coordinator.aggregation.round import EffectiveUpdate, aggregate_adapters
from coordinator.federation.due import next_deadline
from coordinator.federation.events import Event
from coordinator.federation.requests import (
    AbortRound,
    Claim,
    Fail,
    Found,
    Join,
    Outcome,
    Pause,
    Publish,
    Request,
    Resume,
    SetRank,
    SubmitUpdate,
    Tick,
)
from coordinator.federation.state import Assignment, OpenRound, Phase, Profile, State, Update
from coordinator.federation.step import Aggregate, pending, step
from coordinator.manifest import Manifest
from simulation.base_change import accumulated, base_content, change_bytes, report_on_model
from simulation.local_work import BaseChange, LocalTask, LocalWork, Trained, WorkDiverged
from simulation.population import SimulatedClient
from simulation.seeds import seeded_generator
from simulation.traffic import BaseDownloads, traffic_bytes

MAX_WAITS = 3  # looks at one attempt: a deadline, its extension, the end; more would be a loop of ours
MAX_REASON_CHARS = 500  # of a failure, in the journal
DIVERGENCES = (WorkDiverged, NotFinite, OutOfBounds)  # training has driven numbers out of all bounds


@dataclass(frozen=True)
class Setup:
    """What a simulated federation consists of; never changes."""

    manifest: Manifest
    population: Sequence[SimulatedClient]
    work: LocalWork
    dropout: float = 0.0  # the chance that an invited client never answers


@dataclass(frozen=True)
class Standing:
    """Where a federation stands between two rounds: all that a resumption needs."""

    state: State
    now: float  # federation seconds
    adapter: Adapter  # the global one, effective
    base: BaseChange = field(default_factory=dict)  # accumulated over all rounds; empty for most methods
    downloads: BaseDownloads = field(default_factory=BaseDownloads)  # of what changed in the base

    @property
    def is_over(self) -> bool:
        """Whether no further round will be published: all are, or the federation paused itself."""
        return self.state.phase is Phase.FINISHED or self.state.is_paused


@dataclass(frozen=True)
class Advance:
    """What brought a federation from one standing to the next."""

    standing: Standing
    events: tuple[tuple[float, Event], ...]  # federation time, event


@dataclass(frozen=True)
class Candidate:
    """A merged round that is about to be published."""

    number: int
    adapter: Adapter
    base: BaseChange


@dataclass(frozen=True)
class Slice:
    """A global adapter as a client of one rank reads it from the file that a coordinator hands out."""

    adapter: Adapter
    digest: str  # of the file


@dataclass(frozen=True)
class Evaluations:
    """What was measured of a candidate, as plain JSON: it goes into the round's record."""

    accuracy: tuple[Mapping[str, Any], ...] = ()  # one an evaluation that came to finite numbers
    diverged_ranks: tuple[int, ...] = ()  # at which an evaluation did not


@dataclass(frozen=True)
class Watching:
    """Who looks on: neither changes what is published."""

    measure: Callable[[Candidate], Evaluations] = lambda _: Evaluations()
    trained: Callable[[OpenRound, int], None] = lambda *_: None  # the round, and how many of it are done


def found(setup: Setup) -> Advance:
    """Founds the federation and lets everybody join before the first round opens."""
    manifest = setup.manifest
    adapter = initial_adapter(manifest.spec, manifest.adapter.global_rank, manifest.rounds.seed)
    stretch = _Stretch(setup, Standing(State(), 0.0, adapter))
    stretch.ask(Found(manifest.rules, digest_of(manifest.content), digest_of(encode(adapter))))
    stretch.ask(Pause())  # or the first round would invite those who joined first
    for client in setup.population:
        profile = Profile(max_rank=client.rank, num_examples=client.num_examples)
        stretch.ask(Join(client.client_id, client.client_id, profile))
    stretch.ask(Resume())
    return stretch.advance()


def publish_next(setup: Setup, standing: Standing, watching: Watching = Watching()) -> Advance:
    """Goes on until one more round is published, or the federation pauses itself because it cannot."""
    stretch = _Stretch(setup, standing)
    while not stretch.standing.is_over and stretch.standing.state.round == standing.state.round:
        stretch.attempt(watching)
    return stretch.advance()


def slice_of(manifest: Manifest, adapter: Adapter, rank: int) -> Slice:
    """The slice of an effective global adapter. Raises NotFinite if the wire's dtype cannot hold it."""
    cut = slice_adapter(adapter, rank, scaling=manifest.scaling(rank))
    content = encode(cut, manifest.adapter.wire_dtype)
    return Slice(decode(content, manifest.layout(rank), f"the slice of rank {rank}"), digest_of(content))


def has_diverged(reason: str) -> bool:
    """Whether the reason for which a round was given up names numbers out of bounds, not only absent clients."""
    return any(f"{kind.reason}: " in reason for kind in DIVERGENCES)


class _Stretch:
    """One stretch of a federation's way: asks, and keeps what came of it."""

    def __init__(self, setup: Setup, standing: Standing) -> None:
        self.standing = standing
        self._setup = setup
        self._events: list[tuple[float, Event]] = []
        self._download_bytes = 0  # since the last published round
        self._upload_bytes = 0
        self._started = time.perf_counter()

    def advance(self) -> Advance:
        return Advance(self.standing, tuple(self._events))

    def ask(self, request: Request) -> Outcome:
        """One step. Raises the typed error of a refused request."""
        now = self.standing.now
        before = self.standing
        transition = step(before.state, request, now)
        downloads = before.downloads
        for event in transition.events:
            downloads = downloads.after(event, before.state.round)
        self.standing = replace(before, state=transition.state, downloads=downloads)
        self._events += [(now, event) for event in transition.events]
        return transition.outcome

    def attempt(self, watching: Watching) -> None:
        """One attempt of the open round, up to its publication or its end without one."""
        opened = self.standing.state.open
        assert opened is not None, "a federation that is not over has a round open"  # noqa: S101
        updates, shrunk = self._train(opened, watching)
        self._wait_for_the_end(opened)
        for command in pending(self.standing.state):
            self._carry_out(command, updates, shrunk, watching)

    # ------------------------------------------------------------ the clients' part

    def _train(self, opened: OpenRound, watching: Watching) -> tuple[dict[str, EffectiveUpdate], dict[str, int]]:
        """The round's updates by client, and the ranks that clients have pruned themselves to."""
        setup, standing = self._setup, self.standing
        clients = {client.client_id: client for client in setup.population}
        slices: dict[int, Slice] = {}
        updates: dict[str, EffectiveUpdate] = {}
        shrunk: dict[str, int] = {}
        setup.work.put_base(standing.base)
        # By rank, so that the model is re-ranked as seldom as possible; the order changes no bytes.
        for done, assignment in enumerate(sorted(opened.assignments, key=lambda a: (a.rank, a.client_id))):
            if done:
                watching.trained(opened, done)
            if not self._is_open(opened):
                break  # too many have failed: what the others would send is no longer wanted
            if _drops_out(setup, opened, assignment.client_id):
                continue
            if assignment.rank not in slices:
                slices[assignment.rank] = slice_of(setup.manifest, standing.adapter, assignment.rank)
            handed_out = slices[assignment.rank]
            token = self._claim(opened, assignment, handed_out.digest)
            task = LocalTask(
                client=clients[assignment.client_id],
                adapter=handed_out.adapter,
                scaling=setup.manifest.scaling(assignment.rank),
                plan=setup.manifest.plan(opened.number, assignment.client_id),
                method=setup.manifest.aggregation.options,
            )
            try:
                update, rank = self._work_on(task)
                updates[assignment.client_id] = self._submit(opened, task, update, (token, handed_out.digest))
            except DIVERGENCES as error:
                self.ask(Fail(assignment.client_id, token, _told(error)))
                continue
            self._upload_bytes += traffic_bytes(setup.manifest, rank)
            if rank < assignment.rank:
                shrunk[assignment.client_id] = rank
        watching.trained(opened, len(opened.assignments))
        return updates, shrunk

    def _claim(self, opened: OpenRound, assignment: Assignment, digest: str) -> int:
        client_id = assignment.client_id
        self._download_bytes += traffic_bytes(self._setup.manifest, assignment.rank)
        self._download_bytes += self.standing.downloads.missed_bytes(client_id, self.standing.base)
        self.ask(Claim(client_id, opened.kind, opened.number, opened.attempt, digest))
        return self.standing.state.last_lease_token

    def _work_on(self, task: LocalTask) -> tuple[Trained, int]:
        """What the client trained, and the rank at which it goes on."""
        trained, share = self._setup.work.train(task), task.method.prune_share
        if share == 0.0:
            return trained, trained.adapter.rank
        rank = pruned_rank(task.adapter, trained.adapter, share)
        return replace(trained, adapter=_cut(trained.adapter, rank)), rank

    def _submit(self, opened: OpenRound, task: LocalTask, trained: Trained, lease: tuple[int, str]) -> EffectiveUpdate:
        manifest, (token, slice_digest) = self._setup.manifest, lease
        layout, client_id = manifest.layout(trained.adapter.rank), task.client.client_id
        content = encode(trained.adapter, manifest.adapter.wire_dtype)
        check_numbers(content, layout, client_id)
        received = decode(content, layout, client_id)
        update = Update(
            digest=digest_of(content),
            size_bytes=len(content),
            num_examples=task.client.num_examples,
            metrics={**trained.metrics, "train_loss": trained.train_loss},
            training_seconds=trained.seconds,
        )
        self.ask(SubmitUpdate(client_id, token, opened.number, opened.attempt, slice_digest, update))
        return EffectiveUpdate(client_id, effective(received, scaling=task.scaling), task.client.num_examples)

    def _is_open(self, opened: OpenRound) -> bool:
        now_open = self.standing.state.open
        return now_open is not None and (now_open.number, now_open.attempt) == (opened.number, opened.attempt)

    def _wait_for_the_end(self, opened: OpenRound) -> None:
        """Lets time pass to the round's deadlines, until it is closed or given up."""
        for _ in range(MAX_WAITS):
            deadline = next_deadline(self.standing.state)
            if deadline is None or not self._is_open(opened):
                return
            self.standing = replace(self.standing, now=max(self.standing.now, deadline))
            self.ask(Tick())
        raise AssertionError(f"round {opened.number} is neither closed nor given up after {MAX_WAITS} deadlines")

    # ------------------------------------------------------------ the coordinator's part

    def _carry_out(
        self,
        command: Aggregate,
        updates: Mapping[str, EffectiveUpdate],
        shrunk: Mapping[str, int],
        watching: Watching,
    ) -> None:
        """Merges and publishes, or aborts the round with the reason."""
        setup, state = self._setup, self.standing.state
        started = time.perf_counter()
        inputs = [updates[contribution.client_id] for contribution in command.inputs]
        try:
            merged = aggregate_adapters(
                self.standing.adapter, inputs, setup.manifest.aggregation.options, state.rank_levels
            )
            digest = digest_of(encode(merged.adapter))
            base = accumulated(self.standing.base, merged.base_changes)
            report = report_on_model(base, merged.adapter, inputs, state.rank_levels) if base else merged.report
        except (RafloraError, np.linalg.LinAlgError) as error:
            self.ask(AbortRound(command.number, f"the aggregation failed: {_told(error)}"))
            return
        seconds = time.perf_counter() - started
        evaluations = watching.measure(Candidate(command.number, merged.adapter, base))
        record = {
            "report": report.to_json(),
            "aggregation_seconds": seconds,
            "simulation": asdict(self._measured(change_bytes(merged.base_changes), base)),
            **asdict(evaluations),
        }
        for client_id, rank in sorted(shrunk.items()):
            self.ask(SetRank(client_id, rank))
        self.standing = replace(self.standing, adapter=merged.adapter, base=base)
        self.ask(Publish(command.number, command.attempt, digest, json.dumps(record)))

    def _measured(self, newest_change_bytes: int, base: BaseChange) -> "Measured":
        return Measured(
            download_bytes=self._download_bytes,
            upload_bytes=self._upload_bytes,
            newest_change_bytes=newest_change_bytes,
            base_digest=digest_of(base_content(base)) if base else "",
            seconds=time.perf_counter() - self._started,
        )


@dataclass(frozen=True)
class Measured:
    """What a simulation writes into a round's record beside the report."""

    download_bytes: int  # all attempts of the round, to all who fetched their task
    upload_bytes: int
    newest_change_bytes: int  # of the change of the base that this round brought
    base_digest: str  # of the accumulated change of the base; empty if there is none
    seconds: float  # of this machine; for people


def _drops_out(setup: Setup, opened: OpenRound, client_id: str) -> bool:
    if setup.dropout == 0.0:
        return False
    name = f"dropout/{opened.number}/{opened.attempt}/{client_id}"
    return bool(seeded_generator(name, setup.manifest.rounds.seed).random() < setup.dropout)


def _cut(adapter: Adapter, rank: int) -> Adapter:
    """The adapter with nothing in the directions from `rank` on."""

    def cut(factors: Factors) -> Factors:
        lora_A, lora_B = factors.lora_A.copy(), factors.lora_B.copy()
        lora_A[rank:], lora_B[:, rank:] = 0.0, 0.0
        return Factors(lora_A, lora_B)

    return Adapter({name: cut(factors) for name, factors in adapter.modules.items()}, adapter.tensors)


def _told(error: Exception) -> str:
    """As `has_diverged` reads it."""
    reason = error.reason if isinstance(error, RafloraError) else type(error).__name__
    return f"{reason}: {error}"[:MAX_REASON_CHARS]
