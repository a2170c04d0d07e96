"""What a researcher decides: `raflora simulate experiment.toml`. Settings only; nothing here trains or reads data.

An experiment is a base model, data, a population of clients with ranks, and arms: what is compared. Every arm runs
with every seed. With a [tuning] section every arm first runs every rate and schedule of the same grid, judged on the
clients' validation parts alone, and then also with its own best.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from common.errors import ConfigError
from common.settings import Section, explained
from coordinator.config import MethodConfig, Rank, TrainingConfig

ARM_SECTIONS = ("model", "data", "clients", "rounds", "training")  # whose settings an arm may change
Decay = Literal["linear", "cosine", "constant"]


class ModelSection(Section):
    """The frozen base model, and where LoRA goes."""

    path: str
    """A folder, a hub id, "minilm" (comes with the extra `text`) or "digits" (the demo's own base model)."""
    task: Literal["sequence-classification", "image-classification"]
    """What is trained."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """PEFT's target_modules. With class_name_head: names in the trained layers, or ignored if trained_layers is 0."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside LoRA (a new classification head)."""
    class_name_head: bool = False
    """Text only: a frozen head made of the labels' own names, embedded by the same encoder; only LoRA is trained."""
    trained_layers: int = Field(default=0, ge=0)
    """With class_name_head: the encoder's top layers that are run in training; those below run once for every text.
    0: all layers run once, and LoRA goes on an identity map between the encoder and the head."""
    revision: str | None = None
    """Of a hub model."""
    offline: bool = False
    """Never ask the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


class DataSection(Section):
    """Texts or images with labels; divided among the clients by [clients]."""

    folder: Path | None = None
    """Where relative paths begin; unset: the environment's RAFLORA_DATA, or else the experiment file's folder."""
    train: str
    """A jsonl, csv or parquet file, a hub data set, or "digits"."""
    test: str
    """What accuracies are measured on. Never chooses anything: rates are chosen on the validation parts."""
    text_column: str = "text"
    """Of text tasks."""
    image_column: str = "image"
    """Of image tasks."""
    label_column: str = "label"
    """Holds a class's number or name."""
    labels: tuple[str, ...] = ()
    """The classes' names in the order of their numbers."""
    labels_file: Path | None = None
    """The same as a JSON list in a file."""
    max_train: int = Field(default=0, ge=0)
    """A random part of the training file, the same for every seed; 0: all."""
    max_test: int = Field(default=0, ge=0)
    """Likewise."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Of every client's examples, held out of its training; what tuning is judged on."""
    max_length: int = Field(default=64, ge=8)
    """Tokens a text."""

    @model_validator(mode="after")
    def _labels_are_given_once(self) -> "DataSection":
        if self.train != "digits" and bool(self.labels) == (self.labels_file is not None):
            raise ValueError("give either labels or labels_file")
        return self


class ClientsSection(Section):
    """Who takes part: how the data is divided, and who can afford which rank."""

    count: int = Field(ge=1, le=100_000)
    """Clients."""
    partition: Literal["dirichlet", "shards", "natural", "iid"] = "dirichlet"
    """dirichlet: each label's shares drawn from Dirichlet(alpha); shards: so many runs of the label-sorted data each;
    natural: by group_column or groups_file; iid: at random."""
    alpha: float = Field(default=0.5, gt=0)
    """Of dirichlet: small means that clients see few labels."""
    shards_per_client: int = Field(default=2, ge=1)
    """Of shards."""
    group_column: str = ""
    """Of natural: a column of the training file; the clients are divided evenly among its values."""
    groups_file: Path | None = None
    """Of natural: a JSON object of group names to lists of label names."""
    min_examples: int = Field(default=8, ge=1)
    """Nobody holds fewer."""
    ranks: tuple[Rank, ...] = Field(min_length=1)
    """The LoRA ranks that clients can afford."""
    rank_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """How many clients of each, in proportion; empty: equally many."""
    rank_order: Literal["random", "by-examples"] = "random"
    """by-examples: who holds more data can afford more."""
    per_round: int = Field(ge=1)
    """Clients invited to a round, drawn anew each time."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The chance that an invited client never answers."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ClientsSection":
        if self.rank_weights and (len(self.rank_weights) != len(self.ranks) or sum(self.rank_weights) <= 0):
            raise ValueError(f"rank_weights {list(self.rank_weights)}: one for each of ranks {list(self.ranks)}")
        if self.per_round > self.count:
            raise ValueError(f"per_round {self.per_round}, but there are {self.count} clients")
        if self.partition == "natural" and bool(self.group_column) == (self.groups_file is not None):
            raise ValueError("partition 'natural' needs either group_column or groups_file")
        return self


class RoundsSection(Section):
    """How long it goes on."""

    num_rounds: int = Field(ge=1, le=100_000)
    """Of every run."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """The share of the invited that must answer; below it the round is repeated."""
    evaluate_every: int = Field(default=5, ge=1)
    """Rounds between evaluations at the global rank; after the last round every rank level is evaluated."""


class Arm(MethodConfig):
    """One thing that is compared: a method, or a reference, or the same method in another setting."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9._ =+-]+$")
    """In tables and plots."""
    rank: int = Field(default=0, ge=0)
    """Set: all clients have this rank (a reference)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of model, data, clients, rounds or training that are others for this arm: "clients.alpha" = 0.1."""


class TuningSection(Section):
    """The same grid for every arm, judged on the clients' validation parts."""

    learning_rates: tuple[Annotated[float, Field(gt=0, le=10)], ...] = ()
    """Empty: no tuning."""
    decays: tuple[Decay, ...] = ("linear",)
    """Schedules over the rounds."""
    seeds: tuple[int, ...] = (100,)
    """Others than the experiment's, so that no choice is made on a partition that is reported."""


class ExperimentConfig(Section):
    """One experiment: `raflora simulate experiment.toml`."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9._-]+$")
    """Of the results' folder."""
    description: str = ""
    """For the report."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Each draws partition, ranks, cohorts, initial factors and batches anew."""
    model: ModelSection
    data: DataSection
    clients: ClientsSection
    rounds: RoundsSection
    training: TrainingConfig
    """As in a coordinator's settings; the rate and schedule that are the same for every arm."""
    arms: tuple[Arm, ...] = Field(min_length=1)
    """What is compared."""
    tuning: TuningSection = TuningSection()
    without_gpu: dict[str, Any] = Field(default_factory=dict)
    """Settings that are others where torch sees no GPU: "rounds.num_rounds" = 2, for a variant that a CPU can run."""

    @model_validator(mode="after")
    def _arms_are_told_apart(self) -> "ExperimentConfig":
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"two arms have the same name: {sorted(names)}")
        return self

    def for_arm(self, arm: Arm) -> "ExperimentConfig":
        """The experiment as this arm sees it. Raises ConfigError for settings that it cannot have."""
        changes = dict(arm.set)
        for key in changes:
            if key.split(".")[0] not in ARM_SECTIONS or "." not in key:
                raise ConfigError(
                    f"arm {arm.name!r}: {key}: an arm may set what is in {', '.join(ARM_SECTIONS)}, "
                    'such as "clients.alpha"; the rest is the same for all arms'
                )
        if arm.rank:
            changes |= {"clients.ranks": (arm.rank,), "clients.rank_weights": ()}
        return self._with(changes, f"arm {arm.name!r}")

    def on_cpu(self) -> "ExperimentConfig":
        """The experiment where there is no GPU. Raises ConfigError likewise."""
        return self._with(self.without_gpu, "without_gpu")

    def _with(self, changes: Mapping[str, Any], whose: str) -> "ExperimentConfig":
        content = self.model_dump()
        for key, value in changes.items():
            place: Any = content
            *sections, last = key.split(".")
            for section in sections:
                place = place.get(section)
                if not isinstance(place, dict):
                    raise ConfigError(f"{whose}: {key}: there is no such section")
            place[last] = value
        try:
            return ExperimentConfig.model_validate(content)
        except ValidationError as error:
            raise ConfigError(explained(error, whose, ExperimentConfig)) from None
