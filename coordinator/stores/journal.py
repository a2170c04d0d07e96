"""The journal: every event of a federation in order, durable before anybody is answered.

Append-only. The sequence is a compare-and-set: two coordinators that write to one journal find each other out
at the first entry. Nothing here knows what an event means.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import sqlalchemy as sql
import structlog
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common.errors import ConfigError, CorruptStore, JournalConflict, TooBusy, Unavailable
from common.failpoints import reach
from common.transfer import named_failures, sync_folder
from coordinator.stores.database import (
    ENTRIES,
    SNAPSHOTS,
    check_health,
    checkpoint,
    named,
    open_engine,
    prepare_schema,
    prepared,
    public_name,
)
from coordinator.stores.entry import Entry, digest_of_text, first_link, link_of
from coordinator.stores.head import Head, HeadFile

__all__ = ["Entry", "Journal", "MemoryJournal", "SqlJournal", "public_name"]

log = structlog.get_logger()
WAIT_SECONDS = 10.0  # for the connection, or for a foreign process that holds the database
CHECKPOINT_EVERY = 200  # commits; bounds SQLite's write-ahead log as long as no reader holds on to it
PAGE_ENTRIES = 1_000  # read at a time: bounds memory, and no reader holds the connection for long


class Journal(Protocol):
    """An append-only list of entries per federation. Safe to call from several threads."""

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        """All or none of the entries, durable when it returns.

        Raises JournalConflict if the first is not the very next one, TooBusy if the disk is full, StorageFailed
        if it is broken; Unavailable if nothing could be tried.
        """

    def read(self, federation: str, after: int = 0) -> Iterator[Entry]:
        """The entries behind a sequence number, in order.

        Raises CorruptStore, naming the sequence, at a gap or an entry that is not what was written.
        """

    def save_snapshot(self, federation: str, sequence: int, body: str) -> None:
        """Keeps the state after an entry, so that a restart needs only what follows; the newest one stays."""

    def latest_snapshot(self, federation: str) -> tuple[int, str] | None:
        """The sequence and body of the newest snapshot. Raises CorruptStore if it is not what was written."""

    def close(self) -> None:
        """Ends the use; a second call does nothing."""


class MemoryJournal:
    """A journal for simulations and tests: the same promises, as long as the process lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, list[Entry]] = {}
        self._snapshots: dict[str, tuple[int, str]] = {}

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        """See Journal."""
        with self._lock:
            stored = self._entries.setdefault(federation, [])
            _check_continues(federation, len(stored), entries)
            stored.extend(entries)

    def read(self, federation: str, after: int = 0) -> Iterator[Entry]:
        """See Journal."""
        with self._lock:
            entries = self._entries.get(federation, [])[after:]
        yield from entries

    def save_snapshot(self, federation: str, sequence: int, body: str) -> None:
        """See Journal."""
        with self._lock:
            if sequence >= self._snapshots.get(federation, (0, ""))[0]:
                self._snapshots[federation] = (sequence, body)

    def latest_snapshot(self, federation: str) -> tuple[int, str] | None:
        """See Journal."""
        with self._lock:
            return self._snapshots.get(federation)

    def close(self) -> None:
        """See Journal."""


class SqlJournal:
    """A journal in a database: `sqlite:///FOLDER/journal.db`, or PostgreSQL by its URL.

    Beside an SQLite file lies a head per federation, which a lost end of the journal is found by.
    Raises ConfigError for a URL that cannot be used, CorruptStore for a database that is damaged.
    """

    def __init__(self, url: str) -> None:
        self._address = prepared(url)
        self._is_file = self._address.get_backend_name() == "sqlite"
        self._engine = open_engine(self._address, WAIT_SECONDS)
        self._appending = threading.Lock()  # a commit and its head belong together
        self._commits = 0  # by this process
        try:
            with self._transaction() as connection:
                check_health(connection, self._address)
                prepare_schema(connection, self._address)
                reach("schema.committing")
            reach("schema.committed")
        except OperationalError as error:
            self.close()
            raise ConfigError(f"journal {self._address.database}: cannot be opened: {error.orig}") from None
        except BaseException:
            self.close()
            raise
        if self._is_file:
            sync_folder(Path(str(self._address.database)).parent)

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        """See Journal."""
        if not entries:
            return
        if not self._appending.acquire(timeout=WAIT_SECONDS):
            raise Unavailable(f"journal: another thread has been writing for {WAIT_SECONDS:g} s")
        try:
            last = self._append(federation, entries)
            if self._is_file:
                # Room for it was made before; where overwriting needs room too, the next append makes up for it.
                with suppress(TooBusy):
                    self._head_of(federation).advance(last)
            self._note_commit()
        except IntegrityError as error:
            # Only a database with several writers gets here: both saw the same last entry.
            raise JournalConflict(
                f"journal of {federation}: entry {entries[0].sequence} is already there: {error.orig}"
            ) from None
        finally:
            self._appending.release()

    def read(self, federation: str, after: int = 0) -> Iterator[Entry]:
        """See Journal."""
        # Read first: what is appended meanwhile can only make the journal longer than this.
        head = self._head_of(federation).read() if self._is_file else None
        link = self._link_at(federation, after)
        self._check_head(federation, Head(after, link), head)
        while page := self._page(federation, after):
            for row in page:
                entry = Entry(row.sequence, row.at, row.kind, row.body)
                if entry.sequence != after + 1:
                    raise CorruptStore(
                        f"journal of {federation}: entry {after + 1} is missing, {entry.sequence} follows"
                    )
                if row.checksum != _link(link, entry):
                    raise CorruptStore(
                        f"journal of {federation}: entry {entry.sequence} is not what was written after entry {after} "
                        "(checksum)"
                    )
                after, link = entry.sequence, row.checksum
                self._check_head(federation, Head(after, link), head)
                yield entry
        if head is not None and after < head.sequence:
            raise CorruptStore(
                f"journal of {federation}: it ends at entry {after}, but entry {head.sequence} was recorded and "
                f"answered: {head.sequence - after} entries were lost from {self._address.database}. Restore a backup "
                f"(raflora restore), or remove {self._head_file(federation)} to go on without them"
            )

    def save_snapshot(self, federation: str, sequence: int, body: str) -> None:
        """See Journal."""
        of_federation = SNAPSHOTS.c.federation == federation
        with self._transaction() as connection:
            newest = connection.execute(sql.select(SNAPSHOTS.c.sequence).where(of_federation)).scalar() or 0
            if sequence < newest:
                return
            connection.execute(sql.delete(SNAPSHOTS).where(of_federation))
            row = {"federation": federation, "sequence": sequence, "body": body}
            connection.execute(sql.insert(SNAPSHOTS), row | {"checksum": digest_of_text(f"{sequence}|{body}")})
            with named_failures(Path(self._address.database or "journal")):
                reach("snapshot.committing")
        reach("snapshot.committed")
        self._note_commit()

    def latest_snapshot(self, federation: str) -> tuple[int, str] | None:
        """See Journal."""
        with self._transaction() as connection:
            query = sql.select(SNAPSHOTS).where(SNAPSHOTS.c.federation == federation)
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.checksum != digest_of_text(f"{row.sequence}|{row.body}"):
            raise CorruptStore(f"journal of {federation}: snapshot {row.sequence} is not what was written (checksum)")
        return row.sequence, row.body

    def close(self) -> None:
        """See Journal."""
        self._engine.dispose()

    def _append(self, federation: str, entries: Sequence[Entry]) -> Head:
        newest = (
            sql.select(ENTRIES.c.sequence, ENTRIES.c.checksum)
            .where(ENTRIES.c.federation == federation)
            .order_by(ENTRIES.c.sequence.desc())
            .limit(1)
        )
        with self._transaction() as connection:
            row = connection.execute(newest).one_or_none()
            head = Head(0, first_link(federation)) if row is None else Head(row.sequence, row.checksum)
            if self._is_file:
                self._head_of(federation).prepare(head)
            _check_continues(federation, head.sequence, entries)
            rows = []
            for entry in entries:
                head = Head(entry.sequence, link_of(head.checksum, entry))
                columns = {"at": entry.at, "kind": entry.kind, "body": entry.body, "checksum": head.checksum}
                rows.append({"federation": federation, "sequence": entry.sequence, **columns})
            connection.execute(sql.insert(ENTRIES), rows)
            with named_failures(Path(self._address.database or "journal")):
                reach("journal.committing")
        reach("journal.committed")
        return head

    def _note_commit(self) -> None:
        """Empties the log now and then. Raises StorageFailed, although the commit stands: the next one might not."""
        # The first commit does it too: processes that never live long must not make the log ever longer.
        is_due, self._commits = self._commits % CHECKPOINT_EVERY == 0, self._commits + 1
        if not (is_due and self._is_file):
            return
        database = Path(str(self._address.database))
        try:
            with named_failures(database):
                reach("journal.checkpointing")
            if not checkpoint(self._engine, self._address, WAIT_SECONDS):
                log.info("a reader keeps the journal's log from being emptied", journal=str(database))
        except (TooBusy, Unavailable, PoolTimeout) as error:  # must not look as if the commit had been refused
            log.warning("the journal's log could not be emptied; it is tried again later", why=str(error))
            return
        reach("journal.checkpointed")

    def _check_head(self, federation: str, found: Head, head: Head | None) -> None:
        if head is not None and head.sequence == found.sequence and head.checksum != found.checksum:
            raise CorruptStore(
                f"journal of {federation}: entry {found.sequence} is not the one that was recorded and answered, says "
                f"{self._head_file(federation)}; does {self._address.database} belong to another state folder?"
            )

    def _link_at(self, federation: str, sequence: int) -> str:
        """What the entry behind this one is bound to."""
        if sequence == 0:
            return first_link(federation)
        query = sql.select(ENTRIES.c.checksum).where(ENTRIES.c.federation == federation, ENTRIES.c.sequence == sequence)
        with self._transaction() as connection:
            found = connection.execute(query).scalar()
        if found is None:
            raise CorruptStore(f"journal of {federation}: entry {sequence} is missing")
        return str(found)

    def _head_of(self, federation: str) -> HeadFile:
        return HeadFile(self._head_file(federation))

    def _head_file(self, federation: str) -> Path:
        return head_file(Path(str(self._address.database)), federation)

    def _page(self, federation: str, after: int) -> Sequence[sql.Row[Any]]:
        query = (
            sql.select(ENTRIES)
            .where(ENTRIES.c.federation == federation, ENTRIES.c.sequence > after)
            .order_by(ENTRIES.c.sequence)
            .limit(PAGE_ENTRIES)
        )
        with self._transaction() as connection:
            return connection.execute(query).all()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        # The pool holds one connection: it is the lock between threads, with a bounded wait.
        try:
            with self._engine.begin() as connection:
                yield connection
        except PoolTimeout:
            raise Unavailable(f"journal: its connection was in use for {WAIT_SECONDS:g} s") from None
        except OperationalError as error:
            raise named(error, self._address, WAIT_SECONDS) from error
        except DatabaseError as error:
            # SQLite reports SQLITE_CORRUPT and SQLITE_NOTADB as exactly this class, the rest as subclasses.
            if type(error) is DatabaseError:
                raise CorruptStore(
                    f"journal {self._address.database}: {error.orig}; restore it from a backup"
                ) from None
            raise


def head_file(database: Path, federation: str) -> Path:
    """Where the head of a federation lies, beside its database."""
    return database.with_name(f"{database.name}-head-{quote(federation, safe='')}")


def _check_continues(federation: str, last: int, entries: Sequence[Entry]) -> None:
    for expected, entry in enumerate(entries, start=last + 1):
        if entry.sequence != expected:
            raise JournalConflict(f"journal of {federation}: entry {entry.sequence} cannot follow entry {expected - 1}")


def _link(before: str, entry: Entry) -> str:
    try:
        return link_of(before, entry)
    except (TypeError, ValueError):
        return ""  # a damaged row may hold anything in any column
