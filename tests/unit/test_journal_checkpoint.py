"""SQLite's write-ahead log is emptied by us, not by a commit: it stays short, and a disk that fails then is heard."""

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from errno import EIO, ENOSPC
from pathlib import Path

import pytest

from common import failpoints
from common.errors import CorruptStore, StorageFailed
from coordinator.stores import journal as journal_module
from coordinator.stores.journal import Entry, SqlJournal, head_file

REAL_EVERY, EVERY = journal_module.CHECKPOINT_EVERY, 8
BODY = '"' + "x" * 20_000 + '"'
# Fails every fsync of the database itself (its log is another file) as soon as the file "broken" is there.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int is_broken(int fd) {
    char link[64], path[4096];
    if (access(getenv("BROKEN"), F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 10) return 0;
    path[n] = 0;
    return strcmp(path + n - 10, "journal.db") == 0;
}
int fsync(int fd) {
    if (is_broken(fd)) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int fdatasync(int fd) {
    if (is_broken(fd)) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
"""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(journal_module, "CHECKPOINT_EVERY", EVERY)
    yield
    failpoints.arm(None)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqlJournal]:
    journal = SqlJournal(url(tmp_path))
    yield journal
    journal.close()


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/journal.db"


def append(journal: SqlJournal, first: int, last: int) -> None:
    for sequence in range(first, last + 1):
        journal.append("digits", [Entry(sequence, 0.0, "ClientJoined", BODY)])


def log_bytes(folder: Path) -> int:
    return (folder / "journal.db-wal").stat().st_size


def sequences(journal: SqlJournal) -> list[int]:
    return [entry.sequence for entry in journal.read("digits")]


def test_the_log_stays_short_however_much_is_appended(tmp_path: Path, journal: SqlJournal) -> None:
    append(journal, 1, 2 * EVERY)
    short = log_bytes(tmp_path)
    append(journal, 2 * EVERY + 1, 12 * EVERY)
    assert log_bytes(tmp_path) <= short + 2 * len(BODY)  # trees grow; the commits of one turn do not
    assert sequences(journal) == list(range(1, 12 * EVERY + 1))


def test_processes_that_never_live_long_do_not_make_the_log_ever_longer(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from coordinator.stores.journal import Entry, SqlJournal\n"
        "journal, first = SqlJournal(sys.argv[1]), int(sys.argv[2])\n"
        "for n in (first, first + 1):\n"
        "    journal.append('digits', [Entry(n, 0.0, 'ClientJoined', 'x' * 20_000)])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for first in range(1, 9, 2):
        ended = subprocess.run([sys.executable, "-c", program, url(tmp_path), str(first)], check=False, timeout=60)
        assert ended.returncode == -signal.SIGKILL
    assert log_bytes(tmp_path) < 4 * len(BODY)


def test_a_reader_such_as_a_backup_holds_nobody_up_and_the_log_is_short_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WAIT_SECONDS", 3600.0)  # whoever waits for the reader is never seen again
    journal = SqlJournal(url(tmp_path))
    append(journal, 1, EVERY)
    reader = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT max(sequence) FROM journal").fetchone() == (EVERY,)
    append(journal, EVERY + 1, 4 * EVERY)  # nothing raises
    assert reader.execute("SELECT max(sequence) FROM journal").fetchone() == (EVERY,)
    reader.execute("COMMIT")
    reader.close()
    long = log_bytes(tmp_path)
    append(journal, 4 * EVERY + 1, 20 * EVERY)
    assert log_bytes(tmp_path) <= long + 2 * EVERY * len(BODY)
    journal.close()


def test_a_disk_that_fails_in_between_is_the_end_although_the_commit_stands(
    tmp_path: Path, journal: SqlJournal
) -> None:
    append(journal, 1, EVERY)
    failpoints.arm(fail_at("journal.checkpointing", EIO))
    with pytest.raises(StorageFailed, match=r"journal\.db: the disk did not keep what it was given"):
        append(journal, EVERY + 1, EVERY + 1)
    failpoints.arm(None)
    assert sequences(journal) == list(range(1, EVERY + 2))


def test_a_full_disk_in_between_refuses_nobody_what_is_recorded(tmp_path: Path, journal: SqlJournal) -> None:
    failpoints.arm(fail_at("journal.checkpointing", ENOSPC))
    append(journal, 1, 2 * EVERY)
    failpoints.arm(None)
    assert sequences(journal) == list(range(1, 2 * EVERY + 1))


def test_a_failed_fsync_of_the_database_is_heard(tmp_path: Path) -> None:
    """The kernel's own answer: without our checkpoint SQLite asks inside of a commit, and ignores it."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/proc/self/fd").is_dir():
        pytest.skip("needs a C compiler and Linux")
    (tmp_path / "shim.c").write_text(SHIM)
    shim, broken = tmp_path / "shim.so", tmp_path / "broken"
    command = [compiler, "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from common.errors import StorageFailed\n"
        "from coordinator.stores.journal import Entry, SqlJournal\n"
        "journal = SqlJournal(sys.argv[1])\n"
        "try:\n"
        "    for n in range(1, 1_000):\n"
        "        journal.append('digits', [Entry(n, 0.0, 'ClientJoined', 'x')])\n"
        "        Path(sys.argv[2]).touch()\n"
        "except StorageFailed as failure:\n"
        "    print(n, failure)\n"
    )
    ended = subprocess.run(
        ["env", f"LD_PRELOAD={shim}", f"BROKEN={broken}", sys.executable, "-c", program, url(tmp_path), broken],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    found = 1 + REAL_EVERY  # the first commit's checkpoint came before
    assert ended.stdout.startswith(f"{found} journal {tmp_path}/journal.db: the disk did not keep what it was given")
    journal = SqlJournal(url(tmp_path))
    assert sequences(journal) == list(range(1, found + 1))  # the log has it, and it was not answered
    journal.close()


def test_a_lost_end_is_still_found_behind_a_checkpoint(tmp_path: Path) -> None:
    journal = SqlJournal(url(tmp_path))
    append(journal, 1, 3 * EVERY + 3)
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    journal.close()
    log = tmp_path / "copy" / "journal.db-wal"
    content = bytearray(log.read_bytes())
    content[40] ^= 0x10  # in the first frame: everything since the checkpoint goes, and the database is whole
    log.write_bytes(content)
    assert head_file(tmp_path / "copy" / "journal.db", "digits").is_file()
    copy = SqlJournal(url(tmp_path / "copy"))
    with pytest.raises(CorruptStore, match=rf"but entry {3 * EVERY + 3} was recorded and answered"):
        list(copy.read("digits"))
    copy.close()


def fail_at(wanted: str, number: int) -> failpoints.Watch:
    def watch(step: str) -> None:
        if step == wanted:
            raise OSError(number, "as planned")

    return watch
