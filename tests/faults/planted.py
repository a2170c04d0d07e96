"""Bugs that the harness must find, planted in its processes by name; the product's own code never knows of them.

Each is a mistake that somebody could make in one evening, as small as it can be. `BREACH` says as what it is found.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import common.transfer
import coordinator.engine
import coordinator.federation.step as steps
import coordinator.stores.blobs
import coordinator.stores.journal
import coordinator.stores.uploads
import worker.assignment
import worker.run
from common.errors import TooBusy
from common.failpoints import reach
from common.transfer import sync
from coordinator.engine import Engine
from coordinator.federation.requests import Outcome, SubmitUpdate
from coordinator.federation.state import Assignment, OpenRound, State
from coordinator.founding import Foundation
from coordinator.intake import Intake
from coordinator.publishing import Publisher
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import SqlJournal
from coordinator.stores.uploads import UploadSpool
from worker.client import CoordinatorClient
from worker.messages import Blob


def plant(name: str) -> None:
    """Puts one bug into this process."""
    _BUGS[name]()


def _put(owner: Any, name: str, wrong: Any) -> Any:
    """Puts something wrong in place of the right, which is returned."""
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    return right


def _acknowledges_before_the_row() -> None:
    async def commit(self: Intake, request: SubmitUpdate) -> Outcome:
        await self._foundation.on_disk(self._uploads.commit, request.client_id, request.update.digest)
        self._unfinished.add(asyncio.create_task(self._engine.submit(request)))
        return Outcome.ACCEPTED

    _put(Intake, "_commit", commit)


def _writes_blobs_in_place() -> None:
    def write(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            reach("file.writing")
            file.write(content[len(content) // 2 :])
            file.flush()
            sync(file.fileno(), path)

    _put(coordinator.stores.blobs, "write_durably", write)


def _commits_in_two_transactions() -> None:
    async def commit(self: Engine, events: list[Any], state: State, now: float) -> None:
        for event in events:
            await right(self, [event], state, now)

    right = _put(Engine, "_commit", commit)


def _does_not_know_a_resubmission() -> None:
    def decide(state: State, request: SubmitUpdate, now: float) -> Any:
        assignment = state.open.assignment_of(request.client_id) if state.open else None
        if state.open is not None and assignment is not None:
            state = replace(state, open=state.open.with_assignment(replace(assignment, update=None)))
        return right(state, request, now)

    right = steps._DECISIONS[SubmitUpdate]
    steps._DECISIONS = MappingProxyType({**steps._DECISIONS, SubmitUpdate: decide})


def _merges_in_the_order_of_arrival() -> None:
    def with_assignment(self: OpenRound, assignment: Assignment) -> OpenRound:
        if assignment.update is None:
            return right(self, assignment)
        others = tuple(a for a in self.assignments if a.client_id != assignment.client_id)
        return replace(self, assignments=(*others, assignment))

    right = _put(OpenRound, "with_assignment", with_assignment)


def _records_before_the_blob_is_there() -> None:
    async def commit(self: Intake, request: SubmitUpdate) -> Outcome:
        outcome = (await self._engine.submit(request)).outcome
        await self._foundation.on_disk(self._uploads.commit, request.client_id, request.update.digest)
        return outcome

    _put(Intake, "_commit", commit)


def _forgets_uploads_at_a_restart() -> None:
    def start(self: UploadSpool, root: Path, *args: Any, **kwargs: Any) -> None:
        for file in root.glob("*/*"):
            file.unlink()
        right(self, root, *args, **kwargs)

    right = _put(UploadSpool, "__init__", start)


def _does_not_check_the_lease() -> None:
    def decide(state: State, request: SubmitUpdate, now: float) -> Any:
        assignment = state.open.assignment_of(request.client_id) if state.open else None
        if assignment is not None:
            request = replace(request, lease_token=assignment.lease_token)
        return right(state, request, now)

    right = steps._DECISIONS[SubmitUpdate]
    steps._DECISIONS = MappingProxyType({**steps._DECISIONS, SubmitUpdate: decide})


def _sweeps_what_an_open_round_needs() -> None:
    def needed(self: Foundation) -> set[str]:
        opened = self.engine.state.open
        return right(self) - {c.update.digest for c in (opened.contributions if opened else ())}

    right = _put(Foundation, "_needed", needed)


def _saves_snapshots_under_a_wrong_sequence() -> None:
    def save(self: SqlJournal, federation: str, sequence: int, body: str) -> None:
        right(self, federation, sequence + 1, body)

    right = _put(SqlJournal, "save_snapshot", save)


def _acknowledges_though_the_commit_failed() -> None:
    async def commit(self: Engine, events: list[Any], state: State, now: float) -> None:
        try:
            await right(self, events, state, now)
        except TooBusy:
            self.state = state

    right = _put(Engine, "_commit", commit)


def _resumes_uploads_at_their_beginning() -> None:
    async def upload(self: CoordinatorClient, blob: Blob, offset: int, source: BinaryIO) -> int:
        source.seek(0)
        committed: int = await right(self, blob, offset, source)
        return committed

    right = _put(CoordinatorClient, "upload", upload)


def _tells_nobody_what_leaves() -> None:
    async def record(*_: Any) -> None:
        pass

    _put(worker.assignment, "record_departure", record)


def _makes_a_new_key_at_every_start() -> None:
    _put(worker.run, "enrol_key_of", lambda _: str(uuid.uuid4()))


def _deletes_the_old_adapter_first() -> None:
    async def publish(self: Publisher, command: Any, merged: Any) -> None:
        self._foundation.blobs.delete(command.previous_digest)
        await right(self, command, merged)

    right = _put(Publisher, "_publish", publish)


def _leaves_half_written_files() -> None:
    _put(FileBlobs, "sweep", lambda _: None)


def _does_not_take_up_an_aggregation_again() -> None:
    def pending(state: State) -> Any:
        seen.append(state)
        return () if len(seen) == 1 else right(state)

    seen: list[State] = []
    right = _put(coordinator.engine, "pending", pending)


def _acknowledges_evaluations_before_the_row() -> None:
    async def submit(self: Intake, request: Any, enrol_key: str) -> Outcome:
        await self._known_member(request.client_id, enrol_key)
        self._unfinished.add(asyncio.create_task(self._engine.submit(request)))
        return Outcome.ACCEPTED

    _put(Intake, "submit_evaluation", submit)


def _does_not_sync_files() -> None:
    _put(common.transfer, "sync", lambda *_: None)


def _does_not_sync_folders() -> None:
    for module in (common.transfer, coordinator.stores.blobs, coordinator.stores.uploads):
        _put(module, "sync_folder", lambda _: None)


def _lets_sqlite_not_sync() -> None:
    pragmas = coordinator.stores.journal._PRAGMAS
    _put(coordinator.stores.journal, "_PRAGMAS", tuple(p.replace("FULL", "OFF") for p in pragmas))


_BUGS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {
        function.__name__.strip("_"): function
        for function in (
            _acknowledges_before_the_row,
            _acknowledges_evaluations_before_the_row,
            _acknowledges_though_the_commit_failed,
            _commits_in_two_transactions,
            _deletes_the_old_adapter_first,
            _does_not_check_the_lease,
            _does_not_know_a_resubmission,
            _does_not_sync_files,
            _does_not_sync_folders,
            _does_not_take_up_an_aggregation_again,
            _forgets_uploads_at_a_restart,
            _leaves_half_written_files,
            _lets_sqlite_not_sync,
            _makes_a_new_key_at_every_start,
            _merges_in_the_order_of_arrival,
            _records_before_the_blob_is_there,
            _resumes_uploads_at_their_beginning,
            _saves_snapshots_under_a_wrong_sequence,
            _sweeps_what_an_open_round_needs,
            _tells_nobody_what_leaves,
            _writes_blobs_in_place,
        )
    }
)
# Only a power cut would show these; the order of the system calls does.
UNSYNCED = ("does_not_sync_files", "does_not_sync_folders", "lets_sqlite_not_sync")
BUGS = tuple(name for name in _BUGS if name not in UNSYNCED)
