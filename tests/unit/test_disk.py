"""Whether an upload may begin: what is used, what is free, and what others were promised."""

from pathlib import Path

import pytest

from common.codec import digest_of
from common.errors import CorruptTransfer, TooBusy
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.disk import MEASURE_SECONDS, Disk, DiskLimits, Room, refusal_of
from coordinator.stores.uploads import UploadSpool

CONTENT = bytes(range(100)) * 10
DIGEST = digest_of(CONTENT)
SIZE = len(CONTENT)
OTHER = CONTENT[::-1]


@pytest.mark.parametrize(
    ("room", "size_bytes", "expected"),
    [
        (Room(used_bytes=60, free_bytes=1000), 40, ""),
        (Room(used_bytes=61, free_bytes=1000), 40, "limits.disk_bytes is 100 bytes"),
        (Room(used_bytes=30, free_bytes=1000, awaited_bytes=31), 40, "open uploads will bring 31 bytes"),
        (Room(used_bytes=0, free_bytes=90), 40, ""),
        (Room(used_bytes=0, free_bytes=89), 40, "limits.min_free_bytes keeps 50 bytes free"),
        (Room(used_bytes=0, free_bytes=100, awaited_bytes=11), 40, "the disk has 100 bytes left"),
    ],
)
def test_what_was_promised_to_others_counts_as_used(room: Room, size_bytes: int, expected: str) -> None:
    refusal = refusal_of(DiskLimits(disk_bytes=100, min_free_bytes=50), room, size_bytes)
    assert expected in refusal
    assert bool(refusal) == bool(expected)


def test_without_a_limit_everything_may_come() -> None:
    assert refusal_of(DiskLimits(), Room(10**15, 10**9), 10**9) == ""


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Bench:
    def __init__(self, folder: Path, limits: DiskLimits) -> None:
        self.free_bytes = 10_000
        self.clock = Clock()
        self.disk = Disk(folder, limits, clock=self.clock, free_bytes=lambda _: self.free_bytes)
        self.blobs = FileBlobs(folder / "blobs")
        self.spool = UploadSpool(folder / "uploads", self.blobs, 4, self.disk)


def test_uploads_that_begin_together_share_the_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(min_free_bytes=10_000 - 2 * SIZE))
    bench.spool.begin("ada", DIGEST, SIZE)
    bench.spool.begin("bob", DIGEST, SIZE)
    with pytest.raises(TooBusy, match=rf"client cem: no room for this upload: .* open uploads will take {2 * SIZE}"):
        bench.spool.begin("cem", DIGEST, SIZE)
    assert not list((tmp_path / "uploads").rglob("*/*3*"))[2:]  # nothing was begun for cem
    assert "open uploads will take" in bench.disk.refusal
    bench.spool.discard("ada", DIGEST)
    bench.spool.begin("cem", DIGEST, SIZE)
    assert bench.disk.refusal == ""


def test_the_same_client_beginning_again_needs_no_more_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(min_free_bytes=10_000 - SIZE))
    for digest in (DIGEST, DIGEST, digest_of(OTHER)):
        bench.spool.begin("ada", digest, SIZE)
    assert bench.disk.room().awaited_bytes == SIZE


def test_what_has_arrived_is_awaited_no_longer(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(disk_bytes=10_000))
    bench.spool.begin("ada", DIGEST, SIZE)
    upload = bench.spool.open("ada", DIGEST)
    assert bench.spool.open_streams == 1
    upload.append(0, CONTENT[:300])
    assert (bench.disk.room().awaited_bytes, bench.disk.room().used_bytes) == (SIZE - 300, 300)
    upload.append(300, CONTENT[300:])
    upload.finish()
    assert (bench.disk.room().awaited_bytes, bench.disk.room().used_bytes) == (0, SIZE)
    assert bench.spool.open_streams == 0
    bench.spool.commit("ada", DIGEST)  # a second name, not a second copy
    bench.disk.measure()
    assert bench.disk.room().used_bytes == SIZE


def test_after_a_restart_only_what_is_missing_is_awaited(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits())
    bench.spool.begin("ada", DIGEST, SIZE)
    upload = bench.spool.open("ada", DIGEST)
    upload.append(0, CONTENT[:300])
    upload.finish()
    restarted = Bench(tmp_path, DiskLimits(min_free_bytes=10_000 - (SIZE - 300)))
    assert restarted.spool.begin("ada", DIGEST, SIZE) == 300
    assert restarted.disk.room().awaited_bytes == SIZE - 300


def test_a_refused_upload_changes_nothing_and_may_begin_when_there_is_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(min_free_bytes=9_500))
    upload_before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TooBusy):
        bench.spool.begin("ada", DIGEST, SIZE)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in upload_before] == []
    assert bench.disk.room().awaited_bytes == 0
    bench.free_bytes = 20_000
    assert bench.spool.begin("ada", DIGEST, SIZE) == 0


def test_a_refused_announcement_leaves_what_the_client_was_sending(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(min_free_bytes=10_000 - SIZE))
    bench.spool.begin("ada", DIGEST, SIZE)
    with pytest.raises(TooBusy):
        bench.spool.begin("ada", digest_of(OTHER), SIZE + 1)
    assert bench.spool.begin("ada", DIGEST, SIZE) == 0


def test_the_folder_is_walked_now_and_then_and_not_for_each_upload(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits(disk_bytes=5_000))
    (tmp_path / "blobs" / "big").write_bytes(bytes(4_500))
    with pytest.raises(TooBusy, match="the state folder holds 4500 bytes"):
        bench.spool.begin("ada", DIGEST, SIZE)
    (tmp_path / "blobs" / "big").unlink()
    with pytest.raises(TooBusy):
        bench.spool.begin("ada", DIGEST, SIZE)
    bench.clock.seconds += MEASURE_SECONDS
    bench.spool.begin("ada", DIGEST, SIZE)


def test_an_upload_that_rots_before_it_is_submitted_is_sent_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits())
    for content in (OTHER, CONTENT):
        bench.spool.begin("ada", DIGEST, SIZE)
        upload = bench.spool.open("ada", DIGEST)
        upload.append(0, CONTENT)
        upload.finish()
        bench.spool.completed_path("ada", DIGEST).write_bytes(content)
        if content is OTHER:
            with pytest.raises(CorruptTransfer, match="changed on the coordinator's disk; send it again"):
                bench.spool.checked_path("ada", DIGEST)
    bench.spool.commit("ada", DIGEST)
    assert bench.blobs.verify(DIGEST).read_bytes() == CONTENT


def test_an_update_that_is_sent_again_takes_the_place_of_a_damaged_blob(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits())
    bench.blobs.put(CONTENT)
    bench.blobs.open(DIGEST).write_bytes(OTHER)
    complete = tmp_path / "complete"
    complete.write_bytes(CONTENT)
    bench.blobs.adopt(complete, DIGEST)
    assert bench.blobs.verify(DIGEST).read_bytes() == CONTENT
    assert bench.blobs.digests() == {DIGEST}


def test_uploads_of_those_who_are_not_expected_are_swept_unless_they_are_arriving(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DiskLimits())
    for client_id in ("ada", "bob", "cem", "dan"):
        bench.spool.begin(client_id, DIGEST, SIZE)
    arriving = [bench.spool.open(client_id, DIGEST) for client_id in ("cem", "dan")]
    bench.spool.sweep(["ada"], gone=["dan"])
    assert len(list((tmp_path / "uploads").iterdir())) == 2  # ada's and cem's
    assert bench.disk.room().awaited_bytes == 2 * SIZE
    for upload in arriving:
        upload.close()
    bench.spool.sweep(["ada"])
    assert len(list((tmp_path / "uploads").iterdir())) == 1
