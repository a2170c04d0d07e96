"""Bytes travel as byte planes where both sides say so, plainly where one does not know them, and mean the same."""

import io
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from coordinators import NumpyClient, clients_of, config_of, observing, serving
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc
from scripted_coordinator import Script, ScriptedCoordinator

from common.byte_planes import decode, encode
from common.channel import REASON_KEY
from common.codec import digest_of
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.messages import Blob, Outcome, Task

RANKS = {"ada": 8, "bob": 4}
PLANES = pb.CONTENT_ENCODING_BYTE_PLANES


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    config = config_of(tmp_path, rounds__min_clients=2, rounds__num_rounds=1, adapter__wire_dtype="bfloat16")
    async with serving(config) as address:
        yield address


async def with_planes(client: NumpyClient, address: str) -> None:
    """The same client with the other setting."""
    await client.rpc.close()
    where = CoordinatorAddress(address=address, encoding="byte-planes")
    client.rpc = CoordinatorClient(where, Credentials(client.client_id, client.enrol_key, "0"))
    await client.join()


async def downloaded(stub: Any, task: Task, offset: int, *encodings: "pb.ContentEncoding") -> list[Any]:
    """The responses as any gRPC client sees them."""
    who = {"client_id": "ada", "enrol_key": "key-of-ada"}
    request = pb.DownloadAdapterRequest(**who, digest=task.adapter.digest, offset=offset, encodings=encodings)
    return [response async for response in stub.DownloadAdapter(request, timeout=30)]


async def sent(stub: Any, digest: str, offset: int, *chunks: pb.UploadAdapterRequest) -> int:
    """What is durable after an upload of these very messages."""
    who = {"client-id": "ada", "enrol-key": "key-of-ada", "digest": digest, "offset": str(offset)}
    metadata = [(f"raflora-{key}", value) for key, value in who.items()]
    answer = await stub.UploadAdapter(iter(chunks), metadata=metadata, timeout=30)
    return int(answer.committed_bytes)


async def test_a_round_in_which_one_site_has_a_slow_link(address: str) -> None:
    async with clients_of(address, RANKS) as (ada, bob):
        await with_planes(ada, address)
        for client in (ada, bob):
            assert await client.do(await client.fetch_task()) is Outcome.ACCEPTED
        async with observing(address) as observer:
            status = await observer.see()
            # Counted is what went over the wire, in both directions.
            assert 0 < status.bytes_received < len(ada.sent[1]) + len(bob.sent[1])
            assert 0 < status.bytes_sent < len(ada.received[1]) + len(bob.received[1])
            assert (await observer.finished()).round == 1


async def test_a_slice_comes_as_planes_from_any_offset_to_who_asks_and_plainly_to_others(address: str) -> None:
    async with clients_of(address, RANKS) as (ada, _), observing(address) as observer:
        task = await ada.fetch_task()
        content = await ada.download(task)
        for offset in (0, 2, 100):
            (response,) = await downloaded(observer.federation, task, offset, PLANES)
            assert not response.data
            assert len(response.planes) < len(content) - offset
            assert decode(response.planes) == content[offset:]
        assert [r.data for r in await downloaded(observer.federation, task, 0)] == [content]
        # An odd offset cuts a number in two, so these bytes come as they are.
        assert [r.data for r in await downloaded(observer.federation, task, 1, PLANES)] == [content[1:]]


async def test_an_upload_in_planes_counts_plain_bytes_and_goes_on_at_their_offset(address: str) -> None:
    async with clients_of(address, RANKS) as (ada, _), observing(address) as observer:
        task = await ada.fetch_task()
        content = await ada.train(task)
        blob = Blob(digest_of(content), len(content))
        await ada.rpc.begin_upload(task.lease_token, blob)
        half = len(content) // 4 * 2
        first, second = encode(content[:half], 2), encode(content[half:], 2)
        assert first
        assert second
        assert await sent(observer.federation, blob.digest, 0, pb.UploadAdapterRequest(planes=first)) == half
        assert await ada.rpc.begin_upload(task.lease_token, blob) == half
        messages = pb.UploadAdapterRequest(planes=second)
        assert await sent(observer.federation, blob.digest, half, messages) == len(content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED


async def test_a_bomb_is_refused_by_name_and_what_came_before_stays(address: str) -> None:
    async with clients_of(address, RANKS) as (ada, _), observing(address) as observer:
        task = await ada.fetch_task()
        content = await ada.train(task)
        blob = Blob(digest_of(content), len(content))
        await ada.rpc.begin_upload(task.lease_token, blob)
        bomb = struct.pack("<BI", 2, 1 << 30)
        plain, bad = pb.UploadAdapterRequest(data=content[:10]), pb.UploadAdapterRequest(planes=bomb)
        with pytest.raises(
            grpc.aio.AioRpcError, match="client 'ada': a chunk in byte planes: 1073741824 bytes"
        ) as refused:
            await sent(observer.federation, blob.digest, 0, plain, bad)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(refused.value.trailing_metadata() or ())[REASON_KEY] == "invalid_request"
        await ada.upload(task, content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED


async def test_an_older_coordinator_gets_and_gives_plain_bytes() -> None:
    content = bytes(4000)
    blob = Blob(digest_of(content), len(content))
    coordinator = ScriptedCoordinator(Script(blobs={blob.digest: content}))  # says nothing of encodings
    await coordinator.start()
    where = CoordinatorAddress(address=f"127.0.0.1:{coordinator.port}", encoding="byte-planes")
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))
    try:
        assert await client.begin_upload(1, blob) == 0
        assert await client.upload(blob, 0, io.BytesIO(content)) == len(content)
        assert b"".join([chunk async for chunk in client.download(blob, 0)]) == content
    finally:
        await client.close()
        await coordinator.stop()
    assert coordinator.received_bytes == len(content)


async def test_an_older_worker_speaks_protobuf_of_its_own(address: str) -> None:
    async with clients_of(address, RANKS) as (ada, _), grpc.aio.insecure_channel(address) as channel:
        stub = federation_pb2_grpc.FederationServiceStub(channel)
        task = await ada.fetch_task()
        content = await ada.train(task)
        blob = Blob(digest_of(content), len(content))
        await ada.rpc.begin_upload(task.lease_token, blob)
        chunks = [pb.UploadAdapterRequest(data=content[i : i + 100]) for i in range(0, len(content), 100)]
        assert await sent(stub, blob.digest, 0, *chunks) == len(content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED
