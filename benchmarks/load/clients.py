"""Clients without a model: each has a TCP connection of its own and speaks the wire's messages as they are."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc, status_pb2, status_pb2_grpc

from common.adapter import AdapterSpec
from common.channel import REASON_KEY, Keepalive, client_options
from common.codec import Layout
from common.transfer import CHUNK_BYTES
from common.version import PROTOCOL

BASE_MODEL = hashlib.sha256(b"no base model").hexdigest()
CALL_SECONDS = 60.0
_SLOW_SECONDS = 600.0  # for what handles half a gigabyte on a busy machine
_CALL_BYTES = 64 << 20  # of one upload call, as the worker does it
# Without it gRPC lets all channels of a process share one connection to the same address.
_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


def channel_to(address: str) -> grpc.aio.Channel:
    """A connection with a worker's options that nobody else in this process uses."""
    return grpc.aio.insecure_channel(address, options=[*client_options(Keepalive()), _OWN_CONNECTION])


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The stable word of a refusal; the status' name if it has none."""
    trailing = dict(error.trailing_metadata() or ())
    return str(trailing.get(REASON_KEY) or error.code().name)


@dataclass(frozen=True)
class Payload:
    """An update's bytes: a file; make_payload writes a valid adapter of zeros as a file of holes."""

    path: Path
    digest: str
    size_bytes: int

    def chunks(self, offset: int) -> Iterator[bytes]:
        """From an offset to the end of one upload call."""
        with self.path.open("rb") as file:
            file.seek(offset)
            sent = 0
            while sent < _CALL_BYTES and (chunk := file.read(CHUNK_BYTES)):
                yield chunk
                sent += len(chunk)


def make_payload(path: Path, layout: Layout, number: int) -> Payload:
    """The file; another `number` gives other bytes. Takes no room on a file system that knows holes."""
    with path.open("wb") as file:
        file.write(layout.header)
        file.write(np.array([number + 1], dtype="<f4").tobytes() if layout.dtype == "float32" else b"")
        file.truncate(layout.size_bytes)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Payload(path, digest, layout.size_bytes)


class Client:
    """One participant. Every call has a deadline and raises grpc.aio.AioRpcError."""

    def __init__(self, address: str, client_id: str, rank: int) -> None:
        self.client_id = client_id
        self.rank = rank
        self._me: dict[str, Any] = {"client_id": client_id, "enrol_key": f"key-of-{client_id}"}
        self._channel = channel_to(address)
        self._stub = federation_pb2_grpc.FederationServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def join(self, spec: AdapterSpec) -> None:
        """Enrols; the first one founds the federation."""
        request = pb.JoinRequest(
            protocol=PROTOCOL,
            **self._me,
            profile=pb.RankProfile(max_rank=self.rank, device="cpu", num_examples=100),
            base_model_digest=BASE_MODEL,
            spec=pb.AdapterSpec(
                modules=[
                    pb.ModuleShape(name=m.name, out_features=m.out_features, in_features=m.in_features)
                    for m in spec.modules
                ],
                tensors=[pb.TensorShape(name=t.name, shape=t.shape) for t in spec.tensors],
            ),
        )
        await self._stub.Join(request, timeout=_SLOW_SECONDS)

    async def leave(self) -> None:
        """Good-bye."""
        await self._stub.Leave(pb.LeaveRequest(**self._me), timeout=CALL_SECONDS)

    async def poll(self, wait_seconds: float = 45.0) -> pb.PollTaskResponse:
        """Work, if there is any within the wait."""
        request = pb.PollTaskRequest(**self._me, wait_seconds=wait_seconds)
        return await self._stub.PollTask(request, timeout=wait_seconds + _SLOW_SECONDS)

    async def task(self) -> pb.Task:
        """The first task that comes."""
        while True:
            answer = await self.poll()
            if answer.HasField("task"):
                return answer.task

    async def heartbeat(self, task: pb.Task) -> None:
        """A sign of life."""
        request = pb.HeartbeatRequest(**self._me, lease_token=task.lease_token)
        await self._stub.Heartbeat(request, timeout=CALL_SECONDS)

    async def download(self, task: pb.Task) -> bytes:
        """The slice."""
        request = pb.DownloadAdapterRequest(**self._me, digest=task.adapter.digest)
        call = self._stub.DownloadAdapter(request, timeout=_SLOW_SECONDS)
        return b"".join([part.data async for part in call])

    async def begin(self, task: pb.Task, payload: Payload) -> int:
        """How much of the payload is durable."""
        blob = pb.BlobReference(digest=payload.digest, size_bytes=payload.size_bytes)
        request = pb.BeginUploadRequest(**self._me, lease_token=task.lease_token, blob=blob)
        return (await self._stub.BeginUpload(request, timeout=_SLOW_SECONDS)).committed_bytes

    def stream(
        self, payload: Payload, offset: int
    ) -> grpc.aio.StreamUnaryCall[pb.UploadAdapterRequest, pb.UploadAdapterResponse]:
        """An upload call that nothing was written to yet."""
        metadata = (
            ("raflora-client-id", self._me["client_id"]),
            ("raflora-enrol-key", self._me["enrol_key"]),
            ("raflora-digest", payload.digest),
            ("raflora-offset", str(offset)),
        )
        return self._stub.UploadAdapter(metadata=metadata, timeout=_SLOW_SECONDS)

    async def upload(self, task: pb.Task, payload: Payload) -> None:
        """All of it, in as many calls as a worker makes."""
        offset = await self.begin(task, payload)
        while offset < payload.size_bytes:
            call = self.stream(payload, offset)
            for chunk in payload.chunks(offset):
                try:
                    await call.write(pb.UploadAdapterRequest(data=chunk))
                except asyncio.InvalidStateError:
                    break  # the call is over; its status says why
            else:
                await call.done_writing()
            offset = (await call).committed_bytes

    async def submit(self, task: pb.Task, payload: Payload) -> "pb.SubmitOutcome":
        """Commits the upload."""
        request = pb.SubmitUpdateRequest(
            **self._me,
            lease_token=task.lease_token,
            round=task.round,
            attempt=task.attempt,
            blob=pb.BlobReference(digest=payload.digest, size_bytes=payload.size_bytes),
            slice_digest=task.adapter.digest,
            num_examples=100,
        )
        return (await self._stub.SubmitUpdate(request, timeout=_SLOW_SECONDS)).outcome

    async def evaluate(self, task: pb.Task) -> "pb.SubmitOutcome":
        """Commits a made-up evaluation."""
        request = pb.SubmitEvaluationRequest(
            **self._me,
            lease_token=task.lease_token,
            round=task.round,
            attempt=task.attempt,
            slice_digest=task.adapter.digest,
            num_examples=100,
            metrics={"accuracy": 0.5, "eval_loss": 1.0},
        )
        return (await self._stub.SubmitEvaluation(request, timeout=CALL_SECONDS)).outcome


class Observer:
    """Somebody who looks on."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = status_pb2_grpc.StatusServiceStub(channel)

    async def look(self) -> status_pb2.FederationStatus:
        """The federation as it stands."""
        return (await self._stub.GetStatus(status_pb2.GetStatusRequest(), timeout=CALL_SECONDS)).status

    async def rounds(self, after: int) -> list[status_pb2.RoundSummary]:
        """Finished rounds after one, at most 100."""
        request = status_pb2.ListRoundsRequest(page_size=100, after_round=after)
        return list((await self._stub.ListRounds(request, timeout=CALL_SECONDS)).rounds)

    def watch(
        self, seconds: float
    ) -> grpc.aio.UnaryStreamCall[status_pb2.WatchStatusRequest, status_pb2.WatchStatusResponse]:
        """The states as they come, for so long."""
        return self._stub.WatchStatus(status_pb2.WatchStatusRequest(), timeout=seconds)


@asynccontextmanager
async def observing(address: str) -> AsyncIterator[Observer]:
    """An observer on a connection of its own."""
    async with channel_to(address) as channel:
        yield Observer(channel)


@asynccontextmanager
async def closing(clients: list[Client]) -> AsyncIterator[list[Client]]:
    """Closes their connections in the end."""
    try:
        yield clients
    finally:
        await asyncio.gather(*(client.close() for client in clients))
