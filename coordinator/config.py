"""What the operator decides: `raflora coordinator --config federation.toml`."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.codec import WireDtype
from common.logs import LogFormat
from common.settings import Section
from common.tracking import TrackingConfig
from coordinator.aggregation.method import MethodOptions, Shrinkage
from coordinator.federation.state import RankPolicy
from coordinator.lora_options import refusal_of

Rank = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
MAX_CERTIFICATE_DAYS = 398.0


class TlsConfig(Section):
    """Files in PEM form."""

    certificate_file: Path
    """The coordinator's certificate."""
    key_file: Path
    """Its key."""
    ca_file: Path | None = None
    """If set, every client must show a certificate of this authority."""


class IdentityConfig(Section):
    """Certificates that the coordinator issues itself; `raflora init` makes the folder."""

    folder: Path
    """The federation's own authority: its key, its sites, its join tokens. Nobody else may read it."""
    names: tuple[str, ...] = ("localhost", "127.0.0.1")
    """Host names and addresses by which workers reach the coordinator; they stand in its certificate."""
    certificate_days: float = Field(default=30.0, gt=0, le=MAX_CERTIFICATE_DAYS)
    """How long a certificate is good; workers renew theirs when a third of it is left."""


class ServerConfig(Section):
    """Where the coordinator listens; the only port that anybody must open."""

    listen: str = "127.0.0.1:7070"
    """HOST:PORT; port 0 takes a free one."""
    insecure: bool = False
    """Speak in the clear on an address that others can reach (a private network, a tunnel)."""
    identity: IdentityConfig | None = None
    """Mutual TLS with certificates of the federation's own authority: `raflora init` sets it up."""
    tls: TlsConfig | None = None
    """Mutual TLS with certificates of an authority of yours. Unset, and no identity, on loopback: in the clear."""
    reflection: bool = True
    """Let generic gRPC clients list and describe the services."""
    max_uploads: int = Field(default=64, ge=1, le=10_000)
    """Open uploads at one time; more are told to come back."""


class BaseModelConfig(Section):
    """The frozen model; it never passes through the coordinator."""

    base_model: str
    """Its name for people: a hub id, or what the folder is called."""
    base_model_digest: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """What `raflora spec` prints; empty: the first worker's, and all others must match it."""
    task: Literal["sequence-classification", "image-classification", "feature-classification", "causal-lm"]
    """What is trained."""
    labels: tuple[str, ...] = ()
    """The classes' names, in the order of their numbers; a language model has none."""

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> "BaseModelConfig":
        if self.task == "causal-lm" and self.labels:
            raise ValueError("labels: task 'causal-lm' has no classes; leave them out")
        if self.task != "causal-lm" and len(self.labels) < 2:
            raise ValueError(f"labels: task {self.task!r} needs the names of at least two classes")
        return self


class AdapterConfig(Section):
    """Which layers are adapted, and how LoRA is scaled."""

    target_modules: tuple[str, ...] = Field(min_length=1)
    """Names or name endings; * and ? stand for anything; ["all-linear"] for every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside LoRA (a new classification head); averaged by num_examples."""
    global_rank: Rank
    """Of the global adapter: the largest rank that anybody trains."""
    scaling: Literal["constant", "alpha_over_rank", "alpha_over_sqrt_rank"] = "constant"
    """The factor before lora_B lora_A: lora_alpha for everybody alike, lora_alpha / rank, or rsLoRA's."""
    lora_alpha: float = Field(default=1.0, gt=0)
    """See scaling."""
    wire_dtype: WireDtype = WireDtype.FLOAT32
    """How factors travel; bfloat16 halves the bytes and costs about 1e-3 in the product."""
    spec: Path | None = None
    """What `raflora spec` wrote; unset: the first worker that joins says it."""

    @model_validator(mode="before")
    @classmethod
    def _no_option_of_peft_is_lost_in_silence(cls, content: Any) -> Any:
        if refused := refusal_of(content if isinstance(content, dict) else ()):
            raise ValueError(refused)
        return content

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _layers_are_names_or_patterns(cls, layers: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        wild = "*?" if info.field_name == "target_modules" else ""
        for layer in layers:
            if not re.fullmatch(rf"[A-Za-z0-9_.{wild}-]+", layer):
                said = "; * and ? stand for anything, and there is no other pattern" if wild else ", not a pattern"
                raise ValueError(f"{layer!r}: a layer's name, or the end of one, is expected{said}")
        return layers


class RoundsConfig(Section):
    """When rounds open and close."""

    num_rounds: int = Field(ge=1, le=100_000)
    """The federation ends after so many."""
    min_clients: int = Field(default=2, ge=1)
    """No round opens with fewer active clients."""
    fraction: Share = 1.0
    """Of the active clients that a round invites; never fewer than min_clients."""
    quorum: float = Field(default=1.0, gt=0)
    """Updates that a round needs: a share of its cohort up to 1, a count above."""
    round_deadline_seconds: float = Field(default=3600.0, gt=0)
    """After it a round closes with its quorum; without one it is extended once, then opened anew."""
    lease_ttl_seconds: float = Field(default=90.0, ge=1)
    """A worker silent for so long counts as lost until it is heard again."""
    evaluate_every: int = Field(default=1, ge=0)
    """Rounds between evaluations of the global adapter by all clients; the last round always, 0 never."""
    max_failures: int = Field(default=2, ge=1)
    """Of one client in one round, then the round goes on without it."""
    max_attempts: int = Field(default=3, ge=1)
    """Of one round, then the federation pauses and says why."""
    max_clients: int = Field(default=10_000, ge=1, le=1_000_000)
    """That may ever join; more are refused."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Everything random derives from it."""


class RankRule(Section):
    """One line of the rank table."""

    client: str
    """A client id; * and ? stand for anything."""
    rank: Rank
    """What it is granted."""


_LEVELLED = (RankPolicy.CYCLE, RankPolicy.HARDWARE)


MAX_RANK_LEVELS = 64  # workers take no more


class RanksConfig(Section):
    """Who trains at which rank; never above what a client declares or the global rank."""

    policy: RankPolicy = RankPolicy.DECLARED
    """declared: the client's own; table: first matching rule; cycle: levels in turn; hardware: by measured memory."""
    table: tuple[RankRule, ...] = ()
    """For the policy table; who matches nothing gets what it declares."""
    levels: tuple[Rank, ...] = ()
    """For the policies cycle and hardware."""
    memory_share: Share = 0.9
    """hardware: of a client's memory that a training step may take, as `raflora probe` measured it."""

    @model_validator(mode="after")
    def _policy_has_its_data(self) -> "RanksConfig":
        if self.policy is RankPolicy.TABLE and not self.table:
            raise ValueError("policy 'table' needs at least one [[ranks.table]] entry")
        if self.policy in _LEVELLED and not self.levels:
            raise ValueError(f"policy '{self.policy.value}' needs levels, for example [2, 4, 8]")
        if len(set(self.levels)) > MAX_RANK_LEVELS:
            raise ValueError(f"{len(set(self.levels))} different levels; at most {MAX_RANK_LEVELS} are told to workers")
        if self.table and self.policy is not RankPolicy.TABLE:
            raise ValueError(f"a table is for policy 'table', but the policy is '{self.policy.value}'")
        if self.levels and self.policy not in _LEVELLED:
            raise ValueError(f"levels are for the policies cycle and hardware, but the policy is '{self.policy.value}'")
        return self


class MethodConfig(Section):
    """An aggregation method and its settings; a setting of another method is refused."""

    method: str = "raflora"
    """raflora, or a rival to compare it with: docs/methods.md lists them."""
    shrinkage: Shrinkage = "weight-floor"
    """raflora: how far a rank index moves towards its owners' mean; the default with weight_floor 0 is the paper."""
    weight_floor: float = Field(default=0.0, ge=0, le=1)
    """raflora's tau: bounds what a lone owner of a rank partition can do; 0 is the paper."""
    kappa: float = Field(default=1.0, ge=0)
    """raflora with shrinkage effective-owners: n_eff / (n_eff + kappa)."""
    energy_threshold: float = Field(default=0.99, gt=0, le=1)
    """florist: the share of the energy that its one rank for everybody keeps."""
    prune_share: float = Field(default=0.0, ge=0, lt=1)
    """hetlora: the share of its rank that a client may shrink to; 0: clients keep their ranks."""
    prune_penalty: float = Field(default=0.0, ge=0)
    """hetlora: weight of the loss term on the directions that pruning would cut off."""

    @property
    def options(self) -> MethodOptions:
        """For the aggregation."""
        return MethodOptions(
            name=self.method,
            shrinkage=self.shrinkage,
            weight_floor=self.weight_floor,
            kappa=self.kappa,
            energy_threshold=self.energy_threshold,
            prune_share=self.prune_share,
            prune_penalty=self.prune_penalty,
        )


class AggregationConfig(MethodConfig):
    """How updates become the next adapter."""

    processes: int = Field(default=0, ge=0, le=256)
    """Modules merged at one time, a process each; 0: in up to four threads of the coordinator."""


class TrainingConfig(Section):
    """What every client is told to do in a round."""

    learning_rate: float = Field(gt=0, le=10)
    """Of the first round."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Over the rounds; within a round the rate is constant."""
    final_fraction: float = Field(default=0.1, gt=0, le=1)
    """Of the learning rate, in the last round."""
    local_steps: int = Field(default=0, ge=0)
    """Optimizer steps a round; 0: local_epochs."""
    local_epochs: float = Field(default=1.0, gt=0)
    """Passes over the local data a round."""
    batch_size: int = Field(default=16, ge=1)
    """Examples a step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to it."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Of every round; the optimizer starts anew in each."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the input of lora_A, while training."""


class EvaluationConfig(Section):
    """How adapters are evaluated, which one is the best, and when to stop; may change with a restart."""

    method: Literal["loss", "generation", "choice"] = "loss"
    """loss: and accuracy, if there are classes; generation: exact match; choice: the likeliest of some answers."""
    max_new_tokens: int = Field(default=256, ge=1, le=32_768)
    """generation: of one answer."""
    match: Literal["exact", "last-number"] = "last-number"
    """generation: when an answer is right; last-number: as in GSM8K, "#### 42"."""
    max_examples: int = Field(default=0, ge=0)
    """Of a site's test data that are evaluated; 0: all."""
    metric: str = Field(default="", pattern=r"^([a-z][a-z0-9_]{0,62})?$")
    """What the best adapter is best in; unset: accuracy, exact_match or eval_loss, as task and method have it."""
    goal: Literal["auto", "maximize", "minimize"] = "auto"
    """auto: a loss is minimized, anything else maximized."""
    source: Literal["federated", "central"] = "federated"
    """Whose metric counts: the clients' own data, weighted by examples, or the evaluators'."""
    patience: int = Field(default=0, ge=0)
    """End after so many evaluations without an improvement; 0: never."""
    min_delta: float = Field(default=0.0, ge=0)
    """What is not better by more than this is no improvement."""

    def metric_of(self, task: str) -> str:
        """The metric that counts."""
        if self.metric:
            return self.metric
        if self.method == "loss":
            return "eval_loss" if task == "causal-lm" else "accuracy"
        return "exact_match" if self.method == "generation" else "accuracy"

    def is_larger_better(self, task: str) -> bool:
        """Whether more of the metric is better."""
        if self.goal == "auto":
            return not self.metric_of(task).endswith("loss")
        return self.goal == "maximize"


class OrganisationLimits(Section):
    """One line of the table of limits; the first that matches an organisation replaces the general ones it sets."""

    organisation: str = Field(min_length=1, max_length=200)
    """Its name; * and ? stand for anything. Without certificates every client is its own organisation."""
    max_examples: int | None = Field(default=None, ge=1)
    """See [limits]."""
    max_uploads: int | None = Field(default=None, ge=1)
    """See [limits]."""
    upload_bytes_per_day: int | None = Field(default=None, ge=1)
    """See [limits]."""


class LimitsConfig(Section):
    """What the coordinator takes from others; may change with a restart. Unset: no bound beyond those of the code."""

    max_examples: int | None = Field(default=None, ge=1)
    """num_examples that one client may claim for an update: its weight."""
    max_partition_norm: float | None = Field(default=None, gt=0)
    """Frobenius norm of an update within one rank partition, over all layers; a larger one is refused."""
    max_uploads: int = Field(default=4, ge=1)
    """Open uploads of one organisation at one time."""
    upload_bytes_per_day: int | None = Field(default=None, ge=1)
    """Bytes of updates that one organisation may announce in 24 hours of the federation's clock."""
    changes: int = Field(default=60, ge=10)
    """Records that one client may cause at once beyond its rounds' own (joining anew, failing); then one in 10 s."""
    disk_bytes: int | None = Field(default=None, ge=1)
    """Of the state folder; no upload begins that would make it larger."""
    min_free_bytes: int = Field(default=64 << 20, ge=0)
    """Kept free on the state folder's disk for the journal and the next adapter; uploads must leave it."""
    inspection_seconds: float = Field(default=120.0, gt=0)
    """The process that looks at an upload is ended after so long."""
    inspection_memory_bytes: int = Field(default=2 << 30, ge=256 << 20)
    """And cannot hold more than this."""
    adapter_bytes: int = Field(default=2 << 30, ge=1)
    """Of the global adapter that the first worker's layers may found; adapter.spec is not bound by it."""
    organisations: tuple[OrganisationLimits, ...] = ()
    """Other limits for some: [[limits.organisations]]."""

    @model_validator(mode="after")
    def _every_line_can_be_meant(self) -> "LimitsConfig":
        names = [row.organisation for row in self.organisations]
        for place, (name, row) in enumerate(zip(names, self.organisations, strict=True)):
            if not name.isprintable() or name != name.strip() or "[" in name:
                raise ValueError(f"organisations: {name!r} is no pattern; only * and ? stand for anything")
            earlier = next((other for other in names[:place] if fnmatchcase(name, other)), None)
            if earlier is not None:
                raise ValueError(f"organisations: {name!r} never counts, because {earlier!r} stands before it")
            if row.model_fields_set <= {"organisation"}:
                raise ValueError(f"organisations: {name!r} sets no limit")
        return self


class StoreConfig(Section):
    """What lies on disk."""

    journal: str = ""
    """A SQLAlchemy URL; empty: SQLite in state_dir."""
    keep_rounds: int = Field(default=5, ge=1)
    """Adapters of older rounds are deleted."""


class CoordinatorConfig(Section):
    """One federation: `raflora coordinator --config federation.toml`."""

    name: str = Field(default="federation", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    """Of the federation."""
    state_dir: Path = Path("coordinator-state")
    """Journal and blobs; a restart goes on from here."""
    export_dir: Path | None = None
    """The newest adapter as a PEFT folder, renewed after every round; the best one in its subfolder best."""
    log_format: LogFormat = "text"
    """text or json."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is worth a line."""
    server: ServerConfig = ServerConfig()
    model: BaseModelConfig
    adapter: AdapterConfig
    rounds: RoundsConfig
    ranks: RanksConfig = RanksConfig()
    aggregation: AggregationConfig = AggregationConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    limits: LimitsConfig = LimitsConfig()
    store: StoreConfig = StoreConfig()

    @model_validator(mode="after")
    def _numbers_fit_together(self) -> "CoordinatorConfig":
        rounds = self.rounds
        if rounds.quorum > 1 and rounds.quorum != int(rounds.quorum):
            raise ValueError(f"rounds.quorum {rounds.quorum}: a share up to 1, or a whole number of updates")
        if rounds.quorum > max(1, rounds.min_clients):
            raise ValueError(
                f"rounds.quorum {rounds.quorum:g} is above rounds.min_clients {rounds.min_clients}: "
                "a small cohort could never reach it"
            )
        if self.evaluation.patience and not rounds.evaluate_every:
            raise ValueError(
                f"evaluation.patience {self.evaluation.patience} counts evaluations, but rounds.evaluate_every is 0: "
                "no round is evaluated; set it to 1 or more, or patience to 0"
            )
        beyond = [rank for rank in self.ranks.levels if rank > self.adapter.global_rank]
        if beyond:
            raise ValueError(f"ranks.levels {beyond} are above adapter.global_rank {self.adapter.global_rank}")
        return self
