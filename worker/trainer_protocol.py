"""What the agent and its trainer process say to each other: one JSON object a line over two pipes.

Bytes of adapters go through files, never through the pipes. Nothing here imports torch or grpc.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from common.errors import InvalidRequest

LOSS, GENERATION, CHOICE = METHODS = ("loss", "generation", "choice")  # of an evaluation
EXACT, LAST_NUMBER = MATCHES = ("exact", "last-number")  # when a generated answer is right
SOCKET_OPTION = "--socket"  # what a process of a group is given besides: where process 0 finds the agent
MAX_LINE_BYTES = 4 << 20  # a spec of thousands of modules fits; anything longer is not ours


@dataclass(frozen=True)
class ModelOrder:
    """The coordinator's half of what to load; the site's config has the other half (paths, device)."""

    task: str  # one of worker.config.KNOWN_TASKS
    labels: tuple[str, ...]
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    lora_rank: int  # the largest that this worker will be asked for
    seed: int


@dataclass(frozen=True)
class Plan:
    """How to train in one round (raflora.v1.TrainingPlan)."""

    learning_rate: float
    local_steps: int  # 0: use local_epochs
    local_epochs: float
    batch_size: int
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    seed: int
    freezes_lora_A: bool = False  # lora_B alone is trained; lora_A goes back bit for bit
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class EvaluationPlan:
    """How to evaluate (raflora.v1.EvaluationPlan)."""

    method: str = LOSS  # one of METHODS
    max_new_tokens: int = 0  # of one generated answer
    match: str = EXACT  # one of MATCHES
    max_examples: int = 0  # the first so many of a seeded order, the same in every round; 0: all


@dataclass(frozen=True)
class Load:
    """First request: load the base model and the data, inject LoRA, measure nothing yet."""

    config_json: str  # the WorkerConfig as JSON: the trainer reads no file and no environment of its own
    order: ModelOrder
    federation: str = ""  # for the trainer's log


@dataclass(frozen=True)
class Train:
    """Train the slice in `slice_path` and write the trained factors to `update_path` in the wire dtype."""

    slice_path: str
    update_path: str
    lora_rank: int
    scaling: float
    wire_dtype: str
    plan: Plan


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the slice in `slice_path` on the local test data."""

    slice_path: str
    lora_rank: int
    scaling: float
    wire_dtype: str
    plan: EvaluationPlan = EvaluationPlan()


@dataclass(frozen=True)
class DryRun:
    """Measure some training steps on made-up examples; loads the base model alone, unless the last one did so."""

    config_json: str  # as in Load
    order: ModelOrder
    lora_rank: int
    micro_batch: int
    steps: int  # the first few are warm-up
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class Stop:
    """Drop the task that is being worked on; its answer, Failed("stopped") or the real one, is the only answer."""


@dataclass(frozen=True)
class Loaded:
    """Answer to Load."""

    base_model_digest: str
    modules: tuple[tuple[str, int, int], ...]  # name, out_features, in_features
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    num_examples: int
    device: str
    memory_bytes: int
    num_test_examples: int = 0  # the policy counts them; of an evaluator the same as num_examples


@dataclass(frozen=True)
class ProgressMade:
    """While it works; may come any number of times."""

    activity: str
    step: int
    total_steps: int
    train_loss: float


@dataclass(frozen=True)
class Trained:
    """Answer to Train; the update lies in its file."""

    num_examples: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """Answer to Evaluate."""

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DryRunDone:
    """Answer to DryRun."""

    peak_bytes: int  # the most memory at one time
    seconds_per_step: float
    base_model_digest: str
    largest_rank: int  # that the adapted layers are wide enough for
    device: str
    memory_bytes: int  # of the device


@dataclass(frozen=True)
class Failed:
    """Answer to anything that could not be done; the trainer lives on unless it says `fatal`."""

    reason: (
        str  # one word: "out_of_memory", "data_error", "model_error", "diverged", "adapter_mismatch", "stopped", ...
    )
    message: str
    fatal: bool = False


Request: TypeAlias = Load | Train | Evaluate | DryRun | Stop
Answer: TypeAlias = Loaded | ProgressMade | Trained | Evaluated | DryRunDone | Failed


def to_line(message: Request | Answer) -> bytes:
    """One message as one line."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}, allow_nan=False).encode() + b"\n"


def request_from_line(line: bytes) -> Request:
    """The agent's message. Raises InvalidRequest if it is none."""
    content = _content_of(line)
    try:
        return _request(content.pop("kind"), content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"trainer: a request with other fields than expected: {error}") from None


def answer_from_line(line: bytes) -> Answer:
    """The trainer's message. Raises InvalidRequest if it is none."""
    content = _content_of(line)
    try:
        return _answer(content.pop("kind"), content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"trainer: an answer with other fields than expected: {error}") from None


def _content_of(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequest(f"trainer: a line of {len(line)} bytes; at most {MAX_LINE_BYTES} are read")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequest("trainer: a line that is not JSON") from None
    if not isinstance(content, dict) or "kind" not in content:
        raise InvalidRequest("trainer: a line that is no message")
    return content


def _request(kind: object, content: dict[str, Any]) -> Request:
    match kind:
        case "Load":
            return Load(order=_order(content.pop("order")), **content)
        case "DryRun":
            return DryRun(order=_order(content.pop("order")), **content)
        case "Train":
            return Train(plan=Plan(**content.pop("plan")), **content)
        case "Evaluate":
            return Evaluate(plan=EvaluationPlan(**content.pop("plan")), **content)
        case "Stop":
            return Stop(**content)
        case other:
            raise InvalidRequest(f"trainer: unknown request {other!r}")


def _order(fields: dict[str, Any]) -> ModelOrder:
    read: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return ModelOrder(**read)


def _answer(kind: object, content: dict[str, Any]) -> Answer:
    match kind:
        case "Loaded":
            modules = tuple((name, out, into) for name, out, into in content.pop("modules"))
            tensors = tuple((name, tuple(shape)) for name, shape in content.pop("tensors"))
            return Loaded(modules=modules, tensors=tensors, **content)
        case "ProgressMade":
            return ProgressMade(**content)
        case "Trained":
            return Trained(**content)
        case "Evaluated":
            return Evaluated(**content)
        case "DryRunDone":
            return DryRunDone(**content)
        case "Failed":
            return Failed(**content)
        case other:
            raise InvalidRequest(f"trainer: unknown answer {other!r}")
