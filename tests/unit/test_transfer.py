"""Transfers that are cut, resumed and lied about."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import failpoints, transfer
from common.codec import digest_of
from common.errors import CorruptTransfer, InvalidRequest, StorageFailed, TooBusy, WrongOffset, WrongSize
from common.transfer import Expected, PartFile, check_digest, chunks_of, sync_folder, write_durably

CONTENT = bytes(range(250)) * 4


def expected(content: bytes = CONTENT) -> Expected:
    return Expected(digest_of(content), len(content), "client ada")


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "slice.part"


@given(
    content=st.binary(min_size=1, max_size=400),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    chunk_bytes=st.integers(1, 50),
)
def test_wherever_a_transfer_is_cut_it_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int], chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("transfer")
    for cut in [*sorted(cuts), len(content)]:
        attempt = PartFile(folder / "part", expected(content))
        try:
            for start in range(attempt.committed_bytes, min(cut, len(content)), chunk_bytes):
                attempt.append(start, content[start : min(start + chunk_bytes, cut)])
        finally:
            attempt.close()
    last = PartFile(folder / "part", expected(content))
    assert last.is_complete
    last.finish(folder / "whole")
    assert (folder / "whole").read_bytes() == content
    assert not (folder / "part").exists()


def test_only_synced_bytes_count_as_committed(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SYNC_BYTES", 300)
    attempt = PartFile(part, expected())
    attempt.append(0, CONTENT[:200])
    assert attempt.committed_bytes == 0
    attempt.append(200, CONTENT[200:350])
    assert attempt.committed_bytes == 350
    attempt.append(350, CONTENT[350:400])
    attempt.sync()
    assert attempt.committed_bytes == 400
    attempt.close()


def test_what_a_dead_process_left_is_made_durable_before_it_counts(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part.write_bytes(CONTENT[:300])
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    attempt = PartFile(part, expected())
    assert synced
    assert attempt.committed_bytes == 300
    attempt.close()


def test_a_transfer_is_durable_before_it_is_checked_and_gets_its_name(part: Path, tmp_path: Path) -> None:
    file, seen = PartFile(part, expected(CONTENT)), list[str]()
    file.append(0, CONTENT)
    failpoints.arm(seen.append)
    try:
        file.finish(tmp_path / "whole")
    finally:
        failpoints.arm(None)
    assert seen == [
        *("bytes.syncing", "bytes.synced", "part.checked", "file.renaming", "file.renamed"),
        *("folder.syncing", "bytes.syncing", "bytes.synced", "folder.synced"),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("journal.sqlite-head-digits", "journal.sqlite-head-digits"),
        ("a" * 64, "a" * 12),
        ("b" * 64 + ".part", "b" * 12),
    ],
)
def test_a_full_disk_is_told_with_the_file_s_name_and_only_digests_are_cut(name: str, said: str) -> None:
    with pytest.raises(TooBusy, match=f"^{said}: the disk is full"), transfer.named_failures(Path("/state") / name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("offset", [0, 99, 101, 10**9, -1])
def test_a_wrong_offset_writes_nothing_and_names_the_right_one(part: Path, offset: int) -> None:
    attempt = PartFile(part, expected())
    attempt.append(0, CONTENT[:100])
    with pytest.raises(WrongOffset, match=f"client ada: chunk at byte {offset}, expected 100") as caught:
        attempt.append(offset, b"x" * 10)
    assert caught.value.committed_bytes == 100
    attempt.append(100, CONTENT[100:])
    attempt.finish(part.with_name("whole"))
    assert part.with_name("whole").read_bytes() == CONTENT


def test_a_byte_too_many_is_refused_and_not_written(part: Path) -> None:
    attempt = PartFile(part, expected())
    attempt.append(0, CONTENT[:-1])
    with pytest.raises(WrongSize, match=f"more bytes than the {len(CONTENT)}"):
        attempt.append(len(CONTENT) - 1, CONTENT[-1:] + b"!")
    attempt.append(len(CONTENT) - 1, CONTENT[-1:])
    attempt.finish(part.with_name("whole"))


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT[:-1], b""], ids=["other bytes", "too few", "none"])
def test_other_bytes_than_announced_get_no_name_and_are_forgotten(part: Path, content: bytes) -> None:
    attempt = PartFile(part, expected())
    attempt.append(0, content)
    with pytest.raises(CorruptTransfer, match=f"{len(content)} bytes .* expected {len(CONTENT)}"):
        attempt.finish(part.with_name("whole"))
    assert not part.with_name("whole").exists()
    assert attempt.committed_bytes == 0
    attempt.append(0, CONTENT)
    attempt.finish(part.with_name("whole"))
    assert part.with_name("whole").read_bytes() == CONTENT


def test_a_part_longer_than_announced_is_begun_anew(part: Path) -> None:
    part.write_bytes(CONTENT + b"of something else")
    attempt = PartFile(part, expected())
    assert attempt.committed_bytes == 0
    attempt.close()


def test_a_file_is_sent_from_any_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 300)
    file = tmp_path / "blob"
    file.write_bytes(CONTENT)
    assert [len(chunk) for chunk in chunks_of(file)] == [300, 300, 300, 100]
    assert b"".join(chunks_of(file, 123)) == CONTENT[123:]
    assert list(chunks_of(file, len(CONTENT))) == []
    for offset in (-1, len(CONTENT) + 1):
        with pytest.raises(WrongOffset) as caught:
            list(chunks_of(file, offset))
        assert caught.value.committed_bytes == len(CONTENT)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "state.json"
    write_durably(file, b"one")
    write_durably(file, b"two")
    assert file.read_bytes() == b"two"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("digest", ["", "abc", "G" * 64, "A" * 64, "0" * 65, "0" * 64 + "\n", "../" + "0" * 61])
def test_only_a_digest_is_a_digest(digest: str) -> None:
    with pytest.raises(InvalidRequest, match="client ada"):
        check_digest(digest, "client ada")
    assert check_digest("0" * 64, "client ada") == "0" * 64


# ---------------------------------------------------------------- a disk that is full or broken


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, StorageFailed), (errno.ENOSPC, TooBusy), (errno.EDQUOT, TooBusy)]
)
def test_a_disk_that_fails_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type[Exception]
) -> None:
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(error, match=r"the disk (is full|did not keep)"):
        write_durably(tmp_path / "state.json", b"one")
    assert not (tmp_path / "state.json").exists()


def test_bytes_that_a_full_disk_did_not_keep_are_not_counted_afterwards(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = PartFile(part, expected())
    attempt.append(0, CONTENT[:300])
    attempt.sync()
    attempt.append(300, CONTENT[300:500])
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(TooBusy):
            attempt.sync()
    assert attempt.committed_bytes == part.stat().st_size == 300
    attempt.append(300, CONTENT[300:])
    attempt.finish(part.with_name("whole"))
    assert part.with_name("whole").read_bytes() == CONTENT


def test_a_part_that_cannot_be_made_durable_when_it_is_found_counts_for_nothing(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part.write_bytes(CONTENT[:300])
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(TooBusy):
            PartFile(part, expected())
    attempt = PartFile(part, expected())
    assert attempt.committed_bytes == 0
    attempt.close()


def test_after_a_failed_fsync_of_a_folder_nobody_is_told_that_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel tells of a failed write once: who asks second, in another thread, would be told that all is well.
    first_asks, may_fail = threading.Event(), threading.Event()
    told: list[str] = []

    def fsync(_descriptor: int) -> None:
        if not first_asks.is_set():
            first_asks.set()
            assert may_fail.wait(10)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def ask() -> None:
        try:
            sync_folder(tmp_path)
        except StorageFailed:
            told.append("failed")
        else:
            told.append("durable")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert first_asks.wait(10)
        threads[1].start()
        may_fail.set()
        for thread in threads:
            thread.join(10)
    assert told == ["failed", "failed"]
    with pytest.raises(StorageFailed, match="did not keep what it was given before"):
        sync_folder(tmp_path)
    monkeypatch.setattr(transfer, "_lost", set())  # as in a new process
    sync_folder(tmp_path)


class Turns:
    """In place of a lock: what somebody else does in the moment before it is ours."""

    def __init__(self, *before: Callable[[], None]) -> None:
        self._before = list(before)

    def __enter__(self) -> None:
        if self._before:
            self._before.pop()()

    def __exit__(self, *_: object) -> None: ...


def test_a_sync_that_began_after_the_question_answers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    syncs = transfer._FolderSyncs()
    monkeypatch.setattr(syncs, "_lock", Turns(lambda: syncs.sync(7, tmp_path)))
    syncs.sync(8, tmp_path)
    assert synced == [7]
    monkeypatch.setattr(syncs, "_lock", Turns(lambda: syncs.sync(7, tmp_path / "other")))
    syncs.sync(8, tmp_path)
    assert synced == [7, 7, 8]


def test_a_sync_that_had_begun_before_the_question_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    syncs = transfer._FolderSyncs()

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if descriptor == 7:  # what it is called for may have come too late for it
            syncs.sync(8, tmp_path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(syncs, "_lock", Turns())
    syncs.sync(7, tmp_path)
    assert synced == [7, 8]


def test_nothing_is_read_again_where_the_digest_ran_along(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PartFile(part, expected())
    first.append(0, CONTENT[:400])
    first.sync()
    first.close()
    second = PartFile(part, expected(), first.digest)
    second.append(400, CONTENT[400:])
    monkeypatch.delattr(hashlib, "file_digest")
    second.finish(part.with_name("whole"))
    assert part.with_name("whole").read_bytes() == CONTENT


def test_a_digest_of_more_bytes_than_are_found_counts_for_nothing(part: Path) -> None:
    first = PartFile(part, expected())
    first.append(0, CONTENT[:400])
    first.close()
    os.truncate(part, 300)  # a crash of the machine
    second = PartFile(part, expected(), first.digest)
    second.append(300, CONTENT[300:])
    second.finish(part.with_name("whole"))
    assert part.with_name("whole").read_bytes() == CONTENT


def test_chunks_end_at_multiples_so_that_no_number_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 300)
    file = tmp_path / "slice"
    file.write_bytes(CONTENT)
    assert [len(chunk) for chunk in chunks_of(file, 123)] == [177, 300, 300, 100]
