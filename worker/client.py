"""The coordinator as a worker sees it: one method per RPC, values in, values out.

Protobuf and gRPC stay in here. Nothing is retried in here: who holds the file resumes a broken stream.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

import grpc
import grpc.aio
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc as rpc
from raflora.v1 import identity_pb2, identity_pb2_grpc

from common import byte_planes
from common.byte_planes import BadPlanes
from common.channel import REASON_KEY, Pem, Tls, client_channel, is_loopback
from common.chunk_message import Chunk, message_of
from common.errors import ConfigError, CorruptTransfer, RafloraError, Unavailable
from common.side_by_side import one_ahead
from common.transfer import chunks_from
from common.version import PROTOCOL, PROTOCOL_OLDEST
from worker import wire_messages as wire
from worker.certificates import Issued
from worker.config import CoordinatorAddress
from worker.messages import (
    Blob,
    Enrolment,
    Evaluation,
    Outcome,
    Place,
    Polled,
    Progress,
    Update,
    Welcome,
)
from worker.probe import Step, probe
from worker.wire_errors import meaning_of

POLL_SECONDS = 45.0  # the most that a coordinator grants
MAX_CALL_BYTES = 64 << 20  # of one upload call: bounds its deadline, and lets connections be rebalanced
_POLL_GRACE_SECONDS = 15.0
_STREAM_SECONDS = 30.0  # a stream may take this long and then one second for every
_SLOWEST_BYTES_PER_SECOND = 64 << 10
_PROBE_SECONDS = 3.0  # for each step of finding out why TLS fails

_SERVICE = pb.DESCRIPTOR.services_by_name["FederationService"].full_name

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Credentials:
    """Who is calling."""

    client_id: str
    enrol_key: str
    software_version: str
    # Of this process: a second one with the same identity is told apart by it.
    session: str = field(default_factory=lambda: secrets.token_hex(8))


class _Line:
    """A channel with the certificates of the moment when it was made, and how many calls are on it."""

    def __init__(self, address: str, tls: Tls | Pem | None) -> None:
        self.tls = tls.read() if isinstance(tls, Tls) else tls
        self.channel = client_channel(address, self.tls)
        self.federation = rpc.FederationServiceStub(self.channel)
        # The two streams of chunks, as the stub has them but for protobuf's copies.
        self.upload_adapter = self.channel.stream_unary(
            f"/{_SERVICE}/UploadAdapter",
            request_serializer=message_of,
            response_deserializer=pb.UploadAdapterResponse.FromString,
        )
        self.download_adapter = self.channel.unary_stream(
            f"/{_SERVICE}/DownloadAdapter",
            request_serializer=pb.DownloadAdapterRequest.SerializeToString,
            response_deserializer=wire.download_chunk_of,
        )
        self.identity = identity_pb2_grpc.IdentityServiceStub(self.channel)
        self.calls = 0
        self.is_replaced = False


class CoordinatorClient:
    """One connection to one coordinator, opened at the first call.

    Every method has a deadline and raises a class of common.errors: Unavailable if nobody answered,
    otherwise what the coordinator said. A `join_token` is shown instead of what the settings name.
    """

    def __init__(self, where: CoordinatorAddress, who: Credentials, *, join_token: Pem | None = None) -> None:
        self.address = where.address
        self._software_version = who.software_version
        self._me = {"client_id": who.client_id, "enrol_key": who.enrol_key}
        self._session = who.session
        self._rpc_seconds = where.rpc_timeout_seconds
        self._wants_planes = where.encoding == "byte-planes"
        self._number_bytes = 0  # on the wire, if the coordinator reads byte planes; 0: chunks are sent as they are
        self._wire_dtype = ""
        self._tls = join_token or tls_of(where)
        self._line = _Line(where.address, self._tls)

    async def close(self) -> None:
        """Ends the connection."""
        await self._line.channel.close()

    async def reconnect(self) -> None:
        """Makes further calls with what the certificate files hold now; those in progress end where they began.

        Raises ConfigError, and goes on as before, if the files cannot be read.
        """
        before, self._line = self._line, _Line(self.address, self._tls)
        before.is_replaced = True
        if not before.calls:
            await before.channel.close()

    async def enrol(self, request: bytes, worker: str) -> Issued:
        """The first certificate for this signing request. Raises BadJoinToken."""
        message = identity_pb2.EnrolRequest(signing_request=request, worker=worker)
        answer = await self._answer(self._line.identity.Enrol(message, timeout=self._rpc_seconds))
        return Issued(answer.certificate, answer.authority)

    async def renew(self, request: bytes) -> Issued:
        """The next certificate. Raises Revoked, NotAuthenticated."""
        message = identity_pb2.RenewRequest(signing_request=request)
        answer = await self._answer(self._line.identity.Renew(message, timeout=self._rpc_seconds))
        return Issued(answer.certificate, answer.authority)

    async def handshake(self) -> Welcome:
        """Agrees on a protocol; tells what to load. Raises ProtocolTooOld."""
        request = pb.HandshakeRequest(
            protocol_min=PROTOCOL_OLDEST,
            protocol_max=PROTOCOL,
            software_version=self._software_version,
        )
        answer = await self._answer(self._line.federation.Handshake(request, timeout=self._rpc_seconds))
        return wire.welcome_of(answer)

    async def join(self, enrolment: Enrolment) -> Place:
        """Enrols. Raises BaseModelMismatch, SpecMismatch, IdentityConflict, Evicted."""
        request = wire.join_request(enrolment, self._me, self._software_version)
        answer = await self._answer(self._line.federation.Join(request, timeout=self._rpc_seconds))
        self._wire_dtype = answer.wire_dtype
        return wire.place_of(answer)

    async def poll_task(self, wait_seconds: float = POLL_SECONDS) -> Polled:
        """Waits for work."""
        request = pb.PollTaskRequest(**self._me, wait_seconds=wait_seconds, session=self._session)
        answer = await self._answer(self._line.federation.PollTask(request, timeout=wait_seconds + _POLL_GRACE_SECONDS))
        tasks = (wire.task_of(answer.task),) if answer.HasField("task") else ()
        return Polled(tasks, answer.finished, answer.status_sentence)

    async def heartbeat(self, lease_token: int, progress: Progress) -> bool:
        """Renews a lease; False: stop the work."""
        request = pb.HeartbeatRequest(
            **self._me,
            lease_token=lease_token,
            session=self._session,
            progress=pb.Progress(
                activity=progress.activity,
                step=progress.step,
                total_steps=progress.total_steps,
                train_loss=progress.train_loss,
            ),
        )
        answer = await self._answer(self._line.federation.Heartbeat(request, timeout=self._rpc_seconds))
        return answer.directive != pb.LEASE_DIRECTIVE_STOP

    async def download(self, blob: Blob, offset: int) -> AsyncGenerator[bytes | memoryview, None]:
        """The blob's bytes from an offset; may break off with Unavailable anywhere. Close the iterator.

        Raises CorruptTransfer for a chunk that cannot be decoded.
        """
        encodings = [pb.CONTENT_ENCODING_BYTE_PLANES] if self._wants_planes else []
        request = pb.DownloadAdapterRequest(**self._me, digest=blob.digest, offset=offset, encodings=encodings)
        async with self._calling() as line:
            call = line.download_adapter(request, timeout=_stream_seconds(blob.size_bytes - offset))
            try:
                async for chunk in call:
                    if chunk is None:  # all that gRPC says of a message that `download_chunk_of` raised for
                        raise CorruptTransfer(f"rank slice {blob.digest[:12]}: a message that cannot be parsed")
                    yield await asyncio.to_thread(chunk.plain) if chunk.is_planes else chunk.data
            except BadPlanes as error:
                raise CorruptTransfer(f"rank slice {blob.digest[:12]}: a chunk in byte planes: {error}") from None
            finally:
                call.cancel()

    async def begin_upload(self, lease_token: int, blob: Blob) -> int:
        """Announces an upload; the number of bytes that are durable already."""
        request = pb.BeginUploadRequest(
            **self._me,
            lease_token=lease_token,
            blob=wire.blob(blob),
        )
        answer = await self._answer(self._line.federation.BeginUpload(request, timeout=self._rpc_seconds))
        is_understood = pb.CONTENT_ENCODING_BYTE_PLANES in answer.encodings
        self._number_bytes = wire.number_bytes_of(self._wire_dtype) if self._wants_planes and is_understood else 0
        return answer.committed_bytes

    async def upload(self, blob: Blob, offset: int, source: BinaryIO) -> int:
        """Streams at most MAX_CALL_BYTES from a file that stands at this offset of the blob.

        Returns the number of bytes that are durable afterwards.
        Raises WrongOffset with the right one, CorruptTransfer if everything must come again.
        """
        metadata = (
            ("raflora-client-id", self._me["client_id"]),
            ("raflora-enrol-key", self._me["enrol_key"]),
            ("raflora-digest", blob.digest),
            ("raflora-offset", str(offset)),
        )
        seconds = _stream_seconds(min(blob.size_bytes - offset, MAX_CALL_BYTES))
        async with self._calling() as line:
            call = line.upload_adapter(metadata=metadata, timeout=seconds)
            try:
                await _send(call, _chunks_to_send(source, offset, self._number_bytes))
                return (await call).committed_bytes
            finally:
                call.cancel()

    async def submit_update(self, update: Update) -> Outcome:
        """Commits an uploaded update; repeating it changes nothing."""
        request = pb.SubmitUpdateRequest(
            **self._me,
            lease_token=update.task.lease_token,
            round=update.task.round,
            attempt=update.task.attempt,
            blob=wire.blob(update.blob),
            slice_digest=update.task.adapter.digest,
            num_examples=update.num_examples,
            metrics=update.metrics,
            training_seconds=update.training_seconds,
        )
        answer = await self._answer(self._line.federation.SubmitUpdate(request, timeout=self._rpc_seconds))
        return wire.outcome_of(answer.outcome)

    async def submit_evaluation(self, evaluation: Evaluation) -> Outcome:
        """Commits an evaluation; repeating it changes nothing."""
        request = pb.SubmitEvaluationRequest(
            **self._me,
            lease_token=evaluation.task.lease_token,
            round=evaluation.task.round,
            attempt=evaluation.task.attempt,
            slice_digest=evaluation.task.adapter.digest,
            num_examples=evaluation.num_examples,
            metrics=evaluation.metrics,
        )
        answer = await self._answer(self._line.federation.SubmitEvaluation(request, timeout=self._rpc_seconds))
        return wire.outcome_of(answer.outcome)

    async def fail_task(self, lease_token: int, reason: str, message: str) -> bool:
        """Gives a task back; whether this client may be given it again."""
        request = pb.FailTaskRequest(
            **self._me,
            lease_token=lease_token,
            reason=reason,
            message=message,
        )
        return (await self._answer(self._line.federation.FailTask(request, timeout=self._rpc_seconds))).will_retry

    async def leave(self, timeout_seconds: float) -> None:
        """Leaves the federation."""
        request = pb.LeaveRequest(**self._me)
        await self._answer(self._line.federation.Leave(request, timeout=timeout_seconds))

    async def _answer(self, call: Awaitable[Answer]) -> Answer:
        """The answer to a call that was just made."""
        async with self._calling():
            return await call

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[_Line]:
        """The present line; a replaced one is closed by the last call on it. Statuses come out as our errors."""
        line = self._line
        line.calls += 1
        try:
            yield line
        except grpc.aio.AioRpcError as error:
            raise await self._meaning_of(error, line) from None
        finally:
            line.calls -= 1
            if line.is_replaced and not line.calls:
                await line.channel.close()

    async def _meaning_of(self, error: grpc.aio.AioRpcError, line: _Line) -> RafloraError:
        trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
        meant = meaning_of(error.code().name, error.details() or "no details", trailing, self.address)
        if REASON_KEY in trailing or not isinstance(meant, Unavailable):
            return meant
        # gRPC says little about certificates, and nothing about one of ours that the other side does not like. In the
        # clear only a connection that was closed is worth a look: the other side may want TLS.
        if line.tls is not None or str(meant).endswith(("connection closed", "connection reset")):
            found = await asyncio.to_thread(probe, self.address, line.tls, _PROBE_SECONDS)
            if found.failed in {Step.TLS, Step.HTTP2}:
                return Unavailable(f"coordinator {self.address} cannot be reached: {found.cause}")
        return meant


def tls_of(where: CoordinatorAddress) -> Tls | None:
    """How to speak to this address; None: in the clear. Raises ConfigError if the site has not decided."""
    if where.tls is not None:
        return Tls(where.tls.ca_file, where.tls.certificate_file, where.tls.key_file)
    if where.insecure or is_loopback(where.address):
        return None
    raise ConfigError(
        f"coordinator.address: {where.address} is not on this machine, so a join token (coordinator.join_token_file; "
        "the operator has it) or a [coordinator.tls] section is needed; insecure = true speaks in the clear"
    )


async def _send(call: "grpc.aio.StreamUnaryCall[Chunk, pb.UploadAdapterResponse]", chunks: Generator[Chunk]) -> None:
    """Writes the chunks, or as many as come through until the call is over (its status then says why)."""
    # write() and not an iterator: an iterator that fails looks like our own cancellation.
    async with aclosing(one_ahead(chunks)) as pieces:
        async for chunk in pieces:
            try:
                await call.write(chunk)
            except asyncio.InvalidStateError:
                return
    await call.done_writing()


def _chunks_to_send(source: BinaryIO, offset: int, number_bytes: int) -> Generator[Chunk]:
    """At most MAX_CALL_BYTES of a file that stands at the offset; as byte planes if numbers have so many bytes."""
    for data in chunks_from(source, offset, MAX_CALL_BYTES):
        planes = byte_planes.encode(data, number_bytes) if number_bytes else None
        yield Chunk(data) if planes is None else Chunk(planes, is_planes=True)


def _stream_seconds(size_bytes: int) -> float:
    return _STREAM_SECONDS + size_bytes / _SLOWEST_BYTES_PER_SECOND
