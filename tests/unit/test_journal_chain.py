"""Entries are bound to those before them, and a lost end is noticed: the chain, the head, and journals of version 1."""

import hashlib
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common import failpoints
from common.errors import CorruptStore
from coordinator.stores.entry import Entry
from coordinator.stores.head import Head, HeadFile
from coordinator.stores.journal import SqlJournal, head_file


def entries(first: int, last: int) -> list[Entry]:
    return [Entry(n, n / 10, "ClientJoined", f'"{n}"') for n in range(first, last + 1)]


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/journal.db"


def written(folder: Path, last: int = 5) -> Path:
    journal = SqlJournal(url(folder))
    for entry in entries(1, last):
        journal.append("digits", [entry])
    journal.close()
    return folder / "journal.db"


def tamper(database: Path, *statements: str) -> None:
    connection = sqlite3.connect(database, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def read(folder: Path, after: int = 0) -> list[Entry]:
    journal = SqlJournal(url(folder))
    try:
        return list(journal.read("digits", after))
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("statements", "sentence"),
    [
        (["DELETE FROM journal WHERE sequence = 5"], "it ends at entry 4, but entry 5 was recorded and answered"),
        (["DELETE FROM journal"], "it ends at entry 0, but entry 5 .* 5 entries were lost"),
        (
            ["DELETE FROM journal WHERE sequence = 3", "UPDATE journal SET sequence = sequence - 1 WHERE sequence > 3"],
            "entry 3 is not what was written after entry 2",
        ),
        (
            [
                "UPDATE journal SET sequence = 99 WHERE sequence = 2",
                "UPDATE journal SET sequence = 2 WHERE sequence = 3",
                "UPDATE journal SET sequence = 3 WHERE sequence = 99",
            ],
            "entry 2 is not what was written",
        ),
        (["UPDATE journal SET checksum = 'x' WHERE sequence = 5"], "entry 5 is not what was written"),
    ],
    ids=["end", "everything", "middle", "order", "checksum"],
)
def test_what_was_removed_moved_or_replaced_is_found_by_name(
    tmp_path: Path, statements: list[str], sentence: str
) -> None:
    tamper(written(tmp_path), *statements)
    with pytest.raises(CorruptStore, match=sentence):
        read(tmp_path)


def test_an_entry_of_another_journal_does_not_fit_in(tmp_path: Path) -> None:
    """Every entry is whole by itself, and still it is not the one that was written here."""
    database = written(tmp_path / "here")
    other = SqlJournal(url(tmp_path / "other"))
    other.append("digits", [Entry(1, 0.0, "PauseSet", "{}"), *entries(2, 5)])
    other.close()
    tamper(
        database,
        f"ATTACH '{tmp_path / 'other' / 'journal.db'}' AS other",
        "DELETE FROM journal WHERE sequence = 5",
        "INSERT INTO journal SELECT * FROM other.journal WHERE sequence = 5",
    )
    with pytest.raises(CorruptStore, match="entry 5 is not what was written after entry 4"):
        read(tmp_path / "here")


def test_a_reader_in_the_middle_checks_what_it_goes_on_from(tmp_path: Path) -> None:
    database = written(tmp_path)
    assert read(tmp_path, after=3) == entries(4, 5)
    tamper(database, "UPDATE journal SET checksum = 'x' WHERE sequence = 3")
    with pytest.raises(CorruptStore, match="entry 4 is not what was written after entry 3"):
        read(tmp_path, after=3)
    tamper(database, "DELETE FROM journal WHERE sequence = 3")
    with pytest.raises(CorruptStore, match="entry 3 is missing"):
        read(tmp_path, after=3)


def test_an_older_journal_put_in_place_of_the_newest_is_found(tmp_path: Path) -> None:
    older = tmp_path / "older.db"
    shutil.copy(written(tmp_path, 3), older)
    journal = SqlJournal(url(tmp_path))
    journal.append("digits", entries(4, 6))
    journal.close()
    shutil.copy(older, tmp_path / "journal.db")
    with pytest.raises(CorruptStore, match="it ends at entry 3, but entry 6 was recorded and answered"):
        read(tmp_path)
    head_file(tmp_path / "journal.db", "digits").unlink()  # what the sentence offers
    assert read(tmp_path) == entries(1, 3)


# ---------------------------------------------------------------- the head


def test_the_head_is_the_newest_slot_that_is_whole(tmp_path: Path) -> None:
    file = HeadFile(tmp_path / "head")
    assert file.read() is None
    file.prepare(Head(3, "c"))
    file.prepare(Head(9, "never"))  # it is there
    for sequence in (4, 5, 6):
        file.advance(Head(sequence, f"link-{sequence}"))
        assert file.read() == Head(sequence, f"link-{sequence}")
    content = bytearray((tmp_path / "head").read_bytes())
    slots = {bytes(slot.split()[0]): i for i, slot in enumerate((content[:512], content[512:]))}
    content[slots[b"6"] * 512 + 3] ^= 1
    (tmp_path / "head").write_bytes(content)
    with capture_logs() as said:
        assert file.read() == Head(5, "link-5")
    assert [line["log_level"] for line in said] == ["warning"]
    content[slots[b"5"] * 512] ^= 1
    (tmp_path / "head").write_bytes(content)
    with pytest.raises(CorruptStore, match=r"neither slot is what was written; .* remove this file"):
        file.read()


def test_a_crash_between_a_commit_and_its_head_loses_nothing(tmp_path: Path) -> None:
    written(tmp_path, 2)

    def fail(step: str) -> None:
        if step == "head.writing":
            raise KeyboardInterrupt

    journal = SqlJournal(url(tmp_path))
    failpoints.arm(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            journal.append("digits", entries(3, 3))
    finally:
        failpoints.arm(None)
        journal.close()
    assert read(tmp_path) == entries(1, 3)


def test_the_first_head_is_durable_before_anything_is_recorded_and_nobody_else_s_to_read(tmp_path: Path) -> None:
    journal, seen = SqlJournal(url(tmp_path)), list[str]()
    failpoints.arm(seen.append)
    try:
        journal.append("digits", entries(1, 1))
    finally:
        failpoints.arm(None)
        journal.close()
    assert seen[: seen.index("journal.committing")] == [
        *("file.writing", "file.written", "bytes.syncing", "bytes.synced", "file.renaming", "file.renamed"),
        *("folder.syncing", "bytes.syncing", "bytes.synced", "folder.synced"),
    ]
    assert head_file(tmp_path / "journal.db", "digits").stat().st_mode & 0o777 == 0o600


def test_the_first_head_finds_no_room_before_anything_is_recorded(tmp_path: Path) -> None:
    journal = SqlJournal(url(tmp_path))
    head_file(tmp_path / "journal.db", "digits").mkdir()  # as good as a disk on which nothing can be made
    with pytest.raises(OSError, match="directory"):
        journal.append("digits", entries(1, 1))
    head_file(tmp_path / "journal.db", "digits").rmdir()
    assert list(journal.read("digits")) == []
    journal.append("digits", entries(1, 1))
    journal.close()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal whose writer was killed: all of it is in the write-ahead log."""
    folder = tmp_path_factory.mktemp("killed")
    program = (
        "import os, sys\n"
        "from coordinator.stores.journal import Entry, SqlJournal\n"
        "journal = SqlJournal(sys.argv[1])\n"
        "for n in range(1, 21):\n"
        "    journal.append('digits', [Entry(n, n / 10, 'ClientJoined', f'\"{n}\"')])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, url(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_sqlite_drops_commits_behind_a_flipped_bit_of_its_log_and_the_head_tells(
    killed: Path, tmp_path: Path, where: float
) -> None:
    shutil.copytree(killed, tmp_path / "state")
    log = tmp_path / "state" / "journal.db-wal"
    content = bytearray(log.read_bytes())
    content[int(where * len(content))] ^= 0x10
    log.write_bytes(content)
    with pytest.raises(CorruptStore, match=r"it ends at entry \d+, but entry 20 was recorded and answered"):
        read(tmp_path / "state")


# ---------------------------------------------------------------- from version 1


def of_version_1(folder: Path, last: int = 2_500) -> Path:
    """A database as raflora wrote it before entries were chained."""
    database = written(folder, 0)
    rows = []
    for entry in entries(1, last):
        text = f"{entry.sequence}|{entry.at.hex()}|{entry.kind}|{entry.body}"
        rows.append(("digits", entry.sequence, entry.at, entry.kind, entry.body, _digest(text)))
    connection = sqlite3.connect(database)
    connection.executemany("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.execute("UPDATE raflora_schema SET version = 1")
    connection.commit()
    connection.close()
    return database


def test_a_journal_of_version_1_is_brought_forward(tmp_path: Path) -> None:
    of_version_1(tmp_path)
    journal = SqlJournal(url(tmp_path))
    assert list(journal.read("digits")) == entries(1, 2_500)
    journal.append("digits", entries(2_501, 2_501))
    journal.close()
    assert read(tmp_path) == entries(1, 2_501)


MIGRATION = [  # every step of it, with three pages of entries
    *("schema.migrating:1", "schema.migrating:2", "schema.migrating:3", "schema.migrated"),
    *("schema.committing", "schema.committed", "folder.syncing", "bytes.syncing", "bytes.synced", "folder.synced"),
]


def test_these_are_all_steps_of_bringing_it_forward(tmp_path: Path) -> None:
    of_version_1(tmp_path)
    seen: list[str] = []
    failpoints.arm(seen.append)
    try:
        SqlJournal(url(tmp_path)).close()
    finally:
        failpoints.arm(None)
    assert seen == [step.partition(":")[0] for step in MIGRATION]


@pytest.mark.parametrize("step", MIGRATION)
def test_bringing_it_forward_may_be_killed_half_way(tmp_path: Path, step: str) -> None:
    of_version_1(tmp_path)
    program = (
        "import sys\n"
        "from common import failpoints\n"
        "from coordinator.stores.journal import SqlJournal\n"
        "failpoints.arm_as_planned(sys.argv[2])\n"
        "SqlJournal(sys.argv[1])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, url(tmp_path), f"kill@{step}"], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read(tmp_path) == entries(1, 2_500)


def test_a_damaged_journal_of_version_1_is_not_sealed_as_it_is(tmp_path: Path) -> None:
    database = of_version_1(tmp_path, 9)
    tamper(database, "UPDATE journal SET body = '\"other\"' WHERE sequence = 7")
    with pytest.raises(CorruptStore, match="digits: entry 7 is missing or not what was written"):
        read(tmp_path)
    tamper(database, "UPDATE journal SET body = '\"7\"' WHERE sequence = 7")
    assert read(tmp_path) == entries(1, 9)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
