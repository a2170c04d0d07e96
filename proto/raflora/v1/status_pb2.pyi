from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_WAITING_FOR_SPEC: _ClassVar[Phase]
    PHASE_WAITING_FOR_CLIENTS: _ClassVar[Phase]
    PHASE_TRAINING: _ClassVar[Phase]
    PHASE_AGGREGATING: _ClassVar[Phase]
    PHASE_EVALUATING: _ClassVar[Phase]
    PHASE_FINISHED: _ClassVar[Phase]

class AssignmentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASSIGNMENT_STATE_UNSPECIFIED: _ClassVar[AssignmentState]
    ASSIGNMENT_STATE_WAITING: _ClassVar[AssignmentState]
    ASSIGNMENT_STATE_WORKING: _ClassVar[AssignmentState]
    ASSIGNMENT_STATE_DONE: _ClassVar[AssignmentState]
    ASSIGNMENT_STATE_FAILED: _ClassVar[AssignmentState]
PHASE_UNSPECIFIED: Phase
PHASE_WAITING_FOR_SPEC: Phase
PHASE_WAITING_FOR_CLIENTS: Phase
PHASE_TRAINING: Phase
PHASE_AGGREGATING: Phase
PHASE_EVALUATING: Phase
PHASE_FINISHED: Phase
ASSIGNMENT_STATE_UNSPECIFIED: AssignmentState
ASSIGNMENT_STATE_WAITING: AssignmentState
ASSIGNMENT_STATE_WORKING: AssignmentState
ASSIGNMENT_STATE_DONE: AssignmentState
ASSIGNMENT_STATE_FAILED: AssignmentState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: FederationStatus
    def __init__(self, status: _Optional[_Union[FederationStatus, _Mapping]] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: FederationStatus
    def __init__(self, status: _Optional[_Union[FederationStatus, _Mapping]] = ...) -> None: ...

class FederationStatus(_message.Message):
    __slots__ = ("federation", "software_version", "phase", "paused", "round", "num_rounds", "explanation", "method", "manifest_digest", "adapter_digest", "global_rank", "assignments", "quorum", "deadline_seconds", "last_round", "forecast", "bytes_sent", "bytes_received", "uptime_seconds", "clients_connected", "clients_known", "base_model", "task", "warnings", "security", "disk_bytes", "disk_free_bytes", "uploads_open", "best")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_RANK_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    FORECAST_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SECURITY_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_OPEN_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    federation: str
    software_version: str
    phase: Phase
    paused: bool
    round: int
    num_rounds: int
    explanation: str
    method: str
    manifest_digest: str
    adapter_digest: str
    global_rank: int
    assignments: _containers.RepeatedCompositeFieldContainer[AssignmentStatus]
    quorum: int
    deadline_seconds: float
    last_round: RoundSummary
    forecast: CollapseForecast
    bytes_sent: int
    bytes_received: int
    uptime_seconds: float
    clients_connected: int
    clients_known: int
    base_model: str
    task: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    security: str
    disk_bytes: int
    disk_free_bytes: int
    uploads_open: int
    best: BestAdapter
    def __init__(self, federation: _Optional[str] = ..., software_version: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., paused: _Optional[bool] = ..., round: _Optional[int] = ..., num_rounds: _Optional[int] = ..., explanation: _Optional[str] = ..., method: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., global_rank: _Optional[int] = ..., assignments: _Optional[_Iterable[_Union[AssignmentStatus, _Mapping]]] = ..., quorum: _Optional[int] = ..., deadline_seconds: _Optional[float] = ..., last_round: _Optional[_Union[RoundSummary, _Mapping]] = ..., forecast: _Optional[_Union[CollapseForecast, _Mapping]] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., clients_connected: _Optional[int] = ..., clients_known: _Optional[int] = ..., base_model: _Optional[str] = ..., task: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., security: _Optional[str] = ..., disk_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., uploads_open: _Optional[int] = ..., best: _Optional[_Union[BestAdapter, _Mapping]] = ...) -> None: ...

class BestAdapter(_message.Message):
    __slots__ = ("round", "digest", "metric", "value", "source", "evaluations_since", "patience")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_SINCE_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    round: int
    digest: str
    metric: str
    value: float
    source: str
    evaluations_since: int
    patience: int
    def __init__(self, round: _Optional[int] = ..., digest: _Optional[str] = ..., metric: _Optional[str] = ..., value: _Optional[float] = ..., source: _Optional[str] = ..., evaluations_since: _Optional[int] = ..., patience: _Optional[int] = ...) -> None: ...

class AssignmentStatus(_message.Message):
    __slots__ = ("client_id", "lora_rank", "state", "activity", "step", "total_steps", "train_loss", "silent_seconds", "late", "failures", "last_failure")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    lora_rank: int
    state: AssignmentState
    activity: str
    step: int
    total_steps: int
    train_loss: float
    silent_seconds: float
    late: bool
    failures: int
    last_failure: str
    def __init__(self, client_id: _Optional[str] = ..., lora_rank: _Optional[int] = ..., state: _Optional[_Union[AssignmentState, str]] = ..., activity: _Optional[str] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., train_loss: _Optional[float] = ..., silent_seconds: _Optional[float] = ..., late: _Optional[bool] = ..., failures: _Optional[int] = ..., last_failure: _Optional[str] = ...) -> None: ...

class CollapseForecast(_message.Message):
    __slots__ = ("smallest_rank", "largest_rank", "factor", "half_life_rounds", "sentence")
    SMALLEST_RANK_FIELD_NUMBER: _ClassVar[int]
    LARGEST_RANK_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    HALF_LIFE_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    smallest_rank: int
    largest_rank: int
    factor: float
    half_life_rounds: float
    sentence: str
    def __init__(self, smallest_rank: _Optional[int] = ..., largest_rank: _Optional[int] = ..., factor: _Optional[float] = ..., half_life_rounds: _Optional[float] = ..., sentence: _Optional[str] = ...) -> None: ...

class RoundSummary(_message.Message):
    __slots__ = ("round", "attempts", "adapter_digest", "partitions", "rho", "effective_rank", "rank_99", "energy", "energy_lost", "contributions", "evaluations", "accuracy", "eval_loss", "bytes_sent", "bytes_received", "training_seconds", "aggregation_seconds", "evaluation_seconds", "learning_rate", "train_loss", "rank_levels", "federated_metrics", "central_metrics", "certificate")
    class FederatedMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class CentralMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_RANK_FIELD_NUMBER: _ClassVar[int]
    RANK_99_FIELD_NUMBER: _ClassVar[int]
    ENERGY_FIELD_NUMBER: _ClassVar[int]
    ENERGY_LOST_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    EVAL_LOSS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TRAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    RANK_LEVELS_FIELD_NUMBER: _ClassVar[int]
    FEDERATED_METRICS_FIELD_NUMBER: _ClassVar[int]
    CENTRAL_METRICS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempts: int
    adapter_digest: str
    partitions: _containers.RepeatedCompositeFieldContainer[RankPartition]
    rho: float
    effective_rank: float
    rank_99: int
    energy: float
    energy_lost: float
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    evaluations: _containers.RepeatedCompositeFieldContainer[EvaluationSummary]
    accuracy: float
    eval_loss: float
    bytes_sent: int
    bytes_received: int
    training_seconds: float
    aggregation_seconds: float
    evaluation_seconds: float
    learning_rate: float
    train_loss: float
    rank_levels: _containers.RepeatedCompositeFieldContainer[RankLevelSummary]
    federated_metrics: _containers.ScalarMap[str, float]
    central_metrics: _containers.ScalarMap[str, float]
    certificate: AggregationCertificate
    def __init__(self, round: _Optional[int] = ..., attempts: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., partitions: _Optional[_Iterable[_Union[RankPartition, _Mapping]]] = ..., rho: _Optional[float] = ..., effective_rank: _Optional[float] = ..., rank_99: _Optional[int] = ..., energy: _Optional[float] = ..., energy_lost: _Optional[float] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., evaluations: _Optional[_Iterable[_Union[EvaluationSummary, _Mapping]]] = ..., accuracy: _Optional[float] = ..., eval_loss: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., training_seconds: _Optional[float] = ..., aggregation_seconds: _Optional[float] = ..., evaluation_seconds: _Optional[float] = ..., learning_rate: _Optional[float] = ..., train_loss: _Optional[float] = ..., rank_levels: _Optional[_Iterable[_Union[RankLevelSummary, _Mapping]]] = ..., federated_metrics: _Optional[_Mapping[str, float]] = ..., central_metrics: _Optional[_Mapping[str, float]] = ..., certificate: _Optional[_Union[AggregationCertificate, _Mapping]] = ...) -> None: ...

class AggregationCertificate(_message.Message):
    __slots__ = ("half_passes", "residual", "captured", "exact", "iterated", "dense")
    HALF_PASSES_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ITERATED_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    half_passes: int
    residual: float
    captured: float
    exact: int
    iterated: int
    dense: int
    def __init__(self, half_passes: _Optional[int] = ..., residual: _Optional[float] = ..., captured: _Optional[float] = ..., exact: _Optional[int] = ..., iterated: _Optional[int] = ..., dense: _Optional[int] = ...) -> None: ...

class RankPartition(_message.Message):
    __slots__ = ("low", "high", "energy_share", "contributors", "effective_contributors", "rounds_uncovered")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    ENERGY_SHARE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_UNCOVERED_FIELD_NUMBER: _ClassVar[int]
    low: int
    high: int
    energy_share: float
    contributors: int
    effective_contributors: float
    rounds_uncovered: int
    def __init__(self, low: _Optional[int] = ..., high: _Optional[int] = ..., energy_share: _Optional[float] = ..., contributors: _Optional[int] = ..., effective_contributors: _Optional[float] = ..., rounds_uncovered: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("client_id", "lora_rank", "num_examples", "digest", "size_bytes", "train_loss", "training_seconds")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    lora_rank: int
    num_examples: int
    digest: str
    size_bytes: int
    train_loss: float
    training_seconds: float
    def __init__(self, client_id: _Optional[str] = ..., lora_rank: _Optional[int] = ..., num_examples: _Optional[int] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., train_loss: _Optional[float] = ..., training_seconds: _Optional[float] = ...) -> None: ...

class RankLevelSummary(_message.Message):
    __slots__ = ("lora_rank", "clients", "num_examples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    lora_rank: int
    clients: int
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, lora_rank: _Optional[int] = ..., clients: _Optional[int] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class EvaluationSummary(_message.Message):
    __slots__ = ("client_id", "lora_rank", "num_examples", "metrics", "central")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CENTRAL_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    lora_rank: int
    num_examples: int
    metrics: _containers.ScalarMap[str, float]
    central: bool
    def __init__(self, client_id: _Optional[str] = ..., lora_rank: _Optional[int] = ..., num_examples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., central: _Optional[bool] = ...) -> None: ...

class ListRoundsRequest(_message.Message):
    __slots__ = ("page_size", "after_round")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    after_round: int
    def __init__(self, page_size: _Optional[int] = ..., after_round: _Optional[int] = ...) -> None: ...

class ListRoundsResponse(_message.Message):
    __slots__ = ("rounds", "more")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    rounds: _containers.RepeatedCompositeFieldContainer[RoundSummary]
    more: bool
    def __init__(self, rounds: _Optional[_Iterable[_Union[RoundSummary, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class ListClientsRequest(_message.Message):
    __slots__ = ("page_size", "after_client_id")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    AFTER_CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    after_client_id: str
    def __init__(self, page_size: _Optional[int] = ..., after_client_id: _Optional[str] = ...) -> None: ...

class ListClientsResponse(_message.Message):
    __slots__ = ("clients", "more")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[ClientSummary]
    more: bool
    def __init__(self, clients: _Optional[_Iterable[_Union[ClientSummary, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class ClientSummary(_message.Message):
    __slots__ = ("client_id", "max_rank", "lora_rank", "device", "memory_bytes", "num_examples", "membership", "silent_seconds", "rounds_contributed", "software_version", "last_failure", "slice_bytes", "organisation", "rank_reason", "evaluates_only", "quantization", "examples_per_second", "micro_batch")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    SLICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORGANISATION_FIELD_NUMBER: _ClassVar[int]
    RANK_REASON_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    max_rank: int
    lora_rank: int
    device: str
    memory_bytes: int
    num_examples: int
    membership: str
    silent_seconds: float
    rounds_contributed: int
    software_version: str
    last_failure: str
    slice_bytes: int
    organisation: str
    rank_reason: str
    evaluates_only: bool
    quantization: str
    examples_per_second: float
    micro_batch: int
    def __init__(self, client_id: _Optional[str] = ..., max_rank: _Optional[int] = ..., lora_rank: _Optional[int] = ..., device: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., num_examples: _Optional[int] = ..., membership: _Optional[str] = ..., silent_seconds: _Optional[float] = ..., rounds_contributed: _Optional[int] = ..., software_version: _Optional[str] = ..., last_failure: _Optional[str] = ..., slice_bytes: _Optional[int] = ..., organisation: _Optional[str] = ..., rank_reason: _Optional[str] = ..., evaluates_only: _Optional[bool] = ..., quantization: _Optional[str] = ..., examples_per_second: _Optional[float] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class FetchAdapterRequest(_message.Message):
    __slots__ = ("lora_rank", "digest", "offset", "best")
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    lora_rank: int
    digest: str
    offset: int
    best: bool
    def __init__(self, lora_rank: _Optional[int] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ..., best: _Optional[bool] = ...) -> None: ...

class FetchAdapterResponse(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: AdapterHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[AdapterHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AdapterHeader(_message.Message):
    __slots__ = ("digest", "size_bytes", "lora_rank", "scaling", "round", "base_model", "base_model_digest", "task", "modules", "modules_to_save", "labels")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    MODULES_TO_SAVE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    lora_rank: int
    scaling: float
    round: int
    base_model: str
    base_model_digest: str
    task: str
    modules: _containers.RepeatedScalarFieldContainer[str]
    modules_to_save: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., lora_rank: _Optional[int] = ..., scaling: _Optional[float] = ..., round: _Optional[int] = ..., base_model: _Optional[str] = ..., base_model_digest: _Optional[str] = ..., task: _Optional[str] = ..., modules: _Optional[_Iterable[str]] = ..., modules_to_save: _Optional[_Iterable[str]] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...
