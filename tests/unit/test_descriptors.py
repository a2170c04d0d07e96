"""Too many open files: what that is called, how many connections are let in, and that the journal outlives it."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from common.descriptors import MAX_CONNECTIONS, RESERVE, most_connections
from common.errors import TooBusy
from common.transfer import named_failures, sync_folder
from common.version import software_version
from coordinator.stores.entry import Entry
from coordinator.stores.journal import SqlJournal


@contextmanager
def limit_of(descriptors: int) -> Iterator[None]:
    """What is open stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_pass(number: int) -> None:
    with pytest.raises(TooBusy, match="too many files are open"), named_failures(Path("journal-head")):
        raise OSError(number, "too many")


def test_a_folder_that_cannot_be_opened_now_is_no_broken_disk(tmp_path: Path) -> None:
    with limit_of(1), pytest.raises(TooBusy, match="too many files are open"):
        sync_folder(tmp_path)


def test_a_journal_without_a_descriptor_refuses_or_keeps_an_entry_and_goes_on(tmp_path: Path) -> None:
    journal = SqlJournal(f"sqlite:///{tmp_path}/journal.db")
    entries = [Entry(number, 0.0, "ClientJoined", "{}") for number in (1, 2, 3)]
    journal.append("digits", entries[:1])
    with limit_of(1), suppress(TooBusy):
        journal.append("digits", entries[1:2])
    kept = list(journal.read("digits"))
    journal.append("digits", entries[len(kept) : len(kept) + 1])
    assert list(journal.read("digits")) == entries[: len(kept) + 1]
    journal.close()


def test_each_connection_can_move_a_file_and_the_reserve_stays_free() -> None:
    with limit_of(RESERVE + 100):
        assert most_connections() == 50
    with limit_of(RESERVE):
        assert most_connections() == 1


def test_there_are_no_more_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert most_connections() == MAX_CONNECTIONS
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert most_connections() == MAX_CONNECTIONS


def test_the_version_is_known_without_a_descriptor() -> None:
    known = software_version()
    with limit_of(1):
        assert software_version() == known
