"""The worker's values and the messages of federation.proto: one into the other, and nothing else."""

from collections.abc import Mapping

from raflora.v1 import federation_pb2 as pb

from common.adapter import AdapterSpec
from common.chunk_message import Chunk, chunk_in
from common.codec import WireDtype
from common.errors import InvalidRequest
from worker.messages import Blob, Enrolment, ModelRequest, Outcome, Place, RankProfile, Task, TaskKind, Welcome
from worker.trainer_protocol import EvaluationPlan, Plan


def welcome_of(answer: pb.HandshakeResponse) -> Welcome:
    """The answer to a handshake."""
    return Welcome(
        protocol=answer.protocol,
        federation=answer.federation,
        model=ModelRequest(
            base_model=answer.model.base_model,
            base_model_digest=answer.model.base_model_digest,
            task=answer.model.task,
            labels=tuple(answer.model.labels),
            target_modules=tuple(answer.model.target_modules),
            modules_to_save=tuple(answer.model.modules_to_save),
            global_rank=answer.model.global_rank,
            seed=answer.model.seed,
        ),
        batch_size=answer.batch_size,
        lora_dropout=answer.lora_dropout,
        rank_levels=tuple(answer.rank_levels),
        memory_share=answer.memory_share,
    )


def join_request(enrolment: Enrolment, me: Mapping[str, str], software_version: str) -> pb.JoinRequest:
    """A request for a place; `me` is the client id and its enrolment key."""
    return pb.JoinRequest(
        protocol=enrolment.protocol,
        client_id=me["client_id"],
        enrol_key=me["enrol_key"],
        profile=_profile(enrolment.profile),
        base_model_digest=enrolment.base_model_digest,
        spec=_spec(enrolment.spec),
        software_version=software_version,
    )


def place_of(answer: pb.JoinResponse) -> Place:
    """The answer to it."""
    return Place(
        lora_rank=answer.lora_rank,
        manifest_digest=answer.manifest_digest,
        heartbeat_seconds=answer.heartbeat_seconds,
        wire_dtype=answer.wire_dtype,
        status_sentence=answer.status_sentence,
        rank_reason=answer.rank_reason,
    )


def _profile(profile: RankProfile) -> pb.RankProfile:
    message = pb.RankProfile(
        max_rank=profile.max_rank,
        device=profile.device,
        memory_bytes=profile.memory_bytes,
        num_examples=profile.num_examples,
        examples_per_second=profile.examples_per_second,
        evaluates_only=profile.evaluates_only,
        num_eval_examples=profile.num_eval_examples,
    )
    if profile.measured is not None:
        message.measured.base_bytes = profile.measured.base_bytes
        message.measured.bytes_per_rank = profile.measured.bytes_per_rank
        message.measured.micro_batch = profile.measured.micro_batch
        message.measured.quantization = profile.measured.quantization
    return message


def download_chunk_of(message: bytes) -> Chunk:
    """The chunk in a DownloadAdapterResponse. Raises DecodeError, of which gRPC makes a None in the stream."""
    chunk = chunk_in(message)
    if chunk is None:
        parsed = pb.DownloadAdapterResponse.FromString(message)
        chunk = Chunk.of_fields(parsed.data, parsed.planes)
    return chunk


def number_bytes_of(wire_dtype: str) -> int:
    """Of one number in a dtype that the coordinator named; 0 if nobody here knows it."""
    return WireDtype(wire_dtype).number_bytes if wire_dtype in set(WireDtype) else 0


def blob(blob: Blob) -> pb.BlobReference:
    """Bytes by content."""
    return pb.BlobReference(digest=blob.digest, size_bytes=blob.size_bytes)


def _spec(spec: AdapterSpec) -> pb.AdapterSpec:
    return pb.AdapterSpec(
        modules=[
            pb.ModuleShape(name=m.name, out_features=m.out_features, in_features=m.in_features) for m in spec.modules
        ],
        tensors=[pb.TensorShape(name=t.name, shape=t.shape) for t in spec.tensors],
    )


_KINDS = {pb.TASK_KIND_TRAIN: TaskKind.TRAIN, pb.TASK_KIND_EVALUATE: TaskKind.EVALUATE}
_OUTCOMES = {
    pb.SUBMIT_OUTCOME_ACCEPTED: Outcome.ACCEPTED,
    pb.SUBMIT_OUTCOME_DUPLICATE: Outcome.DUPLICATE,
    pb.SUBMIT_OUTCOME_STALE: Outcome.STALE,
    pb.SUBMIT_OUTCOME_SUPERSEDED: Outcome.SUPERSEDED,
    pb.SUBMIT_OUTCOME_ROUND_CLOSED: Outcome.ROUND_CLOSED,
}


def task_of(task: pb.Task) -> Task:
    """An order. Raises InvalidRequest for a kind that this version does not know."""
    if task.kind not in _KINDS:
        raise InvalidRequest(f"task of round {task.round}: kind {task.kind} is unknown to this version")
    plan = task.plan
    return Task(
        kind=_KINDS[task.kind],
        round=task.round,
        attempt=task.attempt,
        lease_token=task.lease_token,
        lora_rank=task.lora_rank,
        scaling=task.scaling,
        adapter=Blob(task.adapter.digest, task.adapter.size_bytes),
        plan=Plan(
            learning_rate=plan.learning_rate,
            local_steps=plan.local_steps,
            local_epochs=plan.local_epochs,
            batch_size=plan.batch_size,
            weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm,
            warmup_steps=plan.warmup_steps,
            seed=plan.seed,
            freezes_lora_A=plan.freezes_lora_a,
            lora_dropout=plan.lora_dropout,
        ),
        manifest_digest=task.manifest_digest,
        evaluation=EvaluationPlan(
            method=task.evaluation.method or "loss",
            max_new_tokens=task.evaluation.max_new_tokens,
            match=task.evaluation.match or "exact",
            max_examples=task.evaluation.max_examples,
        ),
    )


def outcome_of(outcome: pb.SubmitOutcome) -> Outcome:
    """What became of a submission."""
    if outcome not in _OUTCOMES:
        raise InvalidRequest(f"submission: outcome {outcome} is unknown to this version")
    return _OUTCOMES[outcome]
