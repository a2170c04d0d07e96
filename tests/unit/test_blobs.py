"""Blobs: the name is the content, and a name that was given out stays good."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.codec import digest_of
from common.errors import CorruptStore, InvalidRequest, UnknownBlob
from coordinator.stores.blobs import BlobStore, FileBlobs

ADA = b"factors of ada"
BOB = b"factors of bob"


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "state" / "blobs")


def test_what_is_put_can_be_opened_by_its_digest(blobs: FileBlobs) -> None:
    digest = blobs.put(ADA)
    assert digest == digest_of(ADA)
    assert blobs.open(digest).read_bytes() == ADA
    assert blobs.verify(digest) == blobs.open(digest)


def test_a_restart_finds_the_blobs(tmp_path: Path) -> None:
    digest = FileBlobs(tmp_path).put(ADA)
    again: BlobStore = FileBlobs(tmp_path)
    assert again.open(digest).read_bytes() == ADA


def test_the_same_bytes_are_stored_once(blobs: FileBlobs) -> None:
    assert blobs.put(ADA) == blobs.put(ADA)
    blobs.put(BOB)
    assert blobs.digests() == {digest_of(ADA), digest_of(BOB)}


def test_threads_that_put_the_same_bytes_do_not_meet(blobs: FileBlobs) -> None:
    content = bytes(range(256)) * 4096
    with ThreadPoolExecutor(8) as threads:
        digests = set(threads.map(blobs.put, [content] * 16))
    assert blobs.verify(digests.pop()).read_bytes() == content
    assert not digests
    assert blobs.digests() == {digest_of(content)}


def test_an_unknown_blob_is_an_error_that_names_it(blobs: FileBlobs) -> None:
    digest = digest_of(ADA)
    for look_up in (blobs.open, blobs.verify):
        with pytest.raises(UnknownBlob, match=digest[:12]):
            look_up(digest)


def test_a_deleted_blob_is_gone_and_deleting_again_is_harmless(blobs: FileBlobs) -> None:
    digest = blobs.put(ADA)
    blobs.delete(digest)
    blobs.delete(digest)
    assert blobs.digests() == set()


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 62 + "/.."])
def test_a_name_that_is_no_digest_reaches_no_file(blobs: FileBlobs, digest: str) -> None:
    for use in (blobs.open, blobs.delete, blobs.verify):
        with pytest.raises(InvalidRequest):
            use(digest)


def test_an_adopted_file_is_a_blob_that_outlives_its_source(blobs: FileBlobs, tmp_path: Path) -> None:
    source = tmp_path / "state" / "upload"
    source.write_bytes(ADA)
    blobs.adopt(source, digest_of(ADA))
    blobs.adopt(source, digest_of(ADA))
    assert source.read_bytes() == ADA
    source.unlink()
    assert blobs.verify(digest_of(ADA)).read_bytes() == ADA


def test_bytes_that_changed_on_disk_are_noticed_and_putting_them_again_heals(blobs: FileBlobs) -> None:
    digest = blobs.put(ADA)
    blobs.open(digest).write_bytes(BOB)
    with pytest.raises(CorruptStore, match=digest_of(BOB)[:12]):
        blobs.verify(digest)
    assert blobs.put(ADA) == digest
    assert blobs.verify(digest).read_bytes() == ADA


def test_adopting_the_same_bytes_heals_what_changed_on_disk(blobs: FileBlobs, tmp_path: Path) -> None:
    blobs.open(blobs.put(ADA)).write_bytes(BOB)
    source = tmp_path / "state" / "upload"
    source.write_bytes(ADA)
    blobs.adopt(source, digest_of(ADA))
    assert blobs.verify(digest_of(ADA)).read_bytes() == ADA
    assert blobs.digests() == {digest_of(ADA)}


def test_a_blob_that_is_here_already_is_durable_before_its_name_is_said_again(
    blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote it may have died before the folder was synced."""
    folder, synced, real = blobs.open(blobs.put(ADA)).parent, list[str](), os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    blobs.put(ADA)
    assert synced == [str(folder)]


def test_what_a_crash_left_half_written_is_swept(blobs: FileBlobs) -> None:
    digest = blobs.put(ADA)
    half = blobs.open(digest).with_name(f"{digest_of(BOB)}.1-2.part")
    half.write_bytes(BOB[:5])
    assert blobs.digests() == {digest}
    blobs.sweep()
    assert not half.exists()
    assert blobs.verify(digest).read_bytes() == ADA


def test_what_is_set_aside_is_gone_at_once_and_its_room_later(blobs: FileBlobs) -> None:
    kept, dropped = blobs.put(ADA), blobs.put(BOB)
    (aside,) = blobs.set_aside([dropped, digest_of(b"never stored")])
    assert blobs.digests() == {kept}
    with pytest.raises(UnknownBlob):
        blobs.open(dropped)
    assert aside.read_bytes() == BOB
    assert blobs.put(BOB) == dropped  # it may come back before the room is freed
    blobs.remove([aside])
    blobs.remove([aside])
    assert not aside.exists()
    assert blobs.verify(dropped).read_bytes() == BOB


def test_what_was_set_aside_when_the_process_died_is_swept(blobs: FileBlobs) -> None:
    (aside,) = blobs.set_aside([blobs.put(ADA)])
    blobs.sweep()
    assert not aside.exists()
