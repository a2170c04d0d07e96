"""FederationService: what workers call. Each method reads a message, asks the service, writes a message."""

import math
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc

from common.adapter import MAX_AXES, MAX_TENSORS, AdapterSpec, ModuleShape, TensorShape
from common.errors import InvalidRequest, ProtocolTooOld
from common.failpoints import reach
from common.plain import plain
from common.side_by_side import one_ahead
from common.transfer import CHUNK_BYTES, chunks_of
from common.version import PROTOCOL, PROTOCOL_OLDEST
from coordinator.federation.requests import Outcome, SubmitEvaluation, SubmitUpdate
from coordinator.federation.state import Evaluation, Kind, Measured, Phase, Profile, Update
from coordinator.identity.caller import own_client_id, own_enrol_key, present_caller
from coordinator.intake import MAX_METRICS
from coordinator.service import MAX_FAILURE_CHARS, CoordinatorService, Progress, Task
from coordinator.servicers.greeting import greeting
from coordinator.servicers.streams import as_wanted, data_of
from coordinator.slices import BlobReference

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_LONGEST_HEARTBEAT_SECONDS = 10.0  # a person watches the progress
_MAX_DEVICE_CHARS = 200
_MAX_WORD_CHARS = 50  # an activity, a version
_OFFSET = re.compile(r"[0-9]{1,18}")
_OUTCOMES = {
    Outcome.ACCEPTED: pb.SUBMIT_OUTCOME_ACCEPTED,
    Outcome.DUPLICATE: pb.SUBMIT_OUTCOME_DUPLICATE,
    Outcome.STALE: pb.SUBMIT_OUTCOME_STALE,
    Outcome.SUPERSEDED: pb.SUBMIT_OUTCOME_SUPERSEDED,
    Outcome.ROUND_CLOSED: pb.SUBMIT_OUTCOME_ROUND_CLOSED,
}
_KINDS = {Kind.TRAIN: pb.TASK_KIND_TRAIN, Kind.EVALUATE: pb.TASK_KIND_EVALUATE}


class FederationServicer(federation_pb2_grpc.FederationServiceServicer):
    """See proto/raflora/v1/federation.proto."""

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service

    async def Handshake(self, request: pb.HandshakeRequest, context: _Context) -> pb.HandshakeResponse:
        """The protocol to speak, and what to load."""
        config, manifest = self._service.config, self._service.foundation.manifest
        digest = manifest.base_model_digest if manifest else config.model.base_model_digest
        return greeting(config, digest, _agree(request.protocol_min, request.protocol_max))

    async def Join(self, request: pb.JoinRequest, context: _Context) -> pb.JoinResponse:
        """A place, and the granted rank."""
        _agree(request.protocol, request.protocol)
        spec = _spec_of(request.spec)  # at once: nobody else's turn comes while entries beyond the limit are here
        profile = Profile(
            max_rank=request.profile.max_rank,
            num_examples=request.profile.num_examples,
            device=plain(request.profile.device, _MAX_DEVICE_CHARS),
            memory_bytes=request.profile.memory_bytes,
            examples_per_second=request.profile.examples_per_second,
            software_version=plain(request.software_version, _MAX_WORD_CHARS),
            measured=_measured(request.profile),
            evaluates_only=request.profile.evaluates_only,
            num_eval_examples=request.profile.num_eval_examples,
        )
        caller = present_caller()
        if caller is not None and caller.is_registered:
            await self._service.make_way(request.client_id, request.enrol_key)
        client = await self._service.join(
            request.client_id, request.enrol_key, profile, spec, request.base_model_digest
        )
        manifest = self._service.foundation.known_manifest
        lease_ttl_seconds = self._service.config.rounds.lease_ttl_seconds
        reach("join.answering")
        return pb.JoinResponse(
            lora_rank=client.rank,
            rank_reason=client.rank_reason,
            manifest_digest=manifest.digest,
            heartbeat_seconds=min(lease_ttl_seconds / 3, _LONGEST_HEARTBEAT_SECONDS),
            lease_ttl_seconds=lease_ttl_seconds,
            chunk_bytes=CHUNK_BYTES,
            wire_dtype=manifest.adapter.wire_dtype,
            status_sentence=self._service.explanation(),
        )

    async def PollTask(self, request: pb.PollTaskRequest, context: _Context) -> pb.PollTaskResponse:
        """Work, as soon as there is some."""
        task = await self._service.next_task(
            request.client_id, request.enrol_key, request.wait_seconds, request.session
        )
        if task is not None:
            reach("task.answering")
        return pb.PollTaskResponse(
            task=None if task is None else self._message_of(task),
            finished=self._service.engine.state.phase is Phase.FINISHED,
            # Why there is none; the sentence looks at the whole cohort, and a cohort asks in the same moment.
            status_sentence="" if task is not None else self._service.explanation(),
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: _Context) -> pb.HeartbeatResponse:
        """Whether to go on."""
        await self._service.known_member(request.client_id, request.enrol_key)
        self._service.sessions.hear(request.client_id, request.session, self._service.engine.now)
        said = request.progress
        train_loss = said.train_loss if math.isfinite(said.train_loss) else 0.0
        progress = Progress(plain(said.activity, _MAX_WORD_CHARS), said.step, said.total_steps, train_loss)
        goes_on = self._service.holds_lease(request.client_id, request.lease_token, progress)
        directive = pb.LEASE_DIRECTIVE_CONTINUE if goes_on else pb.LEASE_DIRECTIVE_STOP
        return pb.HeartbeatResponse(directive=directive)

    async def DownloadAdapter(self, request: pb.DownloadAdapterRequest, context: _Context) -> AsyncIterator[Any]:
        """The slice's bytes from an offset, as Chunks (see streams.py)."""
        digest = await self._service.slice_path(request.client_id, request.enrol_key, request.digest)
        content = chunks_of(self._service.blobs.open(digest), request.offset)
        number_bytes = self._service.foundation.known_manifest.adapter.wire_dtype.number_bytes
        async with aclosing(one_ahead(as_wanted(content, request.encodings, number_bytes))) as chunks:
            async for chunk in chunks:
                self._service.counters.bytes_sent += len(chunk.data)
                self._service.engine.hear(request.client_id)
                yield chunk

    async def BeginUpload(self, request: pb.BeginUploadRequest, context: _Context) -> pb.BeginUploadResponse:
        """Where to go on."""
        committed = await self._service.intake.begin_upload(
            request.client_id,
            request.enrol_key,
            request.lease_token,
            BlobReference(request.blob.digest, request.blob.size_bytes),
        )
        reach("begin.answering")
        return pb.BeginUploadResponse(committed_bytes=committed, encodings=[pb.CONTENT_ENCODING_BYTE_PLANES])

    async def UploadAdapter(self, request: AsyncIterator[Any], context: _Context) -> pb.UploadAdapterResponse:
        """Takes Chunks (see streams.py); the metadata says of what and from where."""
        said = _metadata_of(context)
        try:
            offset = _offset_in(said["raflora-offset"])
            client_id, enrol_key = said["raflora-client-id"], said["raflora-enrol-key"]
            who = (own_client_id(client_id), own_enrol_key(enrol_key), said["raflora-digest"])
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"upload: the call's metadata lacks or garbles {error}") from None
        async with aclosing(data_of(request, who[0], self._service.counters)) as chunks:
            committed = await self._service.intake.receive(*who, offset, chunks)
        reach("upload.answering")
        return pb.UploadAdapterResponse(committed_bytes=committed)

    async def QueryUpload(self, request: pb.QueryUploadRequest, context: _Context) -> pb.QueryUploadResponse:
        """How much is durable."""
        committed = await self._service.intake.committed_bytes(request.client_id, request.enrol_key, request.digest)
        return pb.QueryUploadResponse(committed_bytes=committed)

    async def SubmitUpdate(self, request: pb.SubmitUpdateRequest, context: _Context) -> pb.SubmitUpdateResponse:
        """Commits an upload to the round."""
        update = Update(
            digest=request.blob.digest,
            size_bytes=request.blob.size_bytes,
            num_examples=request.num_examples,
            metrics=_metrics_of(request),
            training_seconds=request.training_seconds,
        )
        submission = SubmitUpdate(
            client_id=request.client_id,
            lease_token=request.lease_token,
            number=request.round,
            attempt=request.attempt,
            slice_digest=request.slice_digest,
            update=update,
        )
        outcome = await self._service.intake.submit_update(submission, request.enrol_key)
        reach("update.answering")
        return pb.SubmitUpdateResponse(outcome=_OUTCOMES[outcome])

    async def SubmitEvaluation(
        self, request: pb.SubmitEvaluationRequest, context: _Context
    ) -> pb.SubmitEvaluationResponse:
        """Commits an evaluation."""
        submission = SubmitEvaluation(
            client_id=request.client_id,
            lease_token=request.lease_token,
            number=request.round,
            attempt=request.attempt,
            slice_digest=request.slice_digest,
            evaluation=Evaluation(request.num_examples, _metrics_of(request)),
        )
        outcome = await self._service.intake.submit_evaluation(submission, request.enrol_key)
        reach("evaluation.answering")
        return pb.SubmitEvaluationResponse(outcome=_OUTCOMES[outcome])

    async def FailTask(self, request: pb.FailTaskRequest, context: _Context) -> pb.FailTaskResponse:
        """Takes a task back."""
        reason, message = request.reason[:MAX_FAILURE_CHARS], request.message[:MAX_FAILURE_CHARS]
        failure = f"{reason}: {message}" if message else reason
        again = await self._service.fail_task(request.client_id, request.enrol_key, request.lease_token, failure)
        reach("failure.answering")
        return pb.FailTaskResponse(will_retry=again)

    async def Leave(self, request: pb.LeaveRequest, context: _Context) -> pb.LeaveResponse:
        """Good-bye."""
        await self._service.leave(request.client_id, request.enrol_key)
        reach("leave.answering")
        return pb.LeaveResponse()

    def _evaluation(self) -> pb.EvaluationPlan:
        wanted = self._service.config.evaluation
        return pb.EvaluationPlan(
            method=wanted.method,
            max_new_tokens=wanted.max_new_tokens if wanted.method == "generation" else 0,
            match=wanted.match,
            max_examples=wanted.max_examples,
        )

    def _message_of(self, task: Task) -> pb.Task:
        training = task.plan.training
        return pb.Task(
            kind=_KINDS[task.kind],
            round=task.number,
            attempt=task.attempt,
            lease_token=task.lease_token,
            lora_rank=task.rank,
            scaling=task.scaling,
            adapter=pb.BlobReference(digest=task.slice.digest, size_bytes=task.slice.size_bytes),
            plan=pb.TrainingPlan(
                learning_rate=task.plan.learning_rate,
                local_steps=training.local_steps,
                local_epochs=training.local_epochs,
                batch_size=training.batch_size,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                warmup_steps=training.warmup_steps,
                seed=task.plan.seed,
                freezes_lora_a=task.plan.freezes_lora_A,
                lora_dropout=training.lora_dropout,
            ),
            evaluation=self._evaluation() if task.kind is Kind.EVALUATE else None,
            deadline_seconds=task.deadline_seconds,
            manifest_digest=self._service.foundation.known_manifest.digest,
        )


def _measured(profile: pb.RankProfile) -> Measured | None:
    if not profile.HasField("measured"):
        return None
    measured = profile.measured
    return Measured(
        base_bytes=measured.base_bytes,
        bytes_per_rank=measured.bytes_per_rank,
        micro_batch=measured.micro_batch,
        quantization=plain(measured.quantization, _MAX_WORD_CHARS),
    )


def _agree(lowest: int, highest: int) -> int:
    """The newest protocol that both sides speak. Raises ProtocolTooOld."""
    if highest < PROTOCOL_OLDEST or lowest > PROTOCOL:
        raise ProtocolTooOld(
            f"the worker speaks protocol {lowest} to {highest}, this coordinator {PROTOCOL_OLDEST} to {PROTOCOL}; "
            f"upgrade the {'worker' if highest < PROTOCOL_OLDEST else 'coordinator'}"
        )
    return min(highest, PROTOCOL)


def _metadata_of(context: _Context) -> dict[str, str]:
    """Our own keys. Raises InvalidRequest for one that stands twice: two readers could take two different values."""
    said: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if str(key) in said and str(key).startswith("raflora-"):
            raise InvalidRequest(f"upload: the metadata key {key} stands twice")
        said[str(key)] = str(value)
    return said


def _offset_in(text: str) -> int:
    if not _OFFSET.fullmatch(text):
        raise ValueError(f"offset {text[:40]!r}")
    return int(text)


def _metrics_of(request: pb.SubmitUpdateRequest | pb.SubmitEvaluationRequest) -> dict[str, float]:
    if len(request.metrics) > MAX_METRICS:  # before anything is made of them
        raise InvalidRequest(f"{len(request.metrics)} metrics; at most {MAX_METRICS} are accepted")
    return dict(request.metrics)


def _spec_of(message: pb.AdapterSpec) -> AdapterSpec:
    entries, axes = len(message.modules) + len(message.tensors), max((len(t.shape) for t in message.tensors), default=0)
    if entries > MAX_TENSORS or axes > MAX_AXES:  # before anything is made of them
        raise InvalidRequest(
            f"adapter spec: {entries} entries of up to {axes} axes; at most {MAX_TENSORS} of {MAX_AXES} are accepted"
        )
    return AdapterSpec(
        tuple(ModuleShape(m.name, m.out_features, m.in_features) for m in message.modules),
        tuple(TensorShape(t.name, tuple(t.shape)) for t in message.tensors),
    )
