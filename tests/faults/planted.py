"""Bugs that the harness must find, planted in its processes by name; the product's own code never knows of them.

Each is a mistake that somebody could make in one evening, as small as it can be.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import common.transfer
import coordinator.engine
import coordinator.federation.step as steps
import coordinator.stores.blobs
import coordinator.stores.database
import coordinator.stores.uploads
import worker.assignment
import worker.run
from common.errors import TooBusy
from common.failpoints import reach
from common.transfer import sync
from coordinator.engine import Engine
from coordinator.federation.events import UpdateAccepted
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
    (BUGS.get(name) or UNSYNCED[name]).plant()


def _put(owner: Any, name: str, wrong: Any) -> Any:
    """Puts something wrong in place of the right, which is returned."""
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    return right


def _acknowledges_before_the_row() -> None:
    async def commit(self: Intake, request: SubmitUpdate) -> Outcome:
        await self._foundation.on_disk(self._uploads.commit, request.client_id, request.update.digest)
        self._unfinished.add(asyncio.create_task(_submit_soon(self._engine, request)))
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
            unchanged: OpenRound = right(self, assignment)
            return unchanged
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
        needed_by_right: set[str] = right(self)
        return needed_by_right - {c.update.digest for c in (opened.contributions if opened else ())}

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
            if not any(isinstance(event, UpdateAccepted) for event in events):
                raise
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
        self._unfinished.add(asyncio.create_task(_submit_soon(self._engine, request)))
        return Outcome.ACCEPTED

    _put(Intake, "submit_evaluation", submit)


async def _submit_soon(engine: Engine, request: Any) -> None:
    """As somebody would who gathers rows to save commits."""
    await asyncio.sleep(0.05)
    await engine.submit(request)


def _does_not_sync_files() -> None:
    _put(common.transfer, "sync", lambda *_: None)


def _does_not_sync_folders() -> None:
    for module in (common.transfer, coordinator.stores.blobs, coordinator.stores.uploads):
        _put(module, "sync_folder", lambda _: None)


def _lets_sqlite_not_sync() -> None:
    pragmas = coordinator.stores.database._PRAGMAS
    _put(coordinator.stores.database, "_PRAGMAS", tuple(p.replace("FULL", "OFF") for p in pragmas))


@dataclass(frozen=True)
class Bug:
    """One bug: how it is planted, where processes are killed to find it, and as what it is found."""

    plant: Callable[[], None]
    breach: str  # a regular expression
    steps: tuple[str, ...]  # one life after the other ends at the first, the second, ... of these, and again
    of: str = "coordinator"  # whose lives; "site-1": that worker's too, at the same steps
    refuses_commits: bool = False  # the coordinator's disk is full at some


BUGS: Mapping[str, Bug] = MappingProxyType(
    {
        "acknowledges before the row": Bug(
            _acknowledges_before_the_row,
            "acknowledged, but not in the journal|asked for again",
            ("journal.committing",),
        ),
        "acknowledges evaluations before the row": Bug(
            _acknowledges_evaluations_before_the_row,
            "acknowledged, but not in the journal: .* evaluate|asked for again: evaluate",
            ("journal.committing",),
        ),
        "acknowledges though the commit failed": Bug(
            _acknowledges_though_the_commit_failed,
            "acknowledged, but not in the journal|ended by itself",
            ("round.published", "update.answering"),
            refuses_commits=True,
        ),
        "commits in two transactions": Bug(
            _commits_in_two_transactions, "ends in the middle of a step", ("journal.committed",)
        ),
        "deletes the old adapter first": Bug(
            _deletes_the_old_adapter_first, "the journal needs blob", ("blob.unlinked",)
        ),
        "does not check the lease": Bug(
            _does_not_check_the_lease, "a lease that was lost was accepted", ("task.trained", "upload.sent"), "site-1"
        ),
        "does not know a resubmission": Bug(
            _does_not_know_a_resubmission, "2 times in the journal", ("update.answering",)
        ),
        "does not take up an aggregation again": Bug(
            _does_not_take_up_an_aggregation_again, "nothing happened for .* aggregating", ("round.merging",)
        ),
        "forgets uploads at a restart": Bug(
            _forgets_uploads_at_a_restart,
            "were durable, now|no upload with the digest",
            ("update.checked", "upload.answering"),
        ),
        "leaves half-written files": Bug(_leaves_half_written_files, "stray file state/blobs", ("file.written",)),
        "makes a new key at every start": Bug(
            _makes_a_new_key_at_every_start, "ended by itself .* another enrolment key", ("task.training",), "site-1"
        ),
        "merges in the order of arrival": Bug(
            _merges_in_the_order_of_arrival, "the same inputs in another order|another adapter", ("task.answering",)
        ),
        "records before the blob is there": Bug(
            _records_before_the_blob_is_there, "the journal needs blob", ("events.adopted",)
        ),
        "resumes uploads at their beginning": Bug(
            _resumes_uploads_at_their_beginning,
            "arrived damaged|given back: wrong_size",
            ("part.written", "bytes.synced"),
        ),
        "saves snapshots under a wrong sequence": Bug(
            _saves_snapshots_under_a_wrong_sequence,
            "the snapshot and what follows|ended by itself .*JournalConflict",
            ("snapshot.committed",),
        ),
        "sweeps what an open round needs": Bug(
            _sweeps_what_an_open_round_needs, "the journal needs blob|were durable, now 0", ("update.answering",)
        ),
        "tells nobody what leaves": Bug(
            _tells_nobody_what_leaves, "its egress report says nothing", ("round.merging",)
        ),
        "writes blobs in place": Bug(_writes_blobs_in_place, "has its name, but not its bytes", ("file.writing",)),
    }
)

# Only a power cut would show these; the order of the system calls does.
UNSYNCED: Mapping[str, Bug] = MappingProxyType(
    {
        "does not sync files": Bug(_does_not_sync_files, "before the file is synced", ()),
        "does not sync folders": Bug(_does_not_sync_folders, "before the folder is synced", ()),
        "lets SQLite not sync": Bug(_lets_sqlite_not_sync, "before the event is synced", ()),
    }
)
