"""What must be true after any kill, and at the end: read from the disk alone, compared with an undisturbed run.

Every check names what it found. The journal is read from a copy, so that looking changes nothing.
"""

import hashlib
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.notes import Note, read_notes

from common.errors import RafloraError
from coordinator.engine import Engine
from coordinator.federation.due import due
from coordinator.federation.events import (
    AdapterPublished,
    EvaluationAccepted,
    Event,
    RoundClosed,
    TaskFailed,
    UpdateAccepted,
    evolve,
)
from coordinator.federation.state import Contribution, RoundRecord, State
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal
from worker.egress import REPORT

FEDERATION = "kills"
KEEP_ROUNDS = 2


@dataclass(frozen=True)
class Round:
    """What a round took in and gave out; nothing in it may depend on what happened on the way."""

    number: int
    attempts: int
    inputs: tuple[tuple[str, int, str, int], ...]  # client, rank, digest, num_examples: in their order
    adapter_digest: str


@dataclass(frozen=True)
class History:
    """What a federation did."""

    manifest_digest: str
    rounds: tuple[Round, ...]

    @property
    def adapter_digest(self) -> str:
        """Of the newest adapter."""
        return self.rounds[-1].adapter_digest if self.rounds else ""


@dataclass(frozen=True)
class Journaled:
    """The journal as a restart would read it."""

    state: State
    events: tuple[Event, ...]
    breaches: tuple[str, ...]

    @property
    def history(self) -> History:
        """What it says."""
        rounds = map(_round, self.state.history, _frozen_inputs(self.events))
        return History(self.state.manifest_digest, tuple(rounds))


def breaches_of_the_dead(folder: Path, expected: History | None) -> list[str]:
    """What is wrong on the coordinator's disk just after its death, before anybody tidies up."""
    journaled = read_journal(folder / "state")
    return [
        *journaled.breaches,
        *_journal_breaches(journaled, notes_of(folder), expected),
        *_blob_breaches(folder / "state", _needed(journaled.state)),
        *_egress_breaches(folder),
    ]


def breaches_at_the_end(folder: Path, expected: History | None) -> list[str]:
    """The same after the federation is over and was started and ended once more, and that nothing lies about."""
    journaled, state_dir = read_journal(folder / "state"), folder / "state"
    found = [*breaches_of_the_dead(folder, expected)]
    if expected is not None and journaled.history.rounds != expected.rounds:
        found.append(f"{len(journaled.history.rounds)} rounds are finished, expected {len(expected.rounds)}")
    blobs = {path.name for path in (state_dir / "blobs").glob("??/*")}
    found += [f"blob {name[:20]} is needed by nobody" for name in sorted(blobs - _needed(journaled.state))]
    found += [f"stray file {path.relative_to(folder)}" for path in _strays(folder)]
    return found


def notes_of(folder: Path) -> list[Note]:
    """Of all workers."""
    return [note for file in sorted(folder.glob("*.notes")) for note in read_notes(file)]


def read_journal(state_dir: Path) -> Journaled:
    """Through the product's own code, snapshot and all, and event by event beside it."""
    with tempfile.TemporaryDirectory(prefix="raflora-kills-") as name:
        copy = Path(name)
        for file in state_dir.glob("journal.sqlite*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy / file.name)
        try:
            return _read(copy / "journal.sqlite")
        except (RafloraError, sqlite3.Error) as error:
            return Journaled(State(), (), (f"the journal cannot be read: {error}",))


def _read(file: Path) -> Journaled:
    journal = SqlJournal(f"sqlite:///{file}")
    try:
        entries = list(journal.read(FEDERATION))
        events = tuple(event_of(entry) for entry in entries)
        state = State()
        for event in events:
            state = evolve(state, event)
        resumed = Engine(FEDERATION, journal, lambda _: None).state
    finally:
        journal.close()
    breaches = [] if resumed == state else ["the snapshot and what follows it are not the journal's state"]
    waiting = due(state, entries[-1].at) if entries else None
    if waiting is not None:
        breaches.append(f"the journal ends in the middle of a step: {type(waiting).__name__} belongs to it")
    with sqlite3.connect(file) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    if found != "ok":
        breaches.append(f"integrity_check: {found}")
    return Journaled(state, events, tuple(breaches))


def _journal_breaches(journaled: Journaled, notes: list[Note], expected: History | None) -> Iterator[str]:
    yield from (f"{note.client}: {note.sentence}" for note in notes if note.kind == "breach")
    accepted = Counter(_acceptances(journaled.events))
    for receipt, count in Counter(_receipts(notes)).items():
        if accepted[receipt] == 0:
            yield f"acknowledged, but not in the journal: {_said(receipt)}"
        elif count > 1:
            yield f"acknowledged {count} times: {_said(receipt)}"
    yield from (f"{count} times in the journal: {_said(a)}" for a, count in accepted.items() if count > 1)
    yield from (f"{e.client_id} gave its task back: {e.failure}" for e in journaled.events if isinstance(e, TaskFailed))
    if expected is not None:
        yield from _history_breaches(journaled.history, expected)


def _history_breaches(found: History, expected: History) -> Iterator[str]:
    for ours, theirs in zip(found.rounds, expected.rounds, strict=False):
        if sorted(ours.inputs) != sorted(theirs.inputs):
            yield f"round {ours.number}: other inputs than undisturbed"
        elif ours.inputs != theirs.inputs:
            yield f"round {ours.number}: the same inputs in another order"
        elif ours.adapter_digest != theirs.adapter_digest:
            yield f"round {ours.number}: another adapter from the same inputs"
        if ours.attempts != 1:
            yield f"round {ours.number}: took {ours.attempts} attempts"


def _acceptances(events: Iterable[Event]) -> Iterator[tuple[str, str, int, str, int]]:
    """Client, task, round, digest, examples of every acceptance; the round is that of the state then."""
    state = State()
    for event in events:
        opened = state.open
        if isinstance(event, UpdateAccepted) and opened is not None:
            update = event.update
            yield event.client_id, "train", opened.number, update.digest, update.num_examples
        if isinstance(event, EvaluationAccepted) and opened is not None:
            assignment = opened.assignment_of(event.client_id)
            digest = assignment.slice_digest if assignment else ""
            yield event.client_id, "evaluate", opened.number, digest, event.evaluation.num_examples
        state = evolve(state, event)


def _receipts(notes: Iterable[Note]) -> Iterator[tuple[str, str, int, str, int]]:
    return ((n.client, n.task, n.round, n.digest, n.number) for n in notes if n.kind == "receipt")


def _said(what: tuple[str, str, int, str, int]) -> str:
    client, task, number, digest, examples = what
    return f"{client}, {task}, round {number}, {digest[:12]}, {examples} examples"


def _needed(state: State) -> set[str]:
    """The blobs that the journal refers to; slices can be made again."""
    needed = {state.manifest_digest, state.adapter_digest, *(r.adapter_digest for r in state.history[-KEEP_ROUNDS:])}
    if state.best is not None:
        needed.add(state.best.adapter_digest)
    if state.open is not None:
        needed |= {contribution.update.digest for contribution in state.open.contributions}
    return needed - {""}


def _blob_breaches(state_dir: Path, needed: set[str]) -> Iterator[str]:
    blobs = {path.name: path for path in (state_dir / "blobs").glob("??/*") if path.suffix != ".part"}
    yield from (f"the journal needs blob {name[:12]}, which is not here" for name in sorted(needed - blobs.keys()))
    complete = [path for path in (state_dir / "uploads").glob("*/*") if path.suffix != ".part"]
    for path in (*blobs.values(), *complete):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            yield f"{path.parent.parent.name} {path.name[:12]} has its name, but not its bytes"


def _egress_breaches(folder: Path) -> Iterator[str]:
    """What a site sent, but did not write down before."""
    for file in sorted(folder.glob("*.notes")):
        report = folder / file.stem / REPORT
        lines = report.read_text(encoding="utf-8") if report.exists() else ""
        for note in read_notes(file):
            if note.kind == "receipt" and note.digest not in lines:
                yield f"{note.client}: {note.task} of round {note.round} left the site, its egress report says nothing"


def _strays(folder: Path) -> list[Path]:
    uploads = [path for path in (folder / "state" / "uploads").rglob("*") if path.is_file()]
    return sorted({*uploads, *folder.rglob("*.part")})


def _frozen_inputs(events: Iterable[Event]) -> Iterator[tuple[Contribution, ...]]:
    """Of every published round, as the coordinator wrote them down and not as the journal's other entries add up."""
    inputs: tuple[Contribution, ...] = ()
    for event in events:
        if isinstance(event, RoundClosed):
            inputs = event.inputs
        if isinstance(event, AdapterPublished):
            yield inputs


def _round(record: RoundRecord, frozen: tuple[Contribution, ...]) -> Round:
    inputs = tuple((c.client_id, c.rank, c.update.digest, c.update.num_examples) for c in frozen)
    return Round(record.number, record.attempts, inputs, record.adapter_digest)
