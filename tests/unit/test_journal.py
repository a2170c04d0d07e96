"""The journal keeps what it acknowledged, in order, and notices a second writer and every change from outside."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from common.errors import ConfigError, CorruptStore, JournalConflict, RafloraError, StorageFailed, TooBusy, Unavailable
from coordinator.stores import journal as journal_module
from coordinator.stores.journal import PAGE_ENTRIES, Entry, Journal, MemoryJournal, SqlJournal, public_name


def entry(sequence: int, body: str = "{}") -> Entry:
    return Entry(sequence, at=sequence / 10, kind="ClientJoined", body=body)


def entries(first: int, last: int) -> list[Entry]:
    return [entry(sequence) for sequence in range(first, last + 1)]


class JournalPromises:
    """What every journal promises; each kind runs the same stories."""

    @pytest.fixture
    def journal(self) -> Journal | Iterator[Journal]:
        raise NotImplementedError

    def test_entries_come_back_in_order_and_unchanged(self, journal: Journal) -> None:
        written = [Entry(1, 0.1 + 0.2, "Opened", '{"name":"Zoë | 数"}'), Entry(2, 1e-300, "Closed", "{}")]
        journal.append("digits", written)
        assert list(journal.read("digits")) == written

    def test_a_reader_may_start_in_the_middle(self, journal: Journal) -> None:
        journal.append("digits", entries(1, 5))
        assert [found.sequence for found in journal.read("digits", after=3)] == [4, 5]
        assert list(journal.read("digits", after=5)) == []

    def test_an_empty_journal_is_an_empty_list(self, journal: Journal) -> None:
        journal.append("digits", [])
        assert list(journal.read("digits")) == []
        assert journal.latest_snapshot("digits") is None

    @pytest.mark.parametrize("sequence", [1, 2, 4])
    def test_only_the_very_next_entry_can_be_appended(self, journal: Journal, sequence: int) -> None:
        journal.append("digits", entries(1, 2))
        with pytest.raises(JournalConflict, match=f"digits: entry {sequence} "):
            journal.append("digits", [entry(sequence, body='"other"')])
        assert list(journal.read("digits")) == entries(1, 2)

    def test_all_entries_are_appended_or_none(self, journal: Journal) -> None:
        with pytest.raises(JournalConflict):
            journal.append("digits", [entry(1), entry(2), entry(2)])
        assert list(journal.read("digits")) == []

    def test_federations_do_not_see_each_other(self, journal: Journal) -> None:
        journal.append("digits", entries(1, 2))
        journal.append("letters", [entry(1, body='"letters"')])
        journal.save_snapshot("letters", 1, "{}")
        assert list(journal.read("digits")) == entries(1, 2)
        assert journal.latest_snapshot("digits") is None

    def test_a_journal_longer_than_a_page_is_read_to_its_end(self, journal: Journal) -> None:
        journal.append("digits", entries(1, 2 * PAGE_ENTRIES + 1))
        assert list(journal.read("digits")) == entries(1, 2 * PAGE_ENTRIES + 1)

    def test_a_reader_that_stops_half_way_keeps_nobody_from_writing(self, journal: Journal) -> None:
        journal.append("digits", entries(1, 3))
        reader = journal.read("digits")
        assert next(reader) == entry(1)
        journal.append("digits", [entry(4)])
        assert next(reader) == entry(2)

    def test_the_newest_snapshot_stays(self, journal: Journal) -> None:
        journal.append("digits", entries(1, 9))
        journal.save_snapshot("digits", 3, '"three"')
        journal.save_snapshot("digits", 9, '"nine"')
        journal.save_snapshot("digits", 5, '"late"')
        assert journal.latest_snapshot("digits") == (9, '"nine"')

    def test_of_many_threads_that_want_the_same_sequence_one_gets_it(self, journal: Journal) -> None:
        def try_to_append(thread: int) -> bool:
            try:
                journal.append("digits", [entry(1, body=str(thread))])
            except JournalConflict:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(try_to_append, range(8)))
        assert won.count(True) == 1
        assert [found.body for found in journal.read("digits")] == [str(won.index(True))]

    def test_closing_twice_is_closing(self, journal: Journal) -> None:
        journal.close()
        journal.close()


class TestMemoryJournal(JournalPromises):
    @pytest.fixture
    def journal(self) -> Journal:
        return MemoryJournal()


class TestSqlJournal(JournalPromises):
    @pytest.fixture
    def journal(self, tmp_path: Path) -> Iterator[Journal]:
        journal = SqlJournal(url(tmp_path))
        yield journal
        journal.close()


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/journal.db"


def tamper(folder: Path, statement: str) -> None:
    database = sqlite3.connect(folder / "journal.db", isolation_level=None)
    database.execute(statement)
    database.close()


def write_and_close(folder: Path, last: int) -> None:
    journal = SqlJournal(url(folder))
    journal.append("digits", entries(1, last))
    journal.save_snapshot("digits", last, '{"round": 1}')
    journal.close()


def test_a_restart_finds_entries_and_snapshot(tmp_path: Path) -> None:
    write_and_close(tmp_path / "new" / "folder", 3)
    journal = SqlJournal(url(tmp_path / "new" / "folder"))
    assert list(journal.read("digits")) == entries(1, 3)
    assert journal.latest_snapshot("digits") == (3, '{"round": 1}')
    journal.close()


def test_a_second_coordinator_on_the_same_database_is_found_out_at_its_first_entry(tmp_path: Path) -> None:
    first, second = SqlJournal(url(tmp_path)), SqlJournal(url(tmp_path))
    first.append("digits", entries(1, 2))
    second.append("digits", [entry(3)])
    with pytest.raises(JournalConflict):
        first.append("digits", [entry(3, body='"mine"')])
    first.close()
    second.close()


_APPEND_FOR_EVER = """
import sys
from coordinator.stores.journal import Entry, SqlJournal

journal, sequence = SqlJournal(sys.argv[1]), int(sys.argv[2])
while True:
    sequence += 1
    journal.append("digits", [Entry(sequence, sequence / 10, "ClientJoined", "{}")])
    print(sequence, flush=True)
"""


def test_every_acknowledged_entry_survives_kill_9(tmp_path: Path) -> None:
    acknowledged = 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _APPEND_FOR_EVER, url(tmp_path), str(acknowledged)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with writer:
            assert writer.stdout is not None
            for _ in range(20):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        assert writer.returncode == -signal.SIGKILL
        journal = SqlJournal(url(tmp_path))
        found = list(journal.read("digits"))
        journal.close()
        # The last one may be durable without its answer having been heard.
        assert found in (entries(1, acknowledged), entries(1, acknowledged + 1))
        acknowledged = len(found)


@pytest.mark.parametrize(
    "column", ["at = at + 1", "kind = 'ClientLeft'", "body = '{ }'", "checksum = 'none'"], ids=str.split
)
def test_a_changed_entry_is_named_and_never_handed_out(tmp_path: Path, column: str) -> None:
    write_and_close(tmp_path, 3)
    tamper(tmp_path, f"UPDATE journal SET {column} WHERE sequence = 2")  # noqa: S608
    journal = SqlJournal(url(tmp_path))
    reader = journal.read("digits")
    assert next(reader) == entry(1)
    with pytest.raises(CorruptStore, match="digits: entry 2 is not what was written"):
        next(reader)
    journal.close()


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    write_and_close(tmp_path, 3)
    tamper(tmp_path, "DELETE FROM journal WHERE sequence = 2")
    journal = SqlJournal(url(tmp_path))
    with pytest.raises(CorruptStore, match="entry 2 is missing, 3 follows"):
        list(journal.read("digits"))
    journal.close()


def test_a_changed_snapshot_is_named(tmp_path: Path) -> None:
    write_and_close(tmp_path, 3)
    tamper(tmp_path, "UPDATE snapshot SET body = '{}'")
    journal = SqlJournal(url(tmp_path))
    with pytest.raises(CorruptStore, match="snapshot 3 is not what was written"):
        journal.latest_snapshot("digits")
    journal.close()


def test_a_damaged_database_is_refused_at_start(tmp_path: Path) -> None:
    write_and_close(tmp_path, 2_000)
    database = tmp_path / "journal.db"
    with database.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(CorruptStore, match=r"restore it from a backup|malformed"):
        SqlJournal(url(tmp_path))


def test_a_file_that_is_no_database_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"my holiday pictures " * 500)
    with pytest.raises(CorruptStore, match="not a database"):
        SqlJournal(url(tmp_path))


def test_a_journal_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    write_and_close(tmp_path, 1)
    tamper(tmp_path, "UPDATE raflora_schema SET version = 99")
    with pytest.raises(ConfigError, match="schema 99, but this raflora reads 2"):
        SqlJournal(url(tmp_path))


@pytest.mark.parametrize(
    ("bad_url", "message"),
    [
        ("sqlite://", "names no file"),
        ("journal.db", "not a database URL"),
        ("nosuchdatabase://host/name", "nosuchdatabase"),
        ("sqlite:////dev/null/journal.db", "cannot be made"),
        ("sqlite:////dev", "cannot be opened"),
    ],
)
def test_an_unusable_url_is_a_config_error(bad_url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SqlJournal(bad_url)


def test_a_password_is_not_repeated_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        SqlJournal("postgresql+nosuchdriver://raflora:secret@host/name")
    assert "secret" not in str(caught.value)


def test_a_database_that_somebody_else_locks_is_unavailable_and_usable_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WAIT_SECONDS", 0.05)
    journal = SqlJournal(url(tmp_path))
    foreigner = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    foreigner.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="another process has locked it"):
        journal.append("digits", [entry(1)])
    foreigner.execute("ROLLBACK")
    foreigner.close()
    journal.append("digits", [entry(1)])
    assert list(journal.read("digits")) == [entry(1)]
    journal.close()


def test_sqlite_is_set_to_survive_a_power_cut(tmp_path: Path) -> None:
    journal = SqlJournal(url(tmp_path))
    with journal._transaction() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size", "wal_autocheckpoint")
        }
    journal.close()
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "mmap_size": 0, "wal_autocheckpoint": 0}
    assert found == expected


def test_a_new_journal_has_a_durable_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    SqlJournal(url(tmp_path)).close()
    assert synced == [str(tmp_path)]


def test_the_journal_is_nobody_else_s_to_read(tmp_path: Path) -> None:
    journal = SqlJournal(url(tmp_path))
    journal.append("digits", [entry(1)])
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("journal.db*")}
    journal.close()
    assert "journal.db-wal" in modes
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (sqlite3.SQLITE_IOERR_FSYNC, StorageFailed),
        (sqlite3.SQLITE_IOERR_WRITE, StorageFailed),
        (sqlite3.SQLITE_FULL, TooBusy),
    ],
)
def test_a_disk_that_fails_under_the_journal_has_a_name(tmp_path: Path, code: int, error: type[RafloraError]) -> None:
    failure = sqlite3.OperationalError("disk")
    failure.sqlite_errorcode = code
    journal = SqlJournal(url(tmp_path))
    with pytest.raises(error), journal._transaction():
        raise OperationalError("COMMIT", {}, failure)
    journal.close()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("postgresql+psycopg://raflora:secret@db:5432/fl?password=secret", "postgresql://db:5432/fl"),
        ("sqlite:////var/lib/journal.db", "sqlite:////var/lib/journal.db"),
    ],
)
def test_the_name_of_a_database_holds_no_secret(address: str, name: str) -> None:
    assert public_name(address) == name
