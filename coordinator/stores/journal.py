"""The journal: every event of a federation in order, durable before anybody is answered.

Append-only. The sequence is a compare-and-set: two coordinators that write to one journal find each other out
at the first entry. Nothing here knows what an event means.
"""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from common.errors import ConfigError, CorruptStore, JournalConflict, RafloraError, StorageFailed, TooBusy, Unavailable
from common.transfer import sync_folder

SCHEMA_VERSION = 1
WAIT_SECONDS = 10.0  # for the connection, or for a foreign process that holds the database
PAGE_ENTRIES = 1_000  # read at a time: bounds memory, and no reader holds the connection for long


@dataclass(frozen=True)
class Entry:
    """One event, as it is stored."""

    sequence: int  # 1, 2, 3, ... without gaps
    at: float  # federation seconds
    kind: str
    body: str  # JSON


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

    Raises ConfigError for a URL that cannot be used, CorruptStore for a database that is damaged.
    """

    def __init__(self, url: str) -> None:
        address = _prepared(url)
        self._engine = _engine(address)
        try:
            with self._transaction() as connection:
                _check_health(connection, address)
                _prepare_schema(connection, address)
        except OperationalError as error:
            self.close()
            raise ConfigError(f"journal {address.database}: cannot be opened: {error.orig}") from None
        except BaseException:
            self.close()
            raise
        if address.get_backend_name() == "sqlite" and address.database:
            sync_folder(Path(address.database).parent)

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        """See Journal."""
        if not entries:
            return
        rows = [
            {
                "federation": federation,
                "sequence": entry.sequence,
                "at": entry.at,
                "kind": entry.kind,
                "body": entry.body,
                "checksum": _checksum(entry),
            }
            for entry in entries
        ]
        newest = sql.select(sql.func.max(_ENTRIES.c.sequence)).where(_ENTRIES.c.federation == federation)
        try:
            with self._transaction() as connection:
                last = connection.execute(newest).scalar() or 0
                _check_continues(federation, last, entries)
                connection.execute(sql.insert(_ENTRIES), rows)
        except IntegrityError as error:
            # Only a database with several writers gets here: both saw the same last entry.
            raise JournalConflict(
                f"journal of {federation}: entry {entries[0].sequence} is already there: {error.orig}"
            ) from None

    def read(self, federation: str, after: int = 0) -> Iterator[Entry]:
        """See Journal."""
        while page := self._page(federation, after):
            for row in page:
                entry = Entry(row.sequence, row.at, row.kind, row.body)
                if entry.sequence != after + 1:
                    raise CorruptStore(
                        f"journal of {federation}: entry {after + 1} is missing, {entry.sequence} follows"
                    )
                if row.checksum != _checksum(entry):
                    raise CorruptStore(
                        f"journal of {federation}: entry {entry.sequence} is not what was written (checksum)"
                    )
                after = entry.sequence
                yield entry

    def save_snapshot(self, federation: str, sequence: int, body: str) -> None:
        """See Journal."""
        of_federation = _SNAPSHOTS.c.federation == federation
        with self._transaction() as connection:
            newest = connection.execute(sql.select(_SNAPSHOTS.c.sequence).where(of_federation)).scalar() or 0
            if sequence < newest:
                return
            connection.execute(sql.delete(_SNAPSHOTS).where(of_federation))
            row = {"federation": federation, "sequence": sequence, "body": body}
            connection.execute(sql.insert(_SNAPSHOTS), row | {"checksum": _digest(f"{sequence}|{body}")})

    def latest_snapshot(self, federation: str) -> tuple[int, str] | None:
        """See Journal."""
        with self._transaction() as connection:
            query = sql.select(_SNAPSHOTS).where(_SNAPSHOTS.c.federation == federation)
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.checksum != _digest(f"{row.sequence}|{row.body}"):
            raise CorruptStore(f"journal of {federation}: snapshot {row.sequence} is not what was written (checksum)")
        return row.sequence, row.body

    def close(self) -> None:
        """See Journal."""
        self._engine.dispose()

    def _page(self, federation: str, after: int) -> Sequence[sql.Row[Any]]:
        query = (
            sql.select(_ENTRIES)
            .where(_ENTRIES.c.federation == federation, _ENTRIES.c.sequence > after)
            .order_by(_ENTRIES.c.sequence)
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
            raise _named(error, self._engine.url) from error
        except DatabaseError as error:
            # SQLite reports SQLITE_CORRUPT and SQLITE_NOTADB as exactly this class, the rest as subclasses.
            if type(error) is DatabaseError:
                raise CorruptStore(f"journal {self._engine.url.database}: {error.orig}") from None
            raise


def public_name(url: str) -> str:
    """Which database a URL names, without user, password and options; for people, and to tell databases apart."""
    address = _address_of(url)
    where = f"{address.host or ''}{f':{address.port}' if address.port else ''}"
    return f"{address.get_backend_name()}://{where}/{address.database or ''}"


def _named(error: OperationalError, address: URL) -> RafloraError | OperationalError:
    """What went wrong with SQLite, as a type; another database's error stays what it is."""
    # The low byte is the primary code, the rest says which of many input/output errors it was.
    match getattr(error.orig, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_BUSY:
            return Unavailable(f"journal {address.database}: another process has locked it for {WAIT_SECONDS:g} s")
        case sqlite3.SQLITE_FULL:
            return TooBusy(f"journal {address.database}: the disk is full; try again later")
        case sqlite3.SQLITE_IOERR:
            return StorageFailed(f"journal {address.database}: the disk did not keep what it was given: {error.orig}")
        case _:
            return error


_METADATA = sql.MetaData()
_SCHEMA = sql.Table("raflora_schema", _METADATA, sql.Column("version", sql.Integer, primary_key=True))
_ENTRIES = sql.Table(
    "journal",
    _METADATA,
    sql.Column("federation", sql.Text, primary_key=True),
    sql.Column("sequence", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("at", sql.Double, nullable=False),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("checksum", sql.Text, nullable=False),
)
_SNAPSHOTS = sql.Table(
    "snapshot",
    _METADATA,
    sql.Column("federation", sql.Text, primary_key=True),
    sql.Column("sequence", sql.BigInteger, nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("checksum", sql.Text, nullable=False),
)
_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",  # NORMAL may lose what was already answered
    "PRAGMA foreign_keys = ON",
    "PRAGMA mmap_size = 0",  # a stray write through a map would end up in the file
    "PRAGMA trusted_schema = OFF",
)


def _check_continues(federation: str, last: int, entries: Sequence[Entry]) -> None:
    for expected, entry in enumerate(entries, start=last + 1):
        if entry.sequence != expected:
            raise JournalConflict(f"journal of {federation}: entry {entry.sequence} cannot follow entry {expected - 1}")


def _checksum(entry: Entry) -> str:
    return _digest(f"{entry.sequence}|{float(entry.at).hex()}|{entry.kind}|{entry.body}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _address_of(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        # The text is not repeated: it may hold a password.
        raise ConfigError("journal: not a database URL, such as sqlite:///state/journal.db") from None


def _prepared(url: str) -> URL:
    """The address; for SQLite its file is there and nobody else's to read (the enrolment keys are inside)."""
    address = _address_of(url)
    if address.get_backend_name() == "sqlite":
        if address.database in {None, "", ":memory:"}:
            raise ConfigError(f"journal: {url!r} names no file, so nothing would survive a restart")
        file = Path(str(address.database))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"journal: {file.parent} cannot be made: {error.strerror}") from None
        try:
            # SQLite gives its -wal and -shm files the same mode.
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ConfigError(f"journal {file}: cannot be opened: {error.strerror}") from None
    return address


def _engine(address: URL) -> Engine:
    try:
        engine = sql.create_engine(
            address,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_timeout=WAIT_SECONDS,
            pool_pre_ping=True,
        )
    except (ImportError, ArgumentError) as error:
        raise ConfigError(f"journal: {address.drivername} cannot be used: {error}") from None
    if engine.dialect.name == "sqlite":
        sql.event.listen(engine, "connect", _configure_sqlite)
        sql.event.listen(engine, "begin", _begin_immediate)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Python's own transaction control begins too late: a SELECT before the INSERT would stand outside.
    connection.isolation_level = None
    for pragma in (f"PRAGMA busy_timeout = {round(WAIT_SECONDS * 1000)}", *_PRAGMAS):
        connection.execute(pragma).close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_health(connection: Connection, address: URL) -> None:
    if connection.dialect.name != "sqlite":
        return
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode != "wal":
        raise ConfigError(f"journal {address.database}: its file system allows no write-ahead log (mode {mode})")
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise CorruptStore(f"journal {address.database}: {found}; restore it from a backup")


def _prepare_schema(connection: Connection, address: URL) -> None:
    if not sql.inspect(connection).has_table(_SCHEMA.name):
        _METADATA.create_all(connection)
        connection.execute(sql.insert(_SCHEMA), {"version": SCHEMA_VERSION})
    version = connection.execute(sql.select(sql.func.max(_SCHEMA.c.version))).scalar()
    if version != SCHEMA_VERSION:
        raise ConfigError(f"journal {address.database}: has schema {version}, but this raflora reads {SCHEMA_VERSION}")
