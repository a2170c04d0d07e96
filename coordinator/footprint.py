"""What one training step holds in a worker's memory, from shapes and dtypes alone.

Arithmetic on numbers that `raflora spec` writes; nothing here loads a model, and nothing here is measured.
What is exact and what is an estimate stands at each figure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from common.adapter import AdapterSpec, numbers_of
from common.errors import ConfigError

FLOAT32_BYTES = 4  # of a trained number: factors, gradients and both moments of Adam are float32
ADAM_MOMENTS = 2
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of one weight of a linear layer that bitsandbytes quantised. Of 4 bits every 64 share a scale of one byte, and
# every 256 scales a float32 (double quantisation).
QUANTIZED_BYTES: Mapping[str, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + FLOAT32_BYTES / (64 * 256)}
FRAMEWORK_BYTES = 600 << 20  # of the CUDA context and the libraries' kernels and workspaces; an order of magnitude

# Bytes that a transformer layer keeps for its backward pass, per token and hidden unit, in 16 bits and without the
# matrix of attention weights (arXiv 2205.05198, section 4.1; twice of it in float32).
_LAYER_BYTES = 34
_LAYER_INPUT_BYTES = 2  # what checkpointing keeps of a layer instead
# Per token and word of the vocabulary: 16-bit logits, float32 logits, their log-softmax, its gradient.
_LOGITS_BYTES = 14
# Of the logits of one part in float32; the worker (its MAX_LOGITS_BYTES) makes more of them in tiles.
MAX_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base model; 0 stands for what is not."""

    parameters: int = 0
    linear_parameters: int = 0  # of them, in linear layers other than the head: what quantisation shrinks
    hidden_size: int = 0
    layers: int = 0
    vocabulary: int = 0
    tokens: int = 0  # of every example, where the model fixes it (patches of an image)
    dtype: str = ""  # of the checkpoint
    model_type: str = ""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> Self:
        """The object "base" that `raflora spec` writes; what a later version adds is left. Raises ConfigError."""
        found: dict[str, Any] = {}
        for name in ("parameters", "linear_parameters", "hidden_size", "layers", "vocabulary", "tokens"):
            value = fields.get(name, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{where}: base.{name} is {value!r}; a whole number is expected")
            found[name] = value
        return cls(**found, dtype=str(fields.get("dtype", "")), model_type=str(fields.get("model_type", "")))


@dataclass(frozen=True)
class StepSetting:
    """How a worker trains, as far as it decides about memory."""

    micro_batch: int
    tokens: int  # of an example
    dtype: str = "bfloat16"  # of the frozen weights
    quantization: str = "none"
    checkpoints_gradients: bool = False
    is_language_model: bool = False
    freezes_lora_A: bool = False


@dataclass(frozen=True)
class Footprint:
    """The parts of a worker's memory in a training step, in bytes."""

    factors_bytes: int  # exact: lora_A, lora_B and what is trained whole, in float32
    gradient_bytes: int  # exact
    adam_bytes: int  # exact
    base_bytes: int  # exact without quantisation; 0: the base model is not known
    activation_bytes: int  # an estimate; 0: not known
    is_base_exact: bool

    @property
    def trained_bytes(self) -> int:
        """16 bytes a trained number: the number, its gradient, two moments."""
        return self.factors_bytes + self.gradient_bytes + self.adam_bytes

    @property
    def is_known(self) -> bool:
        """Whether there is a total at all."""
        return self.base_bytes > 0 and self.activation_bytes > 0

    @property
    def total_bytes(self) -> int:
        """Everything together, an estimate as its least certain part is; 0: not known."""
        if not self.is_known:
            return 0
        return self.trained_bytes + self.base_bytes + self.activation_bytes + FRAMEWORK_BYTES


def footprint_of(spec: AdapterSpec, rank: int, base: BaseFacts, setting: StepSetting) -> Footprint:
    """What a step at this rank holds."""
    trained = trained_numbers(spec, rank, freezes_lora_A=setting.freezes_lora_A)
    return Footprint(
        factors_bytes=FLOAT32_BYTES * numbers_of(spec, rank),
        gradient_bytes=FLOAT32_BYTES * trained,
        adam_bytes=ADAM_MOMENTS * FLOAT32_BYTES * trained,
        base_bytes=_base_bytes(base, setting),
        activation_bytes=_activation_bytes(spec, rank, base, setting),
        is_base_exact=setting.quantization == "none",
    )


def trained_numbers(spec: AdapterSpec, rank: int, *, freezes_lora_A: bool = False) -> int:
    """How many numbers have a gradient."""
    frozen = rank * sum(module.in_features for module in spec.modules) if freezes_lora_A else 0
    return numbers_of(spec, rank) - frozen


def lora_numbers(spec: AdapterSpec, rank: int) -> int:
    """How many of an adapter's numbers are in lora_A and lora_B."""
    return rank * sum(module.out_features + module.in_features for module in spec.modules)


def _base_bytes(base: BaseFacts, setting: StepSetting) -> int:
    each = DTYPE_BYTES[setting.dtype]
    if setting.quantization == "none":
        return each * base.parameters
    shrunk = QUANTIZED_BYTES[setting.quantization] * base.linear_parameters
    return round(shrunk) + each * (base.parameters - base.linear_parameters)


def _activation_bytes(spec: AdapterSpec, rank: int, base: BaseFacts, setting: StepSetting) -> int:
    """What the backward pass needs again; attention is taken to keep no matrix of weights (SDPA, flash).

    A language model's logits count 3.5 times (in 16 bits, in float32, their log-softmax, its gradient), but never as
    more than 3.5 times MAX_LOGITS_BYTES, 896 MiB: more of them are made in tiles.
    """
    if not (base.hidden_size and base.layers):
        return 0
    tokens = setting.micro_batch * (base.tokens or setting.tokens)
    wide = DTYPE_BYTES[setting.dtype] // 2  # twice as much in float32
    layer_bytes = _LAYER_BYTES * wide * base.hidden_size
    # PEFT hands lora_A its input in float32, a copy for every adapted layer, and keeps lora_A's output.
    adapted_bytes = FLOAT32_BYTES * sum(module.in_features + rank for module in spec.modules)
    if setting.checkpoints_gradients:
        kept = base.layers * _LAYER_INPUT_BYTES * wide * base.hidden_size + layer_bytes + adapted_bytes // base.layers
    else:
        kept = base.layers * layer_bytes + adapted_bytes
    logits = tokens * base.vocabulary if setting.is_language_model else 0
    return tokens * kept + _LOGITS_BYTES * min(logits, MAX_LOGITS_BYTES // FLOAT32_BYTES)
