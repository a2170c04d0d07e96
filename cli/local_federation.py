"""One federation on this machine from its first process to its last round, followed as any observer would.

What is known of it comes over gRPC from the coordinator; the children's logs are read only for its port and when
something fails.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from raflora.v1 import status_pb2, status_pb2_grpc

from cli.connection import Connection, reach
from cli.errors import Failed
from cli.export_origin import RECORD_FILE
from cli.local_processes import Child, Children, end, output_of, wait_for
from common.errors import Unavailable

LISTEN_SECONDS = 60.0  # for the coordinator to take calls
JOIN_SECONDS = 300.0  # from one worker that joins to the next: torch and the model, on a machine that is slow and busy
STILLNESS_SECONDS = 300.0  # without any change in a federation that has begun
GOODBYE_SECONDS = 60.0  # for workers that know that the federation is over
EXPORT_SECONDS = 60.0
_CALL_SECONDS = 30.0
_LOOK_SECONDS = 0.2  # between two looks at the status
_PAGE = 100

Status = status_pb2.FederationStatus


@dataclass(frozen=True)
class Files:
    """One federation's settings files, and the folder for its processes' logs: NAME.log for each."""

    folder: Path
    coordinator: Path  # its settings file
    workers: Mapping[str, Path]  # theirs, by name
    coordinator_overrides: tuple[str, ...] = ()  # KEY=VALUE, on top of its file


class Audience(Protocol):
    """Who is told while a federation runs."""

    def waiting(self, sentence: str) -> None:
        """What is waited for before the first round."""

    def joined(self, client: status_pb2.ClientSummary) -> None:
        """A worker is here."""

    def begins(self, status: Status) -> None:
        """All are here, the first round is open."""

    def failed(self, assignment: status_pb2.AssignmentStatus) -> None:
        """A worker could not do its task; it may be given it again."""

    def moves(self, status: Status) -> None:
        """The state again, several times a second."""

    def round_ended(self, summary: status_pb2.RoundSummary, status: Status) -> None:
        """A round is published and evaluated."""


@dataclass
class Story:
    """What happened in one federation."""

    method: str
    clients: list[status_pb2.ClientSummary] = field(default_factory=list)
    rounds: list[status_pb2.RoundSummary] = field(default_factory=list)
    forecast: status_pb2.CollapseForecast = field(default_factory=status_pb2.CollapseForecast)
    start_seconds: float = 0.0  # until all had joined: imports, mostly
    total_seconds: float = 0.0
    ending: Status = field(default_factory=Status)  # the last look at it


async def run_federation(
    method: str,
    files: Files,
    audience: Audience,
    *,
    export_to: Path | None = None,
    join_seconds: float = JOIN_SECONDS,
) -> Story:
    """One coordinator and its workers as processes, until the last round is evaluated and all of them are gone.

    With `export_to` the adapter is fetched into that folder with `raflora export`. Raises Failed if a process fails
    or nothing happens for too long.
    """
    started = time.monotonic()
    story = Story(method)
    async with Children() as children:
        audience.waiting("starting the coordinator")
        coordinator = await children.start(
            "the coordinator",
            *("coordinator", "--config", str(files.coordinator)),
            *(word for override in files.coordinator_overrides for word in ("--set", override)),
            log=files.folder / "coordinator.log",
        )
        address = await _address_of(coordinator)
        workers = [
            await children.start(
                f"worker {name}",
                *("worker", "--config", str(settings), "--set", f"coordinator.address={address}"),
                log=files.folder / f"{name}.log",
            )
            for name, settings in files.workers.items()
        ]
        scene = _Scene(address, children, len(workers), started, join_seconds)
        await _Follower(scene, story, audience).follow()
        if export_to is not None:
            await output_of(
                "raflora export",
                *("-m", "cli.main", "export", str(export_to), "--coordinator", address, *_over_our_own(export_to)),
                log=files.folder / "export.log",
                seconds=EXPORT_SECONDS,
            )
        await wait_for(workers, GOODBYE_SECONDS)
        await end([coordinator])
        story.total_seconds = time.monotonic() - started
    return story


def _over_our_own(folder: Path) -> tuple[str, ...]:
    """What lets `raflora export` write over an earlier export, and over nothing else."""
    return ("--overwrite",) if (folder / RECORD_FILE).is_file() else ()


async def _address_of(coordinator: Child) -> str:
    """Where it listens, from its log. Raises Failed if it ends or says nothing."""
    deadline = time.monotonic() + LISTEN_SECONDS
    while time.monotonic() < deadline:
        for line in coordinator.log.read_text(encoding="utf-8", errors="replace").splitlines():
            if '"event": "listening"' in line:
                return str(json.loads(line)["address"])
        if coordinator.has_ended:
            raise coordinator.failure(f"ended with exit code {coordinator.process.returncode} before it listened")
        await asyncio.sleep(_LOOK_SECONDS)
    raise coordinator.failure(f"did not listen within {LISTEN_SECONDS:g} s")


@dataclass(frozen=True)
class _Scene:
    """The processes of one federation."""

    address: str  # the coordinator's
    children: Children
    num_workers: int
    started: float  # by time.monotonic
    join_seconds: float  # without anybody who joins


class _Follower:
    """Asks the coordinator how things stand and tells the audience what is new."""

    def __init__(self, scene: _Scene, story: Story, audience: Audience) -> None:
        self._scene = scene
        self._story = story
        self._audience = audience
        self._changed_at = time.monotonic()
        self._standing: tuple[object, ...] = ()
        self._told_failures: set[tuple[object, ...]] = set()

    async def follow(self) -> None:
        """Until the federation is finished. Raises Failed."""
        connection = Connection(coordinator=self._scene.address, timeout_seconds=_CALL_SECONDS)
        try:
            async with reach(connection) as channel:
                stub = status_pb2_grpc.StatusServiceStub(channel)
                while True:
                    answer = await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=_CALL_SECONDS)
                    await self._tell(stub, answer.status)
                    if answer.status.phase == status_pb2.PHASE_FINISHED:
                        self._story.ending = answer.status
                        return
                    self._scene.children.check()
                    self._check_that_it_moves(answer.status)
                    await asyncio.sleep(_LOOK_SECONDS)
        except Unavailable:
            # Its own last words say more than a connection that is gone.
            await asyncio.sleep(_LOOK_SECONDS)
            self._scene.children.check()
            raise

    async def _tell(self, stub: "status_pb2_grpc.StatusServiceAsyncStub", status: Status) -> None:
        story = self._story
        if status.clients_known > len(story.clients):
            await self._tell_who_joined(stub)
        if not story.start_seconds:
            if not status.assignments and not status.HasField("last_round"):
                expected = self._scene.num_workers
                left = expected - len(story.clients)
                self._audience.waiting(f"{left} of {expected} workers are still loading torch and the model")
                return
            story.start_seconds = time.monotonic() - self._scene.started
            story.forecast = status.forecast
            self._audience.begins(status)
        await self._tell_of_rounds(stub, status)
        self._tell_of_failures(status)
        self._audience.moves(status)

    async def _tell_who_joined(self, stub: "status_pb2_grpc.StatusServiceAsyncStub") -> None:
        known = {client.client_id for client in self._story.clients}
        page = await stub.ListClients(status_pb2.ListClientsRequest(page_size=_PAGE), timeout=_CALL_SECONDS)
        for client in page.clients:
            if client.client_id not in known:
                self._story.clients.append(client)
                self._audience.joined(client)

    async def _tell_of_rounds(self, stub: "status_pb2_grpc.StatusServiceAsyncStub", status: Status) -> None:
        # The round that is being evaluated is published, but it has no accuracy yet.
        ended = status.last_round.round - (status.phase == status_pb2.PHASE_EVALUATING)
        told = self._story.rounds[-1].round if self._story.rounds else 0
        if ended <= told:
            return
        request = status_pb2.ListRoundsRequest(page_size=_PAGE, after_round=told)
        page = await stub.ListRounds(request, timeout=_CALL_SECONDS)
        for summary in page.rounds:
            if summary.round <= ended:
                self._story.rounds.append(summary)
                self._audience.round_ended(summary, status)

    def _tell_of_failures(self, status: Status) -> None:
        for assignment in status.assignments:
            failure = (status.round, status.phase, assignment.client_id, assignment.failures)
            if assignment.failures and failure not in self._told_failures:
                self._told_failures.add(failure)
                self._audience.failed(assignment)

    def _check_that_it_moves(self, status: Status) -> None:
        if status.paused:
            raise Failed(f"the federation paused itself: {status.explanation}")
        now = time.monotonic()
        standing = (status.clients_known, status.phase, status.round, _steps_done(status))
        if standing != self._standing:
            self._standing, self._changed_at = standing, now
        if self._story.start_seconds and now - self._changed_at > STILLNESS_SECONDS:
            raise Failed(f"nothing has happened for {STILLNESS_SECONDS:g} s: {status.explanation}")
        if not self._story.start_seconds and now - self._changed_at > self._scene.join_seconds:
            raise Failed(
                f"nobody has joined for {self._scene.join_seconds:g} s: {status.explanation}; the workers' logs say "
                "what they do; loading a model that must be fetched first takes longer: --join-seconds"
            )


def _steps_done(status: Status) -> tuple[tuple[int, int], ...]:
    return tuple((assignment.state, assignment.step) for assignment in status.assignments)
