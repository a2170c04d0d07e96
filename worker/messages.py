"""What worker and coordinator tell each other, as values. Nothing here knows protobuf or gRPC.

Text that the coordinator sends is cleaned as it comes in, so that no log line and no terminal ever obeys it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from common.adapter import AdapterSpec
from common.plain import plain
from worker.trainer_protocol import EvaluationPlan, Plan

MAX_TEXT_CHARACTERS = 1000  # of anything that the coordinator says and a person may read


def printable(text: str, longest: int = MAX_TEXT_CHARACTERS) -> str:
    """As common.plain has it, of what the coordinator says."""
    return plain(text, longest)


class TaskKind(Enum):
    """What a task asks for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class Outcome(Enum):
    """What became of a submission; all of these are normal life."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the same again after a lost answer; it counts once
    STALE = "stale"
    SUPERSEDED = "superseded"  # a newer lease of the task exists
    ROUND_CLOSED = "round_closed"


@dataclass(frozen=True)
class ModelRequest:
    """What the federation trains."""

    base_model: str
    base_model_digest: str  # empty until it is fixed
    task: str
    labels: tuple[str, ...]
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    global_rank: int
    seed: int

    def __post_init__(self) -> None:
        # A name for people: what is loaded, the site's own settings say.
        object.__setattr__(self, "base_model", printable(self.base_model))


@dataclass(frozen=True)
class Welcome:
    """The answer to the handshake."""

    protocol: int
    federation: str
    model: ModelRequest
    batch_size: int = 0  # of the rounds to come, for whoever measures before; 0: not told
    lora_dropout: float = 0.0
    rank_levels: tuple[int, ...] = ()  # that ranks are granted from; empty: the operator's policy has none
    memory_share: float = 0.0  # of a device's memory that a training step may take; 0: not told


@dataclass(frozen=True)
class MemoryMeasurement:
    """What a dry training step took here: a straight line over the rank (raflora.v1.MemoryMeasurement)."""

    base_bytes: int
    bytes_per_rank: int
    micro_batch: int
    quantization: str


@dataclass(frozen=True)
class RankProfile:
    """What this client can afford and holds."""

    max_rank: int
    device: str
    memory_bytes: int
    num_examples: int  # of training; of an evaluator, of its test data
    examples_per_second: float = 0.0  # 0: not measured
    measured: MemoryMeasurement | None = None
    evaluates_only: bool = False
    num_eval_examples: int = 0  # 0: not told


@dataclass(frozen=True)
class Enrolment:
    """What a client shows to get a place."""

    protocol: int
    profile: RankProfile
    base_model_digest: str
    spec: AdapterSpec


@dataclass(frozen=True)
class Place:
    """A place in the federation."""

    lora_rank: int
    manifest_digest: str
    heartbeat_seconds: float
    wire_dtype: str
    status_sentence: str
    rank_reason: str = ""  # why this rank

    def __post_init__(self) -> None:
        object.__setattr__(self, "status_sentence", printable(self.status_sentence))
        object.__setattr__(self, "rank_reason", printable(self.rank_reason))


@dataclass(frozen=True)
class Blob:
    """Bytes by content."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Task:
    """One order, held by a lease."""

    kind: TaskKind
    round: int
    attempt: int
    lease_token: int
    lora_rank: int
    scaling: float
    adapter: Blob
    plan: Plan
    manifest_digest: str
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifest_digest", printable(self.manifest_digest))


@dataclass(frozen=True)
class Polled:
    """The answer to a poll: at most one task."""

    tasks: tuple[Task, ...]
    is_finished: bool
    status_sentence: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "status_sentence", printable(self.status_sentence))


@dataclass(frozen=True)
class Progress:
    """Where the work on a task stands."""

    activity: str
    step: int = 0
    total_steps: int = 0
    train_loss: float = 0.0


@dataclass(frozen=True)
class Update:
    """What a client commits after training."""

    task: Task
    blob: Blob
    num_examples: int
    metrics: Mapping[str, float]
    training_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What a client commits after evaluating."""

    task: Task
    num_examples: int
    metrics: Mapping[str, float]
