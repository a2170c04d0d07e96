"""What `raflora probe` found on this machine: the file in the state folder, and whether it is still about this worker.

Reads and writes that one file; measures nothing and never imports torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog
from pydantic import Field, ValidationError

from common.errors import ConfigError
from common.settings import Section, explained
from common.transfer import write_durably
from worker.config import WorkerConfig
from worker.messages import MemoryMeasurement, Welcome
from worker.trainer_protocol import Loaded

FILE_NAME = "probe.json"
ADVICE = "run `raflora probe --config ...` or set rank"
_MEMORY_TOLERANCE = 0.02  # a driver or kernel of another version keeps a little more or less for itself

Quantization: TypeAlias = Literal["none", "8bit", "4bit"]

log = structlog.get_logger()


class Attempt(Section):
    """What a dry training step was tried with."""

    lora_rank: int = Field(ge=1)
    """The rank."""
    micro_batch: int = Field(ge=1)
    """Examples at one time."""
    quantization: Quantization = "none"
    """Of the base model."""
    gradient_checkpointing: bool = False
    """Whether activations were computed twice to save memory."""


class Measurement(Attempt):
    """What it took."""

    peak_bytes: int = Field(ge=0)
    """The most memory at one time: of the GPU what torch reserved, of a CPU the process's resident memory."""
    seconds_per_step: float = Field(gt=0)
    """The median, after warm-up."""

    @property
    def examples_per_second(self) -> float:
        """How fast this machine trains."""
        return self.micro_batch / self.seconds_per_step


class Failure(Attempt):
    """Why it could not be measured."""

    reason: str
    """In one word: out_of_memory, trainer_died, model_error, ..."""
    message: str
    """In a sentence."""


class Line(Section):
    """Peak memory as a straight line over the rank."""

    base_bytes: int = Field(ge=0)
    """At rank 0, by extrapolation: model, activations, the framework's own."""
    bytes_per_rank: int = Field(ge=0)
    """One more rank: factors, gradients, optimizer, activations of rank width."""
    deviation: float = Field(ge=0)
    """The most by which a rank between the two that gave the line was off it, as a share; 0 also if there was none."""

    def peak_bytes(self, rank: int) -> int:
        """At this rank."""
        return self.base_bytes + rank * self.bytes_per_rank


class Proposal(Attempt):
    """What this machine should train with."""

    examples_per_second: float = Field(gt=0)
    """As measured."""
    line: Line
    """At this micro-batch, quantization and checkpointing."""


class Probe(Section):
    """The file."""

    schema_version: Literal[1] = 1
    """Of this form."""
    base_model_digest: str
    """Of the weights that were loaded."""
    task: str
    """The federation's."""
    target_modules: tuple[str, ...]
    """The federation's."""
    modules_to_save: tuple[str, ...]
    """The federation's."""
    lora_dropout: float
    """The federation's."""
    batch_size: int
    """The federation's."""
    max_length: int
    """Of this worker's settings."""
    dtype: str
    """Likewise."""
    memory_batch: int | None
    """Likewise: batch_size, if it was set."""
    device: str
    """Where it was measured, as torch calls it."""
    memory_bytes: int = Field(ge=1)
    """Of that device."""
    memory_share: float = Field(gt=0, le=1)
    """What a step may take of it."""
    measurements: tuple[Measurement, ...]
    """All that were made, in that order."""
    failures: tuple[Failure, ...] = ()
    """What was tried and could not be done."""
    proposal: Proposal | None
    """None: nothing fits."""

    @property
    def limit_bytes(self) -> int:
        """The most that a step may take."""
        return int(self.memory_bytes * self.memory_share)

    def examples_per_second(self, rank: int) -> float:
        """At the next larger rank that was measured as proposed, else at the largest; 0 if there is none."""
        wanted = self.proposal
        if wanted is None:
            return 0.0
        alike = sorted((m for m in self.measurements if setting_of(m) == setting_of(wanted)), key=lambda m: m.lora_rank)
        larger = [m for m in alike if m.lora_rank >= rank]
        return (larger[0] if larger else alike[-1]).examples_per_second if alike else 0.0


@dataclass(frozen=True)
class Settled:
    """A worker's settings with a rank, and the probe behind it if there is one that is about this worker."""

    config: WorkerConfig
    probe: Probe | None
    takes_proposal: bool = False  # the settings leave the rank to the probe

    @property
    def measured(self) -> MemoryMeasurement | None:
        """What the profile says of memory."""
        if self.probe is None or self.probe.proposal is None:
            return None
        found = self.probe.proposal
        return MemoryMeasurement(
            found.line.base_bytes, found.line.bytes_per_rank, found.micro_batch, found.quantization
        )

    @property
    def examples_per_second(self) -> float:
        """What the profile says of speed; 0: not measured."""
        return self.probe.examples_per_second(self.config.rank) if self.probe is not None else 0.0

    def on(self, loaded: Loaded) -> "Settled":
        """The same for what the trainer has loaded: a probe of other weights or another device is told and left out.

        Raises ConfigError if the rank is that probe's.
        """
        if self.probe is None:
            return self
        why = _misfit_of_device(self.probe, loaded)
        if not why:
            return self
        if self.takes_proposal:
            raise ConfigError(f"rank = 0 means what `raflora probe` proposed here, but {why}; {ADVICE}")
        _tell(self.config.state_dir, why)
        return Settled(self.config, None)


def setting_of(attempt: Attempt) -> tuple[int, str, bool]:
    """Everything but the rank."""
    return attempt.micro_batch, attempt.quantization, attempt.gradient_checkpointing


def line_through(measurements: Sequence[Measurement]) -> Line:
    """The line through the smallest and the largest of at least two ranks, held against those between them.

    Memory never falls as the rank grows: where noise says so, the line is flat at the larger of the two.
    """
    found = sorted(measurements, key=lambda m: m.lora_rank)
    low, high = found[0], found[-1]
    if low.lora_rank == high.lora_rank:
        raise ValueError("a line needs two ranks")
    slope = max(0, round((high.peak_bytes - low.peak_bytes) / (high.lora_rank - low.lora_rank)))
    base = max(0, low.peak_bytes - slope * low.lora_rank, high.peak_bytes - slope * high.lora_rank)
    off = (abs(base + slope * m.lora_rank - m.peak_bytes) / max(1, m.peak_bytes) for m in found[1:-1])
    return Line(base_bytes=base, bytes_per_rank=slope, deviation=max(off, default=0.0))


def write_probe(state_dir: Path, probe: Probe) -> Path:
    """Puts the file in place of the one before; where it is."""
    path = state_dir / FILE_NAME
    write_durably(path, (json.dumps(probe.model_dump(mode="json"), indent=2) + "\n").encode())
    return path


def read_probe(path: Path) -> Probe | None:
    """What a file that `write_probe` left holds, None if there is no file. Raises ConfigError if it cannot be read."""
    again = "run `raflora probe` again where it was made"
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {again}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != 1:
        raise ConfigError(f"{path}: schema_version {version!r}, expected 1; {again}")
    try:
        return Probe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{explained(error, str(path), Probe)}; {again}") from None


def check_rank(config: WorkerConfig) -> None:
    """Raises ConfigError, before anything is asked or loaded, if nobody says at which rank this worker trains."""
    if config.rank or config.evaluator:
        return
    path = config.state_dir / FILE_NAME
    probe = read_probe(path)
    if probe is None:
        raise ConfigError(f"rank = 0 means what `raflora probe` proposed here, but there is no {path}; {ADVICE}")
    why = _misfit_of_settings(probe, config)
    if why:
        raise ConfigError(f"rank = 0 means what `raflora probe` proposed here, but {why}; {ADVICE}")


def settle(config: WorkerConfig, welcome: Welcome) -> Settled:
    """The settings with the rank, and no larger micro-batch than it, that the probe proposed.

    A probe that is about other settings or another federation is told and left out. Raises ConfigError if the rank
    is that probe's.
    """
    check_rank(config)
    if config.evaluator:
        return Settled(config, None)
    try:
        probe = read_probe(config.state_dir / FILE_NAME)
        why = "" if probe is None else _misfit_of_settings(probe, config) or _misfit_of_federation(probe, welcome)
    except ConfigError as error:
        probe, why = None, str(error)
    if why and not config.rank:
        raise ConfigError(f"rank = 0 means what `raflora probe` proposed here, but {why}; {ADVICE}")
    if why:
        _tell(config.state_dir, why)
    if why or probe is None or probe.proposal is None:
        return Settled(config, None)
    micro_batch = probe.proposal.micro_batch
    found = {
        "rank": config.rank or min(probe.proposal.lora_rank, config.policy.max_rank),
        "batch_size": min(config.batch_size or micro_batch, micro_batch),
    }
    return Settled(config.model_copy(update=found), probe, takes_proposal=not config.rank)


def _misfit_of_settings(probe: Probe, config: WorkerConfig) -> str:
    """Why the probe is not about a worker of these settings; empty if it is."""
    found = probe.proposal
    if found is None:
        return "the last probe found nothing that fits this machine"
    here: dict[str, tuple[object, object]] = {
        "model.quantization": (found.quantization, config.model.quantization),
        "model.gradient_checkpointing": (found.gradient_checkpointing, config.model.gradient_checkpointing),
        "model.dtype": (probe.dtype, config.model.dtype),
        "data.max_length": (probe.max_length, config.data.max_length),
    }
    # The proposal's own micro-batch may be written down in the settings afterwards.
    if config.batch_size not in (None, found.micro_batch):
        here["batch_size"] = (probe.memory_batch or found.micro_batch, config.batch_size)
    wanted = config.model.device
    if wanted != "auto" and _kind_of(wanted) != _kind_of(probe.device):
        here["model.device"] = (probe.device, wanted)
    return _difference(here, "the settings say")


def _misfit_of_federation(probe: Probe, welcome: Welcome) -> str:
    model = welcome.model
    asked: dict[str, tuple[object, object]] = {
        "task": (probe.task, model.task),
        "target_modules": (list(probe.target_modules), list(model.target_modules)),
        "modules_to_save": (list(probe.modules_to_save), list(model.modules_to_save)),
        "lora_dropout": (probe.lora_dropout, welcome.lora_dropout),
    }
    if model.base_model_digest:
        asked["base model"] = (probe.base_model_digest[:12], model.base_model_digest[:12])
    return _difference(asked, "the federation says")


def _misfit_of_device(probe: Probe, loaded: Loaded) -> str:
    if probe.base_model_digest != loaded.base_model_digest:
        here = {"base model": (probe.base_model_digest[:12], loaded.base_model_digest[:12])}
        return _difference(here, "this worker has loaded")
    if _kind_of(probe.device) != _kind_of(loaded.device):
        return _difference({"device": (probe.device, loaded.device)}, "this worker runs on")
    if abs(probe.memory_bytes - loaded.memory_bytes) > _MEMORY_TOLERANCE * probe.memory_bytes:
        return _difference({"memory_bytes": (probe.memory_bytes, loaded.memory_bytes)}, "this device has")
    return ""


def _difference(pairs: Mapping[str, tuple[object, object]], who: str) -> str:
    """The first pair whose halves differ, as a sentence; empty if none do."""
    for name, (probed, found) in pairs.items():
        if probed != found:
            return f"{FILE_NAME} was made with {name} = {probed}, and {who} {found}"
    return ""


def _kind_of(device: str) -> str:
    return device.partition(":")[0]


def _tell(state_dir: Path, why: str) -> None:
    log.warning("the probe's measurements are not sent", why=why, file=str(state_dir / FILE_NAME))
