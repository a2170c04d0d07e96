"""The database under a journal: its URL, its settings, its tables and their versions, its failures by name.

Nothing here decides which entry may follow which, and nothing here knows what an entry means.
"""

import os
import sqlite3
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.pool import QueuePool

from common.errors import ConfigError, CorruptStore, RafloraError, StorageFailed, TooBusy, Unavailable
from common.failpoints import reach
from coordinator.stores.entry import Entry, digest_of_text, first_link, link_of, text_of

SCHEMA_VERSION = 2  # 1: a checksum covers its own entry; 2: it covers all entries before too
_METADATA = sql.MetaData()
_SCHEMA = sql.Table("raflora_schema", _METADATA, sql.Column("version", sql.Integer, primary_key=True))
ENTRIES = sql.Table(
    "journal",
    _METADATA,
    sql.Column("federation", sql.Text, primary_key=True),
    sql.Column("sequence", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("at", sql.Double, nullable=False),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("checksum", sql.Text, nullable=False),
)
SNAPSHOTS = sql.Table(
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
    # By itself SQLite checkpoints inside a commit, and says nothing when that fails: `checkpoint` does.
    "PRAGMA wal_autocheckpoint = 0",
)
_Operational = TypeVar("_Operational", OperationalError, sqlite3.OperationalError)
_MIGRATED_AT_ONCE = 1_000  # rows; bounds the memory
# What keeps a database from being opened at all; every other failure of SQLite means that it is not what it was.
_CANNOT_OPEN = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


def public_name(url: str) -> str:
    """Which database a URL names, without user, password and options; for people, and to tell databases apart."""
    address = _address_of(url)
    where = f"{address.host or ''}{f':{address.port}' if address.port else ''}"
    return f"{address.get_backend_name()}://{where}/{address.database or ''}"


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL, None for any other database. Raises ConfigError for what is no URL."""
    address = _address_of(url)
    return Path(address.database) if address.get_backend_name() == "sqlite" and address.database else None


def prepared(url: str) -> URL:
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


def open_engine(address: URL, wait_seconds: float) -> Engine:
    """One connection, which is the lock between threads; every transaction takes the writer's place at its begin."""
    try:
        engine = sql.create_engine(
            address,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            pool_timeout=wait_seconds,
            pool_pre_ping=True,
        )
    except (ImportError, ArgumentError) as error:
        raise ConfigError(f"journal: {address.drivername} cannot be used: {error}") from None
    if engine.dialect.name == "sqlite":

        def configure(connection: sqlite3.Connection, _record: object) -> None:
            # Python's own transaction control begins too late: a SELECT before the INSERT would stand outside.
            connection.isolation_level = None
            for pragma in (f"PRAGMA busy_timeout = {round(wait_seconds * 1000)}", *_PRAGMAS):
                connection.execute(pragma).close()

        sql.event.listen(engine, "connect", configure)
        sql.event.listen(engine, "begin", _begin_immediate)
    return engine


def checkpoint(engine: Engine, address: URL, wait_seconds: float) -> bool:
    """Copies SQLite's write-ahead log into the database, durably, so that the log can begin anew.

    Says whether all of it was copied. Never waits for a reader: what one still needs stays in the log.
    Raises StorageFailed, CorruptStore, TooBusy, Unavailable.
    """
    connection = engine.raw_connection()  # the statement must stand outside of a transaction
    try:
        _, in_log, copied = connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.OperationalError as error:
        raise named(error, address, wait_seconds) from error
    finally:
        connection.close()
    return bool(in_log == copied)


def check_health(connection: Connection, address: URL) -> None:
    """Raises CorruptStore for a database that is damaged, ConfigError where it could not be kept safe."""
    if connection.dialect.name != "sqlite":
        return
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode != "wal":
        raise ConfigError(f"journal {address.database}: its file system allows no write-ahead log (mode {mode})")
    # Not quick_check: that leaves the indices out, and entries are found through one.
    found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":
        raise CorruptStore(f"journal {address.database}: {found}; restore it from a backup")


def prepare_schema(connection: Connection, address: URL) -> None:
    """Makes the tables, or brings older ones forward; in the caller's transaction, so whole or not at all."""
    if not sql.inspect(connection).has_table(_SCHEMA.name):
        _METADATA.create_all(connection)
        connection.execute(sql.insert(_SCHEMA), {"version": SCHEMA_VERSION})
    version = connection.execute(sql.select(sql.func.max(_SCHEMA.c.version))).scalar()
    if version == 1:
        _chain_entries(connection)
        connection.execute(sql.update(_SCHEMA).values(version=SCHEMA_VERSION))
        reach("schema.migrated")
    elif version != SCHEMA_VERSION:
        raise ConfigError(f"journal {address.database}: has schema {version}, but this raflora reads {SCHEMA_VERSION}")


def named(error: _Operational, address: URL, wait_seconds: float) -> RafloraError | _Operational:
    """What went wrong with SQLite, as a type; another database's error stays what it is."""
    if address.get_backend_name() != "sqlite":
        return error
    # The low byte is the primary code, the rest says which of many input/output errors it was.
    cause = error.orig if isinstance(error, OperationalError) else error
    code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    where = f"journal {address.database}"
    if code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return Unavailable(f"{where}: another process has locked it for {wait_seconds:g} s")
    if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:  # the log's index needs room too
        return TooBusy(f"{where}: the disk is full; try again later")
    if code & 0xFF == sqlite3.SQLITE_IOERR:
        return StorageFailed(f"{where}: the disk did not keep what it was given: {cause}")
    if code & 0xFF in _CANNOT_OPEN:
        return error
    return CorruptStore(f"{where}: {cause}; restore it from a backup")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _address_of(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        # The text is not repeated: it may hold a password.
        raise ConfigError("journal: not a database URL, such as sqlite:///state/journal.db") from None


def _chain_entries(connection: Connection) -> None:
    """From schema 1 to 2: checks every entry as version 1 did, then binds it to those before."""
    for federation in connection.execute(sql.select(ENTRIES.c.federation).distinct()).scalars().all():
        before, sequence = first_link(federation), 0
        while rows := connection.execute(
            sql.select(ENTRIES)
            .where(ENTRIES.c.federation == federation, ENTRIES.c.sequence > sequence)
            .order_by(ENTRIES.c.sequence)
            .limit(_MIGRATED_AT_ONCE)
        ).all():
            changes = []
            for row in rows:
                entry = Entry(row.sequence, row.at, row.kind, row.body)
                if entry.sequence != sequence + 1 or row.checksum != digest_of_text(text_of(entry)):
                    raise CorruptStore(
                        f"journal of {federation}: entry {sequence + 1} is missing or not what was written (checksum)"
                    )
                sequence, before = entry.sequence, link_of(before, entry)
                changes.append({"of": federation, "number": sequence, "checksum": before})
            connection.execute(
                sql.update(ENTRIES)
                .where(
                    ENTRIES.c.federation == sql.bindparam("of"),
                    ENTRIES.c.sequence == sql.bindparam("number"),
                )
                .values(checksum=sql.bindparam("checksum")),
                changes,
            )
            reach("schema.migrating")
