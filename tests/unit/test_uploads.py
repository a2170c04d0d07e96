"""Uploads: interrupted, resumed, repeated, hostile; what is complete is what was announced."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import failpoints
from common.codec import digest_of
from common.errors import (
    CorruptTransfer,
    InvalidRequest,
    TooBusy,
    UnknownBlob,
    UploadTakenOver,
    WrongOffset,
    WrongSize,
)
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.uploads import UploadSpool

CONTENT = bytes(range(256)) * 40
DIGEST = digest_of(CONTENT)
SIZE = len(CONTENT)
OTHER = CONTENT[::-1]


def open_spool(folder: Path, max_open: int = 4) -> UploadSpool:
    return UploadSpool(folder / "uploads", FileBlobs(folder / "blobs"), max_open)


@pytest.fixture
def spool(tmp_path: Path) -> UploadSpool:
    return open_spool(tmp_path)


def send(spool: UploadSpool, content: bytes = CONTENT, *, client_id: str = "ada", stop_at: int | None = None) -> int:
    """Announces and streams from the committed byte, breaking off at `stop_at`; returns the committed bytes."""
    digest = digest_of(content)
    offset = spool.begin(client_id, digest, len(content))
    if offset == len(content):
        return offset
    upload = spool.open(client_id, digest)
    try:
        for start in range(offset, len(content) if stop_at is None else stop_at, 1000):
            upload.append(start, content[start : min(start + 1000, stop_at or len(content))])
        return upload.finish()
    finally:
        upload.close()


def test_a_complete_upload_can_be_read_and_becomes_a_blob(spool: UploadSpool, tmp_path: Path) -> None:
    assert send(spool) == SIZE
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT
    spool.commit("ada", DIGEST)
    spool.discard("ada", DIGEST)
    assert FileBlobs(tmp_path / "blobs").verify(DIGEST).read_bytes() == CONTENT


def test_announcing_what_is_complete_says_so(spool: UploadSpool) -> None:
    send(spool)
    assert spool.begin("ada", DIGEST, SIZE) == SIZE
    assert spool.committed_bytes("ada", DIGEST) == SIZE
    with pytest.raises(UnknownBlob):
        spool.open("ada", DIGEST)


@pytest.mark.parametrize("stop_at", [1, 999, 1000, 5500, SIZE - 1])
def test_an_interrupted_upload_goes_on_after_a_restart(tmp_path: Path, stop_at: int) -> None:
    assert send(open_spool(tmp_path), stop_at=stop_at) == stop_at
    restarted = open_spool(tmp_path)
    assert restarted.committed_bytes("ada", DIGEST) == stop_at
    with pytest.raises(UnknownBlob):
        restarted.completed_path("ada", DIGEST)
    upload = restarted.open("ada", DIGEST)  # the announced size was kept
    upload.append(stop_at, CONTENT[stop_at:])
    assert upload.finish() == SIZE
    assert restarted.completed_path("ada", DIGEST).read_bytes() == CONTENT


def test_a_stream_that_broke_after_the_last_byte_is_completed_by_the_next_announcement(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, CONTENT)
    upload.close()
    assert open_spool(tmp_path).begin("ada", DIGEST, SIZE) == SIZE
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT


def test_other_bytes_than_announced_are_forgotten(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, OTHER)
    with pytest.raises(CorruptTransfer, match="client ada"):
        upload.finish()
    upload.close()
    assert spool.committed_bytes("ada", DIGEST) == 0
    assert send(spool) == SIZE


def test_other_bytes_whose_stream_broke_are_forgotten_too(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, OTHER)
    upload.close()
    assert spool.begin("ada", DIGEST, SIZE) == 0


def test_more_bytes_than_announced_are_refused(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    with pytest.raises(WrongSize):
        upload.append(0, CONTENT + b"!")
    upload.append(0, CONTENT)
    assert upload.finish() == SIZE


def test_a_wrong_offset_names_the_right_one(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, CONTENT[:700])
    with pytest.raises(WrongOffset) as caught:
        upload.append(900, CONTENT[900:])
    assert caught.value.committed_bytes == 700
    upload.append(700, CONTENT[700:])
    assert upload.finish() == SIZE


def test_an_upload_that_was_not_announced_is_unknown(spool: UploadSpool) -> None:
    with pytest.raises(UnknownBlob, match="announce it first"):
        spool.open("ada", DIGEST)
    assert spool.committed_bytes("ada", DIGEST) == 0


def test_what_one_client_uploaded_no_other_can_claim(spool: UploadSpool) -> None:
    send(spool, client_id="ada")
    for claim in (spool.completed_path, spool.commit, spool.open):
        with pytest.raises(UnknownBlob, match="client bob"):
            claim("bob", DIGEST)
    assert spool.begin("bob", DIGEST, SIZE) == 0


@pytest.mark.parametrize("client_id", ["../../escape", "/etc/passwd", "", "a\0b", "..", "x" * 5000, "Zoë"])
def test_a_client_id_chooses_no_path(tmp_path: Path, client_id: str) -> None:
    spool = open_spool(tmp_path / "inside")
    send(spool, client_id=client_id)
    assert spool.completed_path(client_id, DIGEST).resolve().is_relative_to(tmp_path / "inside" / "uploads")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("digest", ["../" + "0" * 61, "*" * 64, "", DIGEST.upper()])
def test_a_digest_chooses_no_path(spool: UploadSpool, digest: str) -> None:
    for use in (spool.open, spool.committed_bytes, spool.completed_path, spool.commit, spool.discard):
        with pytest.raises(InvalidRequest):
            use("ada", digest)
    with pytest.raises(InvalidRequest):
        spool.begin("ada", digest, SIZE)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_an_empty_upload_is_refused(spool: UploadSpool, size_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        spool.begin("ada", DIGEST, size_bytes)


def test_one_digest_has_one_size(spool: UploadSpool) -> None:
    send(spool)
    with pytest.raises(InvalidRequest, match=str(SIZE + 1)):
        spool.begin("ada", DIGEST, SIZE + 1)


def test_a_new_announcement_drops_the_part_that_came_before(spool: UploadSpool) -> None:
    send(spool, CONTENT, stop_at=3000)
    send(spool, OTHER, stop_at=2000)
    assert spool.committed_bytes("ada", DIGEST) == 0
    assert spool.committed_bytes("ada", digest_of(OTHER)) == 2000


def test_a_client_keeps_one_complete_upload_however_many_it_sends(spool: UploadSpool, tmp_path: Path) -> None:
    for number in range(5):
        send(spool, CONTENT + bytes([number]))
    assert [path.name for path in (tmp_path / "uploads").glob("*/*")] == [digest_of(CONTENT + b"\x04")]


def test_announcing_the_next_upload_does_not_drop_the_complete_one(spool: UploadSpool) -> None:
    send(spool, CONTENT)
    send(spool, OTHER, stop_at=1000)
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT


def test_only_so_many_streams_are_open_at_once(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, max_open=2)
    for client_id in ("ada", "bob", "cy"):
        spool.begin(client_id, DIGEST, SIZE)
    ada, bob = spool.open("ada", DIGEST), spool.open("bob", DIGEST)
    with pytest.raises(TooBusy):
        spool.open("cy", DIGEST)
    with pytest.raises(TooBusy):
        spool.begin("dora", DIGEST, SIZE)
    ada.close()
    ada.close()
    cy = spool.open("cy", DIGEST)
    with pytest.raises(TooBusy):
        spool.open("ada", DIGEST)
    cy.append(0, CONTENT)
    assert cy.finish() == SIZE
    assert send(spool, client_id="ada") == SIZE
    bob.close()


def test_a_client_that_takes_over_from_itself_needs_no_second_place(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, max_open=1)
    spool.begin("ada", DIGEST, SIZE)
    for _ in range(3):
        newest = spool.open("ada", DIGEST)
    newest.append(0, CONTENT)
    assert newest.finish() == SIZE


def test_a_newer_stream_takes_over_and_the_older_is_told(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    older = spool.open("ada", DIGEST)
    older.append(0, CONTENT[:4000])
    newer = spool.open("ada", DIGEST)
    for use in (lambda: older.append(4000, b"late"), older.finish):
        with pytest.raises(UploadTakenOver, match="client ada"):
            use()
    older.close()  # as the servicer does in its finally; it must not end the newer one
    newer.append(4000, CONTENT[4000:])
    assert newer.finish() == SIZE
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT


def test_an_announcement_takes_over_too(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    older = spool.open("ada", DIGEST)
    older.append(0, CONTENT[:4000])
    assert spool.begin("ada", DIGEST, SIZE) == 4000
    with pytest.raises(UploadTakenOver):
        older.append(4000, b"late")


def test_streams_that_fight_over_one_upload_never_corrupt_it(spool: UploadSpool) -> None:
    start = threading.Barrier(4)

    def stubborn_sender(_: int) -> int:
        start.wait(timeout=10)
        for _attempt in range(200):
            try:
                if send(spool) == SIZE:
                    return SIZE
            except (UploadTakenOver, WrongOffset, UnknownBlob):
                continue
        return 0

    with ThreadPoolExecutor(4) as threads:
        committed = list(threads.map(stubborn_sender, range(4)))
    assert SIZE in committed
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT


def test_discarding_ends_the_stream_and_frees_its_place(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, max_open=1)
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    spool.discard("ada", digest_of(OTHER))
    upload.append(0, CONTENT[:10])
    spool.discard("ada", DIGEST)
    with pytest.raises(UploadTakenOver):
        upload.append(10, b"late")
    assert list((tmp_path / "uploads").iterdir()) == []
    assert send(spool, client_id="bob") == SIZE


def test_discarding_one_digest_leaves_the_others(spool: UploadSpool) -> None:
    send(spool, CONTENT)
    send(spool, OTHER, stop_at=1000)
    spool.discard("ada", DIGEST)
    assert spool.committed_bytes("ada", DIGEST) == 0
    assert spool.committed_bytes("ada", digest_of(OTHER)) == 1000
    spool.discard("nobody", DIGEST)


def test_a_sweep_forgets_everybody_but_the_known(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    send(spool, client_id="ada")
    send(spool, client_id="bob", stop_at=1000)
    restarted = open_spool(tmp_path)
    restarted.sweep(["ada", "cy"])
    assert restarted.completed_path("ada", DIGEST).read_bytes() == CONTENT
    assert restarted.committed_bytes("bob", DIGEST) == 0
    assert len(list((tmp_path / "uploads").iterdir())) == 1


def test_a_sweep_leaves_an_open_stream_alone_unless_its_client_has_gone(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, CONTENT[:1000])
    spool.sweep([])
    upload.append(1000, CONTENT[1000:])
    assert upload.finish() == SIZE
    spool.begin("ada", digest_of(OTHER), SIZE)
    upload = spool.open("ada", digest_of(OTHER))
    spool.sweep(["ada"], gone=["ada"])
    with pytest.raises(UploadTakenOver):
        upload.append(0, OTHER)
    assert spool.committed_bytes("ada", digest_of(OTHER)) == 0


def test_a_complete_upload_that_changed_on_disk_is_forgotten_and_not_believed(spool: UploadSpool) -> None:
    send(spool)
    assert spool.checked_path("ada", DIGEST).read_bytes() == CONTENT
    spool.completed_path("ada", DIGEST).write_bytes(OTHER)
    with pytest.raises(CorruptTransfer, match="changed on the coordinator's disk; send it again"):
        spool.checked_path("ada", DIGEST)
    assert spool.begin("ada", DIGEST, SIZE) == 0


def test_how_far_an_upload_is_is_said_of_durable_bytes_only(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    upload = spool.open("ada", DIGEST)
    upload.append(0, CONTENT[:1000])
    seen: list[str] = []
    failpoints.arm(seen.append)
    try:
        assert spool.committed_bytes("ada", DIGEST) == 1000  # asked while the stream is open
        assert seen == ["bytes.syncing", "bytes.synced"]
        upload.append(1000, CONTENT[1000:2000])
        seen.clear()
        assert upload.finish() == 2000  # the end of a stream that is not all of it
        assert seen == ["bytes.syncing", "bytes.synced"]
    finally:
        failpoints.arm(None)


def test_files_that_are_no_uploads_are_removed_at_start(tmp_path: Path) -> None:
    send(open_spool(tmp_path))
    (folder,) = (tmp_path / "uploads").iterdir()
    (folder / "core.1234").write_bytes(b"?")
    (tmp_path / "uploads" / "empty").mkdir()
    open_spool(tmp_path)
    assert [path.name for path in (tmp_path / "uploads").glob("**/*") if path.is_file()] == [DIGEST]
    assert not (tmp_path / "uploads" / "empty").exists()


def test_an_upload_of_several_calls_is_hashed_as_it_comes(spool: UploadSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("hashlib.file_digest")
    assert send(spool, stop_at=3000) == 3000
    assert send(spool) == SIZE


def test_the_chunks_of_a_call_open_nothing_before_the_first_and_complete_with_the_last(spool: UploadSpool) -> None:
    spool.begin("ada", DIGEST, SIZE)
    older = spool.open("ada", DIGEST)
    arrival = spool.arrival("ada", DIGEST)
    older.append(0, CONTENT[:1000])  # nobody has taken the upload over yet
    older.close()
    assert not arrival.has_to_be_closed
    arrival.take(1000, memoryview(CONTENT)[1000:2000])
    assert arrival.has_to_be_closed
    arrival.take(2000, CONTENT[2000:])
    assert (arrival.is_complete, arrival.has_to_be_closed, arrival.committed_bytes) == (True, False, SIZE)
    assert spool.completed_path("ada", DIGEST).read_bytes() == CONTENT
    with pytest.raises(WrongSize, match=f"more bytes than the {SIZE}"):
        arrival.take(SIZE, b"more")


def test_a_call_without_a_chunk_still_says_what_is_durable(spool: UploadSpool) -> None:
    with pytest.raises(UnknownBlob):
        spool.arrival("ada", DIGEST).end()
    send(spool, stop_at=1000)
    assert spool.arrival("ada", DIGEST).end() == 1000
