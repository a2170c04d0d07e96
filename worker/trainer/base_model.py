"""The frozen base model: its folder, the digest of its weights, and the weights in memory.

Weights come from safetensors files only, code never comes with them, and nothing is newly initialised behind
anybody's back. LoRA is not here but in model.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, BitsAndBytesConfig

from worker.config import ModelConfig
from worker.trainer.fitting import is_out_of_memory
from worker.trainer.targets import is_linear, is_under, layers_of_the_base
from worker.trainer.task import ModelError
from worker.trainer.tasks import task_named
from worker.trainer_protocol import ModelOrder

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]  # configuration, tokenizer, weights
_NOT_INSIDE = ["*/*"]  # copies of the same weights in other formats lie in folders
_READ_BYTES = 1 << 20
_SHOWN = 5  # names in an error message
# With it a Linear4bit on a CPU lays its weights out anew at the first evaluation, in a form that takes only some
# shapes and needs code downloaded from the hub.
_REPACKING = "support_avx512bf16_for_cpu"
_FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}

log = structlog.get_logger()


def device_of(config: ModelConfig) -> torch.device:
    """The device that the site names; auto is a GPU if there is one. Raises ModelError if there is none such."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f'model.device {wanted!r}: "auto", "cpu", "cuda" or "cuda:1" is expected') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"model.device {wanted!r}: torch sees {torch.cuda.device_count()} GPU(s) here")
    if device.type == "cuda" and device.index is None:
        # With its number: whether quantised weights lie where they are trained is told by comparing devices.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_folder(config: ModelConfig) -> Path:
    """The folder of a local model, or of a hub model's snapshot, downloaded unless offline."""
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    try:
        snapshot = snapshot_download(
            config.path,
            revision=config.revision,
            local_files_only=config.offline,
            allow_patterns=_DOWNLOADED,
            ignore_patterns=_NOT_INSIDE,
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{config.path}: neither a folder nor in the local hub cache, and the hub was not reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{config.path}: neither a folder nor a hub model that can be had: {error}") from None
    return Path(snapshot)


def digest_of_weights(folder: Path) -> str:
    """SHA-256 over (name, SHA-256) of the weight files in name order: what "the same base model" means."""
    total = hashlib.sha256()
    for path in sorted(_weight_files(folder), key=lambda p: p.name):
        single = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                single.update(block)
        total.update(f"{path.name} {single.hexdigest()}\n".encode())
    return total.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one, or the shards that the index names."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        shards = [folder / name for name in set(index["weight_map"].values())]
    except FileNotFoundError:
        raise ModelError(f"{folder}: neither {_WEIGHTS} nor {_INDEX}; only safetensors weights are loaded") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / _INDEX}: not an index of weight files: {error}") from None
    missing = sorted(path.name for path in shards if not path.is_file() or path.parent != folder)
    if missing:
        raise ModelError(f"{folder}: the weight files {missing[:_SHOWN]} are missing")
    return shards


def from_checkpoint(
    folder: Path, config: ModelConfig, task: str, labels: Sequence[str], **how: Any
) -> tuple[Any, frozenset[str]]:
    """The task's model in `folder`, and the names of the values that the checkpoint lacks or has in another shape.

    Raises ModelError if it cannot be loaded; what those values are for is the caller's to judge.
    """
    numbered = dict(enumerate(labels))
    named = {"id2label": numbered, "label2id": {v: k for k, v in numbered.items()}} if numbered else {}
    try:
        base, found = task_named(task).auto_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **how,
            **named,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{config.path}: cannot be loaded for {task}: {error}") from None
    return base, frozenset({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})


def not_under(keys: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Those that lie in none of these modules, sorted."""
    return sorted(key for key in keys if not any(is_under(key, name) for name in modules))


def load_base(folder: Path, config: ModelConfig, order: ModelOrder) -> Any:
    """The transformers model in `folder`; quantised weights lie on their device already, others still on the CPU.

    Raises ModelError if it cannot be loaded, or if weights would be made up.
    """
    base, new = from_checkpoint(folder, config, order.task, order.labels, **_dtype_and_bits(folder, config, order))
    _check_frozen_head(base, folder, config, order)
    saved = tuple(order.modules_to_save)
    strays = not_under(new, saved)
    if strays:
        modules = _whole_modules(base, strays)
        raise ModelError(
            f"{config.path}: the checkpoint has no fitting values for {strays[:_SHOWN]}, so every worker would "
            f"start with different random ones; add {modules[:_SHOWN]} to modules_to_save "
            "(of [adapter], the operator's)"
        )
    replaced = sorted(name for name in saved if _has_values(base, name, new))
    if replaced:
        log.warning(
            "values of the checkpoint are not used",
            modules_to_save=replaced,
            why="the federation starts modules_to_save from the coordinator's seed",
        )
    _enable_checkpointing(base, config)
    for layer in base.modules():
        if hasattr(layer, _REPACKING):
            setattr(layer, _REPACKING, False)
    if device_of(config).type == "cpu" and base.dtype == torch.float16:
        return base.float()
    return base


def _whole_modules(base: Any, strays: Sequence[str]) -> list[str]:
    """The outermost modules that hold nothing but these values: "classifier", not "classifier.dense" and its like."""
    others = [name for name, _ in base.named_parameters() if name not in set(strays)]
    found = set()
    for stray in strays:
        parts = stray.split(".")[:-1]
        around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        found.add(next(name for name in around if not any(other.startswith(f"{name}.") for other in others)))
    return sorted(found)


def is_quantized(base: Any) -> bool:
    """Whether weights lie in fewer bits, by the site's choice or as the checkpoint has them; they are never moved."""
    return bool(getattr(base, "is_quantized", False))


def _dtype_and_bits(folder: Path, config: ModelConfig, order: ModelOrder) -> dict[str, Any]:
    """How the weights lie in memory, as from_pretrained takes it."""
    device = device_of(config)
    if config.dtype == "float16" and device.type == "cpu":
        raise ModelError(f"{config.path}: float16 cannot be trained on a CPU; use bfloat16, float32 or auto")
    if config.quantization == "none":
        return {"dtype": config.dtype}
    try:
        import bitsandbytes  # noqa: F401, PLC0415 # an extra; transformers' own message names no extra of ours
    except ImportError as error:
        raise ModelError(
            f'model.quantization = "{config.quantization}" needs bitsandbytes ({error}): '
            'pip install "raflora[quantized]", or quantization = "none"'
        ) from None
    whole = [re.escape(name) for name in _unquantised(folder, config, order)]  # transformers takes them as patterns
    in_bits: dict[str, Any] = {"load_in_8bit": True} if config.quantization == "8bit" else _FOUR_BITS
    bits = BitsAndBytesConfig(**in_bits, llm_int8_skip_modules=whole)  # type: ignore[no-untyped-call]
    return {
        "dtype": "bfloat16" if config.dtype == "auto" else config.dtype,  # of what is not quantised
        "quantization_config": bits,
        "device_map": {"": device},  # they are quantised where they will stay, and never moved
    }


def _unquantised(folder: Path, config: ModelConfig, order: ModelOrder) -> list[str]:
    """The layers that keep their precision: the head, and what is trained whole; told from a model without weights."""
    auto_class = task_named(order.task).auto_class
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            sketch = auto_class.from_config(described)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f'{config.path}: cannot be quantised for {order.task}: {error}; use quantization = "none"'
        ) from None
    inside = set(layers_of_the_base(sketch))
    saved = order.modules_to_save
    names = [name for name, module in sketch.named_modules() if is_linear(module)]
    return [name for name in names if name not in inside or any(is_under(name, head) for head in saved)]


def _enable_checkpointing(base: Any, config: ModelConfig) -> None:
    base.config.use_cache = False  # of keys and values, which only generation needs, and that says so itself
    if not config.gradient_checkpointing:
        return
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"{config.path}: a {type(base).__name__} cannot recompute its activations; "
            "set model.gradient_checkpointing = false"
        )
    # PEFT, which wraps this model next, sees it and lets the embeddings' outputs require gradients.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the only name that every transformers 5 has
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _has_values(base: Any, saved: str, new: frozenset[str]) -> bool:
    return any(is_under(key, saved) and key not in new for key, _ in base.named_parameters())


def _check_frozen_head(base: Any, folder: Path, config: ModelConfig, order: ModelOrder) -> None:
    """A head that is not trained means what it meant: its labels must be the federation's, in the same order."""
    if not order.labels or _last_layer_is_trained(base, order):
        return
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).id2label
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{config.path}: its config.json cannot be used: {error}") from None
    own = tuple(str(found[number]) for number in sorted(found))
    is_named = any(name != f"LABEL_{number}" for number, name in enumerate(own))
    if is_named and own != order.labels:
        raise ModelError(
            f"{config.path}: its head is frozen and tells {list(own[:_SHOWN])} apart, but the federation's labels are "
            f"{list(order.labels[:_SHOWN])}; use the model's labels in its order, or add the head to modules_to_save"
        )


def _last_layer_is_trained(base: Any, order: ModelOrder) -> bool:
    """Whether modules_to_save covers the layer whose outputs are the labels; a trained pooler below is not enough."""
    inside = set(layers_of_the_base(base))
    heads = [name for name, module in base.named_modules() if is_linear(module) and name not in inside]
    if not heads:
        return bool(order.modules_to_save)
    return any(is_under(heads[-1], saved) for saved in order.modules_to_save)
