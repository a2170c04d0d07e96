"""The worker's uploads and downloads of real sizes over real gRPC, cut and damaged on the way."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from scripted_coordinator import Script, ScriptedCoordinator

from common.errors import CorruptTransfer, Unavailable, UnknownBlob
from common.transfer import CHUNK_BYTES, PartFile
from worker import client as client_module
from worker import downloads, uploads
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.contact import Clock, Contact
from worker.downloads import KEPT_SLICES, Slices
from worker.messages import Blob

CONTENT = hashlib.shake_256(b"update").digest(3 * CHUNK_BYTES + CHUNK_BYTES // 2)
BLOB = Blob(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@dataclass
class Line:
    """A worker's end of the line and what is at the other."""

    coordinator: ScriptedCoordinator
    client: CoordinatorClient
    contact: Contact
    folder: Path

    @property
    def slices(self) -> Slices:
        return Slices(self.folder / "slices", self.client, self.contact)

    async def send(self) -> None:
        path = self.folder / "update.safetensors"
        path.write_bytes(CONTENT)
        await uploads.send(uploads.Upload(path, BLOB, lease_token=1), self.client, self.contact)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    coordinator = ScriptedCoordinator(Script(blobs={BLOB.digest: CONTENT}, chunk_bytes=CHUNK_BYTES))
    await coordinator.start()
    where = CoordinatorAddress(address=f"127.0.0.1:{coordinator.port}")
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))

    async def at_once(seconds: float) -> None: ...

    yield Line(coordinator, client, Contact(tmp_path, Clock(sleep=at_once)), tmp_path)
    await client.close()
    await coordinator.stop()


async def test_an_upload_that_is_cut_sends_at_most_one_chunk_again(line: Line) -> None:
    cut = 2 * CHUNK_BYTES + 1000
    line.coordinator.script.cut_uploads_after = [cut]

    await line.send()

    assert bytes(line.coordinator.uploads[BLOB.digest]) == CONTENT
    assert line.coordinator.offsets == [0, cut]
    assert line.coordinator.received_bytes - len(CONTENT) <= CHUNK_BYTES


async def test_an_upload_that_is_durable_already_sends_nothing(line: Line) -> None:
    line.coordinator.uploads[BLOB.digest] = bytearray(CONTENT)

    await line.send()

    assert line.coordinator.received_bytes == 0


async def test_a_large_upload_is_made_of_calls_of_bounded_length(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_CALL_BYTES", 2 * CHUNK_BYTES)

    await line.send()

    assert line.coordinator.offsets == [0, 2 * CHUNK_BYTES]


async def test_a_damaged_upload_is_sent_again_from_the_start(line: Line) -> None:
    line.coordinator.script.damaged_uploads = 1

    await line.send()

    assert bytes(line.coordinator.uploads[BLOB.digest]) == CONTENT
    assert line.coordinator.offsets == [0, 0]


async def test_an_upload_that_stays_damaged_is_given_up(line: Line) -> None:
    line.coordinator.script.damaged_uploads = uploads.MAX_DAMAGED_UPLOADS

    with pytest.raises(CorruptTransfer):
        await line.send()
    assert line.coordinator.offsets == [0] * uploads.MAX_DAMAGED_UPLOADS


async def test_an_upload_that_a_new_coordinator_knows_nothing_of_is_announced_again(line: Line) -> None:
    line.coordinator.script.forgets_announcements = 1

    await line.send()

    assert bytes(line.coordinator.uploads[BLOB.digest]) == CONTENT


async def test_an_upload_that_nobody_ever_knows_is_given_up(line: Line) -> None:
    line.coordinator.script.forgets_announcements = 100

    with pytest.raises(CorruptTransfer):
        await line.send()
    assert line.coordinator.script.forgets_announcements <= 100 - uploads.MAX_STALLS


async def test_a_download_goes_on_in_a_new_process_where_the_old_one_was_cut(line: Line) -> None:
    line.coordinator.script.cut_downloads_after = [CHUNK_BYTES]
    chunks = line.client.download(BLOB, 0)
    first = [chunk async for chunk in _until_cut(chunks)]
    part = line.folder / "slices" / f"{BLOB.digest}.part"
    part.parent.mkdir()
    part.write_bytes(b"".join(first))

    path = await line.slices.fetch(BLOB)

    assert path.read_bytes() == CONTENT
    assert line.coordinator.served_bytes == len(CONTENT)


async def test_a_slice_that_rotted_on_disk_is_fetched_again(line: Line) -> None:
    path = await line.slices.fetch(BLOB)
    path.write_bytes(CONTENT[:-1] + b"?")

    assert (await line.slices.fetch(BLOB)).read_bytes() == CONTENT
    assert line.coordinator.served_bytes == 2 * len(CONTENT)


async def test_no_more_slices_are_kept_than_the_next_round_can_use(line: Line) -> None:
    for content in (b"one", b"two", b"three", b"four"):
        digest = hashlib.sha256(content).hexdigest()
        line.coordinator.script.blobs[digest] = content
        await line.slices.fetch(Blob(digest, len(content)))

    assert len(list((line.folder / "slices").iterdir())) == KEPT_SLICES


async def test_a_slice_that_is_gone_says_so(line: Line) -> None:
    with pytest.raises(UnknownBlob, match="is gone"):
        await line.slices.fetch(Blob("0" * 64, 10))


async def test_who_drops_a_download_for_good_closes_no_file_under_the_thread_that_writes_it(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_held, may_go_on, is_closed = threading.Event(), threading.Event(), threading.Event()

    class SlowPart(PartFile):
        def append(self, offset: int, data: bytes | memoryview) -> None:
            is_held.set()
            assert may_go_on.wait(timeout=30)
            super().append(offset, data)

        def close(self) -> None:
            super().close()
            is_closed.set()

    monkeypatch.setattr(downloads, "PartFile", SlowPart)
    fetching = asyncio.create_task(line.slices.fetch(BLOB))
    assert await asyncio.to_thread(is_held.wait, 30)
    for _ in range(100):  # as often as it waits for something on its way out
        fetching.cancel()
        await asyncio.sleep(0)
    assert fetching.cancelled()
    assert not is_closed.is_set()

    may_go_on.set()
    assert await asyncio.to_thread(is_closed.wait, 30)
    part = line.folder / "slices" / f"{BLOB.digest}.part"
    assert part.read_bytes() == CONTENT[:CHUNK_BYTES]


async def test_a_message_that_cannot_be_parsed_is_a_damaged_download(tmp_path: Path) -> None:
    async def garbled(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"\x0a\xff\xff"  # field 1, and a length that never ends

    server = grpc.aio.server()
    methods = {"DownloadAdapter": grpc.unary_stream_rpc_method_handler(garbled)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("raflora.v1.FederationService", methods)])
    where = CoordinatorAddress(address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))

    with pytest.raises(CorruptTransfer, match=r"rank slice .*: a message that cannot be parsed"):
        await anext(client.download(BLOB, 0))
    with pytest.raises(CorruptTransfer, match="damaged 3 times in a row"):
        await Slices(tmp_path / "slices", client, Contact(tmp_path, Clock())).fetch(BLOB)

    await client.close()
    await server.stop(None)


async def _until_cut(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Unavailable:
        return
