from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]

class SubmitOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUBMIT_OUTCOME_UNSPECIFIED: _ClassVar[SubmitOutcome]
    SUBMIT_OUTCOME_ACCEPTED: _ClassVar[SubmitOutcome]
    SUBMIT_OUTCOME_DUPLICATE: _ClassVar[SubmitOutcome]
    SUBMIT_OUTCOME_STALE: _ClassVar[SubmitOutcome]
    SUBMIT_OUTCOME_SUPERSEDED: _ClassVar[SubmitOutcome]
    SUBMIT_OUTCOME_ROUND_CLOSED: _ClassVar[SubmitOutcome]

class ContentEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTENT_ENCODING_UNSPECIFIED: _ClassVar[ContentEncoding]
    CONTENT_ENCODING_BYTE_PLANES: _ClassVar[ContentEncoding]

class LeaseDirective(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_DIRECTIVE_UNSPECIFIED: _ClassVar[LeaseDirective]
    LEASE_DIRECTIVE_CONTINUE: _ClassVar[LeaseDirective]
    LEASE_DIRECTIVE_STOP: _ClassVar[LeaseDirective]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
SUBMIT_OUTCOME_UNSPECIFIED: SubmitOutcome
SUBMIT_OUTCOME_ACCEPTED: SubmitOutcome
SUBMIT_OUTCOME_DUPLICATE: SubmitOutcome
SUBMIT_OUTCOME_STALE: SubmitOutcome
SUBMIT_OUTCOME_SUPERSEDED: SubmitOutcome
SUBMIT_OUTCOME_ROUND_CLOSED: SubmitOutcome
CONTENT_ENCODING_UNSPECIFIED: ContentEncoding
CONTENT_ENCODING_BYTE_PLANES: ContentEncoding
LEASE_DIRECTIVE_UNSPECIFIED: LeaseDirective
LEASE_DIRECTIVE_CONTINUE: LeaseDirective
LEASE_DIRECTIVE_STOP: LeaseDirective

class AdapterSpec(_message.Message):
    __slots__ = ("modules", "tensors")
    MODULES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    modules: _containers.RepeatedCompositeFieldContainer[ModuleShape]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorShape]
    def __init__(self, modules: _Optional[_Iterable[_Union[ModuleShape, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorShape, _Mapping]]] = ...) -> None: ...

class ModuleShape(_message.Message):
    __slots__ = ("name", "out_features", "in_features")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    in_features: int
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., in_features: _Optional[int] = ...) -> None: ...

class TensorShape(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("base_model", "base_model_digest", "task", "labels", "target_modules", "modules_to_save", "global_rank", "seed")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    MODULES_TO_SAVE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_RANK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    base_model_digest: str
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    modules_to_save: _containers.RepeatedScalarFieldContainer[str]
    global_rank: int
    seed: int
    def __init__(self, base_model: _Optional[str] = ..., base_model_digest: _Optional[str] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., target_modules: _Optional[_Iterable[str]] = ..., modules_to_save: _Optional[_Iterable[str]] = ..., global_rank: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "software_version")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    software_version: str
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., software_version: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("protocol", "software_version", "federation", "model", "wall_time_seconds", "batch_size", "lora_dropout", "rank_levels", "memory_share")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WALL_TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LORA_DROPOUT_FIELD_NUMBER: _ClassVar[int]
    RANK_LEVELS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_SHARE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software_version: str
    federation: str
    model: ModelRequest
    wall_time_seconds: float
    batch_size: int
    lora_dropout: float
    rank_levels: _containers.RepeatedScalarFieldContainer[int]
    memory_share: float
    def __init__(self, protocol: _Optional[int] = ..., software_version: _Optional[str] = ..., federation: _Optional[str] = ..., model: _Optional[_Union[ModelRequest, _Mapping]] = ..., wall_time_seconds: _Optional[float] = ..., batch_size: _Optional[int] = ..., lora_dropout: _Optional[float] = ..., rank_levels: _Optional[_Iterable[int]] = ..., memory_share: _Optional[float] = ...) -> None: ...

class RankProfile(_message.Message):
    __slots__ = ("max_rank", "device", "memory_bytes", "num_examples", "examples_per_second", "measured", "evaluates_only", "num_eval_examples")
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    NUM_EVAL_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    max_rank: int
    device: str
    memory_bytes: int
    num_examples: int
    examples_per_second: float
    measured: MemoryMeasurement
    evaluates_only: bool
    num_eval_examples: int
    def __init__(self, max_rank: _Optional[int] = ..., device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., num_examples: _Optional[int] = ..., examples_per_second: _Optional[float] = ..., measured: _Optional[_Union[MemoryMeasurement, _Mapping]] = ..., evaluates_only: _Optional[bool] = ..., num_eval_examples: _Optional[int] = ...) -> None: ...

class MemoryMeasurement(_message.Message):
    __slots__ = ("base_bytes", "bytes_per_rank", "micro_batch", "quantization")
    BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_RANK_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    base_bytes: int
    bytes_per_rank: int
    micro_batch: int
    quantization: str
    def __init__(self, base_bytes: _Optional[int] = ..., bytes_per_rank: _Optional[int] = ..., micro_batch: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "client_id", "enrol_key", "profile", "base_model_digest", "spec", "software_version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client_id: str
    enrol_key: str
    profile: RankProfile
    base_model_digest: str
    spec: AdapterSpec
    software_version: str
    def __init__(self, protocol: _Optional[int] = ..., client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., profile: _Optional[_Union[RankProfile, _Mapping]] = ..., base_model_digest: _Optional[str] = ..., spec: _Optional[_Union[AdapterSpec, _Mapping]] = ..., software_version: _Optional[str] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("lora_rank", "manifest_digest", "heartbeat_seconds", "lease_ttl_seconds", "chunk_bytes", "wire_dtype", "status_sentence", "rank_reason")
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_SENTENCE_FIELD_NUMBER: _ClassVar[int]
    RANK_REASON_FIELD_NUMBER: _ClassVar[int]
    lora_rank: int
    manifest_digest: str
    heartbeat_seconds: float
    lease_ttl_seconds: float
    chunk_bytes: int
    wire_dtype: str
    status_sentence: str
    rank_reason: str
    def __init__(self, lora_rank: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., heartbeat_seconds: _Optional[float] = ..., lease_ttl_seconds: _Optional[float] = ..., chunk_bytes: _Optional[int] = ..., wire_dtype: _Optional[str] = ..., status_sentence: _Optional[str] = ..., rank_reason: _Optional[str] = ...) -> None: ...

class PollTaskRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "wait_seconds", "session")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    wait_seconds: float
    session: str
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., wait_seconds: _Optional[float] = ..., session: _Optional[str] = ...) -> None: ...

class PollTaskResponse(_message.Message):
    __slots__ = ("task", "finished", "status_sentence")
    TASK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    STATUS_SENTENCE_FIELD_NUMBER: _ClassVar[int]
    task: Task
    finished: bool
    status_sentence: str
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., finished: _Optional[bool] = ..., status_sentence: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("kind", "round", "attempt", "lease_token", "lora_rank", "scaling", "adapter", "plan", "deadline_seconds", "manifest_digest", "evaluation")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    kind: TaskKind
    round: int
    attempt: int
    lease_token: int
    lora_rank: int
    scaling: float
    adapter: BlobReference
    plan: TrainingPlan
    deadline_seconds: float
    manifest_digest: str
    evaluation: EvaluationPlan
    def __init__(self, kind: _Optional[_Union[TaskKind, str]] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., lease_token: _Optional[int] = ..., lora_rank: _Optional[int] = ..., scaling: _Optional[float] = ..., adapter: _Optional[_Union[BlobReference, _Mapping]] = ..., plan: _Optional[_Union[TrainingPlan, _Mapping]] = ..., deadline_seconds: _Optional[float] = ..., manifest_digest: _Optional[str] = ..., evaluation: _Optional[_Union[EvaluationPlan, _Mapping]] = ...) -> None: ...

class EvaluationPlan(_message.Message):
    __slots__ = ("method", "max_new_tokens", "match", "max_examples")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    method: str
    max_new_tokens: int
    match: str
    max_examples: int
    def __init__(self, method: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., match: _Optional[str] = ..., max_examples: _Optional[int] = ...) -> None: ...

class BlobReference(_message.Message):
    __slots__ = ("digest", "size_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class TrainingPlan(_message.Message):
    __slots__ = ("learning_rate", "local_steps", "local_epochs", "batch_size", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "freezes_lora_a", "lora_dropout")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FREEZES_LORA_A_FIELD_NUMBER: _ClassVar[int]
    LORA_DROPOUT_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    local_steps: int
    local_epochs: float
    batch_size: int
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    seed: int
    freezes_lora_a: bool
    lora_dropout: float
    def __init__(self, learning_rate: _Optional[float] = ..., local_steps: _Optional[int] = ..., local_epochs: _Optional[float] = ..., batch_size: _Optional[int] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., warmup_steps: _Optional[int] = ..., seed: _Optional[int] = ..., freezes_lora_a: _Optional[bool] = ..., lora_dropout: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "lease_token", "progress", "session")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    lease_token: int
    progress: Progress
    session: str
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., lease_token: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., session: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("activity", "step", "total_steps", "train_loss")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    activity: str
    step: int
    total_steps: int
    train_loss: float
    def __init__(self, activity: _Optional[str] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., train_loss: _Optional[float] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("directive",)
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    directive: LeaseDirective
    def __init__(self, directive: _Optional[_Union[LeaseDirective, str]] = ...) -> None: ...

class DownloadAdapterRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "digest", "offset", "encodings")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    digest: str
    offset: int
    encodings: _containers.RepeatedScalarFieldContainer[ContentEncoding]
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ..., encodings: _Optional[_Iterable[_Union[ContentEncoding, str]]] = ...) -> None: ...

class DownloadAdapterResponse(_message.Message):
    __slots__ = ("data", "planes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    planes: bytes
    def __init__(self, data: _Optional[bytes] = ..., planes: _Optional[bytes] = ...) -> None: ...

class BeginUploadRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "lease_token", "blob")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    lease_token: int
    blob: BlobReference
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., lease_token: _Optional[int] = ..., blob: _Optional[_Union[BlobReference, _Mapping]] = ...) -> None: ...

class BeginUploadResponse(_message.Message):
    __slots__ = ("committed_bytes", "encodings")
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    committed_bytes: int
    encodings: _containers.RepeatedScalarFieldContainer[ContentEncoding]
    def __init__(self, committed_bytes: _Optional[int] = ..., encodings: _Optional[_Iterable[_Union[ContentEncoding, str]]] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("data", "planes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    planes: bytes
    def __init__(self, data: _Optional[bytes] = ..., planes: _Optional[bytes] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("committed_bytes",)
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    committed_bytes: int
    def __init__(self, committed_bytes: _Optional[int] = ...) -> None: ...

class QueryUploadRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "digest")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    digest: str
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class QueryUploadResponse(_message.Message):
    __slots__ = ("committed_bytes",)
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    committed_bytes: int
    def __init__(self, committed_bytes: _Optional[int] = ...) -> None: ...

class SubmitUpdateRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "lease_token", "round", "attempt", "blob", "slice_digest", "num_examples", "metrics", "training_seconds")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    SLICE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    lease_token: int
    round: int
    attempt: int
    blob: BlobReference
    slice_digest: str
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    training_seconds: float
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., lease_token: _Optional[int] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., blob: _Optional[_Union[BlobReference, _Mapping]] = ..., slice_digest: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., training_seconds: _Optional[float] = ...) -> None: ...

class SubmitUpdateResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: SubmitOutcome
    def __init__(self, outcome: _Optional[_Union[SubmitOutcome, str]] = ...) -> None: ...

class SubmitEvaluationRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "lease_token", "round", "attempt", "slice_digest", "num_examples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SLICE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    lease_token: int
    round: int
    attempt: int
    slice_digest: str
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., lease_token: _Optional[int] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., slice_digest: _Optional[str] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SubmitEvaluationResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: SubmitOutcome
    def __init__(self, outcome: _Optional[_Union[SubmitOutcome, str]] = ...) -> None: ...

class FailTaskRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key", "lease_token", "reason", "message")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    lease_token: int
    reason: str
    message: str
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ..., lease_token: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class FailTaskResponse(_message.Message):
    __slots__ = ("will_retry",)
    WILL_RETRY_FIELD_NUMBER: _ClassVar[int]
    will_retry: bool
    def __init__(self, will_retry: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("client_id", "enrol_key")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ENROL_KEY_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    enrol_key: str
    def __init__(self, client_id: _Optional[str] = ..., enrol_key: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
