"""What a site decides: where the coordinator is, which model, which data, and what it will not do."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.logs import LogFormat
from common.settings import Section
from common.tracking import TrackingConfig

LAYER_PATTERN = r"^[A-Za-z0-9_*?-]+(\.[A-Za-z0-9_*?-]+)*$"  # * and ? stand for anything, matched in linear time
LAYER_NAME = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"  # no pattern language: what has one may run for ever
Probability = Annotated[float, Field(gt=0, lt=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LayerName = Annotated[str, Field(pattern=LAYER_NAME)]
KNOWN_TASKS = ("sequence-classification", "image-classification", "feature-classification", "causal-lm")
TaskName = Annotated[str, Field(pattern=f"^({'|'.join(KNOWN_TASKS)})$")]


class TlsConfig(Section):
    """Files in PEM form."""

    ca_file: Path | None = None
    """The authority that signed the coordinator's certificate; unset: the system's."""
    certificate_file: Path | None = None
    """This worker's certificate, if the coordinator asks for one."""
    key_file: Path | None = None
    """The key of that certificate."""


class CoordinatorAddress(Section):
    """Where the coordinator listens."""

    address: str = "127.0.0.1:7070"
    """HOST:PORT."""
    insecure: bool = False
    """Speak in the clear to an address outside this machine (a private network, a tunnel)."""
    join_token: str = Field(default="", repr=False, exclude=True)  # a secret: in no log, and not for the trainer
    """What `raflora site add` printed: with it the worker gets a certificate of its own, once; renewed by itself."""
    join_token_file: Path | None = None
    """The same in a file."""
    tls: TlsConfig | None = None
    """Certificates of an authority of yours. Unset, and no join token, on loopback: in the clear."""
    rpc_timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    """For every small call."""
    encoding: Literal["identity", "byte-planes"] = "identity"
    """How factors travel; byte-planes: lossless, a third fewer bytes in bfloat16, for links below some 20 MB/s."""


class ModelConfig(Section):
    """The base model; nothing of it is ever downloaded from the coordinator."""

    path: str
    """A local folder or a hub id."""
    revision: str | None = None
    """A hub commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights in memory, auto: the checkpoint's, or bfloat16 beside quantised ones. Factors: float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of the frozen weights in memory, through bitsandbytes: pip install "raflora[quantized]"."""
    gradient_checkpointing: bool = False
    """Less memory for activations, about a third more time for a step."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; auto takes a GPU if there is one."""
    offline: bool = False
    """Touch no network when loading the model or the data."""


class DataConfig(Section):
    """This site's data; it never leaves."""

    train: str = ""
    """A jsonl, csv or parquet file, or a hub data set's id; an evaluator needs none."""
    test: str | None = None
    """The same for evaluation; unset: a part of the training data is held out. An evaluator needs it."""
    holdout: Probability = 0.1
    """That part."""
    subset: str | None = None
    """A hub data set's configuration name."""
    train_split: str = "train"
    """Of a hub data set."""
    test_split: str = "test"
    """Of a hub data set, if `test` names one."""
    text_column: str = "text"
    """For sequence classification."""
    text_pair_column: str | None = None
    """A second sentence, if the task has one."""
    image_column: str = "image"
    """For image classification: a PNG or JPEG (bytes, or a path beside the file), or rows of grey values."""
    feature_column: str = "features"
    """For feature classification: a list of numbers, or for token features a list of such lists."""
    label_column: str = "label"
    """A class's number or its name."""
    format: Literal["auto", "prompt-response", "messages", "text"] = "auto"
    """For language models: which columns a record has; auto looks at the first record."""
    prompt_column: str = "prompt"
    """For language models: what the model is given; no loss on it."""
    response_column: str = "response"
    """For language models: what it should answer; loss on this alone."""
    messages_column: str = "messages"
    """For language models: a list of {"role", "content"}; loss on the assistant's turns alone."""
    prompt_template: str = "{prompt}"
    """For prompt and response without a chat template: {prompt} stands for the column's text."""
    chat: bool = False
    """Prompt and response as two turns through the tokenizer's chat template."""
    choices_column: str = "choices"
    """For evaluation by choice: a list of possible answers, or of which `answer_column` names the right one."""
    answer_column: str = "answer"
    """For evaluation by choice: the right one's number, letter (A, B, ...) or text."""
    packing: bool = False
    """For language models: several examples in one sequence of max_length."""
    max_length: int = Field(default=256, ge=8, le=131_072)
    """Tokens a text is cut to; an example of a language model whose answer would be cut away is left out, and told."""
    max_examples: int | None = Field(default=None, ge=1)
    """Use no more than so many."""


class SitePolicy(Section):
    """The site's last word: what is outside is refused, whatever the coordinator asks. Lists: unset any, [] none."""

    allowed_federations: tuple[str, ...] | None = None
    """Names of federations."""
    allowed_manifests: tuple[Digest, ...] | None = None
    """Digests of whole manifests, as `raflora status` shows them: pins model, layers, method and rounds."""
    allowed_base_models: tuple[Digest, ...] | None = None
    """Digests of the weights, whatever the models are called."""
    allowed_tasks: tuple[TaskName, ...] | None = None
    """Kinds of task."""
    allowed_target_modules: tuple[LayerName, ...] | None = None
    """Layers that LoRA may go on: a name or the end of one; "query" allows "attention.query" too, not "all-linear"."""
    allowed_modules_to_save: tuple[LayerName, ...] | None = None
    """Layers that may be trained, and sent, whole: likewise."""
    max_rank: int = Field(default=4096, ge=1)
    """The largest LoRA rank."""
    max_update_bytes: int = Field(default=1 << 30, ge=1)
    """The largest update that leaves, and slice that comes in; told by rank and layers before the first byte."""
    max_local_steps: int = Field(default=100_000, ge=1)
    """Optimizer steps of one task."""
    max_learning_rate: float = Field(default=1.0, gt=0)
    """Of one task."""
    max_task_seconds: float = Field(default=86_400.0, gt=0)
    """A task whose training, download or upload runs longer is stopped and given back."""
    max_tasks_per_day: int | None = Field(default=None, ge=0)
    """Updates and evaluations within any 24 hours; counted from egress.jsonl, so a restart forgets none."""
    max_updates: int | None = Field(default=None, ge=0)
    """Updates in all; likewise."""
    max_evaluations: int | None = Field(default=None, ge=0)
    """Evaluations in all; likewise."""
    min_examples: int = Field(default=1, ge=1)
    """A site with fewer training examples (an evaluator: test examples) does not join; fewer are not evaluated."""
    max_new_tokens: int = Field(default=4096, ge=0)
    """Tokens that one generated answer of an evaluation may take; 0: nothing is generated."""
    may_send_metrics: bool = True
    """Whether losses and accuracies leave; if not, there is no evaluation for anybody and no loss in a sign of life."""
    require_offline: bool = False
    """Refuse to start unless model.offline is set."""


class LaunchConfig(Section):
    """Several GPUs of this machine, or of several, for one worker: the agent launches the group, one process talks."""

    processes: int = Field(default=1, ge=1, le=1024)
    """Training processes on this machine, a GPU each (torchrun); 1: no group."""
    accelerate_config: Path | None = None
    """A file of `accelerate config` for multi-GPU or FSDP (no DeepSpeed); it says how many processes there are."""
    command: tuple[str, ...] = ()
    """A launcher of your own (srun, mpirun, ...): what stands before `python -m worker.trainer`."""
    shard_base: bool = False
    """Each process keeps a part of the frozen base, for one that does not fit one GPU (FSDP); slower. Not quantised."""

    @property
    def is_group(self) -> bool:
        """Whether there is more than one process."""
        return self.processes > 1 or self.accelerate_config is not None or bool(self.command)


class WorkerConfig(Section):
    """One worker of one site: `raflora worker --config worker.toml`."""

    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,99})?$")
    """The client id; unset: the host's name."""
    rank: int = Field(default=0, ge=0, le=4096)
    """The largest LoRA rank that this machine can train; 0: what `raflora probe` proposed here."""
    evaluator: bool = False
    """Train nothing: evaluate every adapter on this site's test data, for the operator. Its rank 0: the global rank."""
    state_dir: Path = Path("worker-state")
    """Part files, the enrolment key and a sign of life; survives a restart."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for training; 0: as many as there are cores."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples that fit into memory at once; the rest of a batch is accumulated. Unset: the whole batch."""
    log_format: LogFormat = "text"
    """text or json."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is worth a line."""
    coordinator: CoordinatorAddress = CoordinatorAddress()
    model: ModelConfig
    data: DataConfig
    launch: LaunchConfig = LaunchConfig()
    tracking: TrackingConfig = TrackingConfig()
    policy: SitePolicy = SitePolicy()
    policy_file: Path | None = None
    """The same keys as [policy] in a file of its own, for whoever answers for the data; the stricter of both holds."""

    @model_validator(mode="after")
    def _rank_is_within_policy(self) -> "WorkerConfig":
        if self.rank > self.policy.max_rank:
            raise ValueError(f"rank {self.rank} is above the site policy's max_rank {self.policy.max_rank}")
        return self

    @model_validator(mode="after")
    def _base_can_be_sharded(self) -> "WorkerConfig":
        if self.launch.shard_base and self.model.quantization != "none":
            raise ValueError(
                f'launch.shard_base and model.quantization = "{self.model.quantization}": quantised weights cannot be '
                "sharded; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _data_is_what_the_work_needs(self) -> "WorkerConfig":
        if self.evaluator and not self.data.test:
            raise ValueError("an evaluator needs data.test: a file, or a hub data set's id, to evaluate adapters on")
        if not self.evaluator and not self.data.train:
            raise ValueError("data.train is needed: a file or a hub data set's id to train on; or set evaluator = true")
        return self

    def rank_in(self, global_rank: int) -> int:
        """The largest rank to offer a federation of that global rank; an evaluator without its own offers it all."""
        if self.evaluator and not self.rank:
            return min(self.policy.max_rank, global_rank)
        return self.rank
