"""A real gRPC server that hands out a script of tasks and breaks when it is told to. No state machine, no disk.

It keeps what it was sent, so a test reads in it what happened.
"""
# ruff: noqa: ARG002 (the signature of an RPC is given)

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc as rpc

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY, Keepalive, server_options
from common.errors import CorruptTransfer, RafloraError, UnknownBlob, UnknownTask, WrongOffset

MANIFEST_DIGEST = "fed0" * 16


@dataclass
class Script:
    """What the coordinator will say; a test changes it while the server runs."""

    tasks: list[pb.Task] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    finishes: bool = True  # after the last task
    heartbeat_seconds: float = 1.0
    chunk_bytes: int = 64
    base_model_digest: str = ""
    outcome: pb.SubmitOutcome = pb.SUBMIT_OUTCOME_ACCEPTED
    directive: pb.LeaseDirective = pb.LEASE_DIRECTIVE_CONTINUE
    refused_joins: dict[int, RafloraError] = field(default_factory=dict)  # the first is 1
    poll_errors: list[RafloraError] = field(default_factory=list)
    cut_uploads_after: list[int] = field(default_factory=list)  # bytes; each cuts one call
    cut_downloads_after: list[int] = field(default_factory=list)
    damaged_downloads: int = 0
    damaged_uploads: int = 0
    refused_announcements: list[RafloraError] = field(default_factory=list)  # each refuses one BeginUpload
    forgets_announcements: int = 0  # so many uploads are no longer known when their bytes come


class ScriptedCoordinator(rpc.FederationServiceServicer):
    """One federation in memory; `start` and `stop` may be called again, on the same port."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.port = 0
        self.joins: list[pb.JoinRequest] = []
        self.uploads: dict[str, bytearray] = {}
        self.sizes: dict[str, int] = {}
        self.received_bytes = 0
        self.offsets: list[int] = []  # at which the upload calls began
        self.served_bytes = 0
        self.updates: list[pb.SubmitUpdateRequest] = []
        self.evaluations: list[pb.SubmitEvaluationRequest] = []
        self.failures: list[pb.FailTaskRequest] = []
        self.departures: list[str] = []
        self.polled = asyncio.Event()
        self.activities: list[str] = []  # what the heartbeats said, in their order
        self.heard_of: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # an activity, for the first time
        self.training = asyncio.Event()  # a heartbeat said that a step is done
        self._server: grpc.aio.Server | None = None

    async def start(self, *, serves_federation: bool = True) -> None:
        self._server = grpc.aio.server(options=server_options(Keepalive()))
        if serves_federation:
            rpc.add_FederationServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(None)
            self._server = None

    async def Handshake(self, request, context):
        model = pb.ModelRequest(
            base_model="tiny",
            base_model_digest=self.script.base_model_digest,
            task="sequence-classification",
            labels=["no", "yes"],
            target_modules=["q_proj", "v_proj"],
            global_rank=4,
        )
        return pb.HandshakeResponse(protocol=1, software_version="0", federation="scripted", model=model)

    async def Join(self, request, context):
        self.joins.append(request)
        if len(self.joins) in self.script.refused_joins:
            await _refuse(context, self.script.refused_joins[len(self.joins)])
        return pb.JoinResponse(
            lora_rank=min(4, request.profile.max_rank),
            rank_reason="declared 4",
            heartbeat_seconds=self.script.heartbeat_seconds,
            lease_ttl_seconds=90,
            chunk_bytes=1 << 20,
            wire_dtype="float32",
            manifest_digest=MANIFEST_DIGEST,
            status_sentence="waiting for 1 more client",
        )

    async def PollTask(self, request, context):
        self.polled.set()
        if self.script.poll_errors:
            await _refuse(context, self.script.poll_errors.pop(0))
        if self.script.tasks:
            return pb.PollTaskResponse(task=self.script.tasks.pop(0))
        return pb.PollTaskResponse(finished=self.script.finishes, status_sentence="all rounds are done")

    async def Heartbeat(self, request, context):
        self.activities.append(request.progress.activity)
        self.heard_of[request.progress.activity].set()
        if request.progress.step:
            self.training.set()
        return pb.HeartbeatResponse(directive=self.script.directive)

    async def DownloadAdapter(self, request, context) -> AsyncIterator[pb.DownloadAdapterResponse]:
        content = self.script.blobs.get(request.digest)
        if content is None:
            await _refuse(context, UnknownBlob(f"slice {request.digest[:12]} is gone"))
            return
        if self.script.damaged_downloads:
            self.script.damaged_downloads -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = request.offset + _next_cut(self.script.cut_downloads_after, len(content))
        for chunk in _chunks(content[request.offset : end], self.script.chunk_bytes):
            self.served_bytes += len(chunk)
            yield pb.DownloadAdapterResponse(data=chunk)
        if end < len(content):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset")

    async def BeginUpload(self, request, context):
        if self.script.refused_announcements:
            await _refuse(context, self.script.refused_announcements.pop(0))
        upload = self.uploads.setdefault(request.blob.digest, bytearray())
        self.sizes[request.blob.digest] = request.blob.size_bytes
        return pb.BeginUploadResponse(committed_bytes=len(upload))

    async def UploadAdapter(self, request_iterator, context):
        metadata = dict(context.invocation_metadata())
        digest, offset = metadata["raflora-digest"], int(metadata["raflora-offset"])
        if self.script.forgets_announcements:
            self.script.forgets_announcements -= 1
            await _refuse(context, UnknownBlob(f"no upload of {digest[:12]} is open"))
        upload = self.uploads[digest]
        self.offsets.append(offset)
        if offset != len(upload):
            await _refuse(context, WrongOffset(f"byte {offset}", committed_bytes=len(upload)))
        cut = offset + _next_cut(self.script.cut_uploads_after, 1 << 40)
        async for chunk in request_iterator:
            self.received_bytes += len(chunk.data)
            upload += chunk.data[: max(0, cut - len(upload))]
            if len(upload) >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset")
        is_whole = len(upload) >= self.sizes[digest]
        if is_whole and (self.script.damaged_uploads > 0 or hashlib.sha256(upload).hexdigest() != digest):
            self.script.damaged_uploads -= 1
            upload.clear()
            await _refuse(context, CorruptTransfer("these are not the bytes"))
        return pb.UploadAdapterResponse(committed_bytes=len(upload))

    async def QueryUpload(self, request, context):
        return pb.QueryUploadResponse(committed_bytes=len(self.uploads.get(request.digest, b"")))

    async def SubmitUpdate(self, request, context):
        self.updates.append(request)
        return pb.SubmitUpdateResponse(outcome=self.script.outcome)

    async def SubmitEvaluation(self, request, context):
        self.evaluations.append(request)
        return pb.SubmitEvaluationResponse(outcome=self.script.outcome)

    async def FailTask(self, request, context):
        self.failures.append(request)
        if request.lease_token == 0:
            await _refuse(context, UnknownTask("no such lease"))
        return pb.FailTaskResponse(will_retry=True)

    async def Leave(self, request, context):
        self.departures.append(request.client_id)
        return pb.LeaveResponse()


async def _refuse(context: grpc.aio.ServicerContext, error: RafloraError) -> None:
    trailing = [(REASON_KEY, error.reason)]
    if isinstance(error, WrongOffset):
        trailing.append((COMMITTED_BYTES_KEY, str(error.committed_bytes)))
    await context.abort(grpc.StatusCode[error.code], str(error), tuple(trailing))


def _next_cut(cuts: list[int], otherwise: int) -> int:
    return cuts.pop(0) if cuts else otherwise


def _chunks(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]
