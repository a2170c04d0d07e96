"""The frozen base model and one live LoRA adapter on it.

Weights come from safetensors files only, code never comes with them, and nothing is newly initialised behind
anybody's back. PEFT's key names are not here but in peft_format.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig

from common.adapter import Adapter, AdapterSpec, ModuleShape, TensorShape
from common.errors import AdapterMismatch
from worker import peft_format
from worker.config import ModelConfig
from worker.tasks import ModelError, Task, task_named
from worker.trainer_protocol import ModelOrder

ALL_LINEAR = "all-linear"
_NAMES = ("one", "other")  # a live model changes its rank by changing from one adapter to the other
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DOWNLOADED = ["*.json", "*.txt", "*.model", "model*.safetensors"]  # configuration, tokenizer, weights
_READ_BYTES = 1 << 20
_SHOWN = 5  # names in an error message

log = structlog.get_logger()


@dataclass
class AdaptedModel:
    """A base model whose one adapter can be written, trained, read and re-ranked."""

    live: PeftModel
    task: Task
    folder: Path  # where it was loaded from
    labels: tuple[str, ...]
    device: torch.device
    base_model_digest: str
    spec: AdapterSpec
    modules_to_save: tuple[str, ...]
    rank: int
    adapter_name: str  # PEFT's, for the only adapter there is

    @property
    def base(self) -> Any:
        """The transformers model inside."""
        return self.live.get_base_model()


def load_model(config: ModelConfig, order: ModelOrder) -> AdaptedModel:
    """Loads the base model and puts LoRA of `order.lora_rank` on it. Raises ModelError or InvalidRequest."""
    task = task_named(order.task)
    folder = resolve_folder(config)
    digest = digest_of_weights(folder)
    device = device_of(config)
    base = _load_base(folder, config, order, task)
    if device.type == "cpu" and base.dtype == torch.float16:
        base = _widened(base, config)
    targets = _resolve_targets(base, order)
    heads = _resolve_heads(base, order.modules_to_save)
    torch.manual_seed(order.seed % (1 << 63))
    live = get_peft_model(base, _lora_config(targets, heads, order.lora_rank), adapter_name=_NAMES[0])
    adapted = AdaptedModel(
        live=live,
        task=task,
        folder=folder,
        labels=_labels_of(base, order.labels),
        device=device,
        base_model_digest=digest,
        spec=_spec_of(live, heads),
        modules_to_save=heads,
        rank=order.lora_rank,
        adapter_name=_NAMES[0],
    )
    if {module.name for module in adapted.spec.modules} != set(targets):
        raise ModelError(f"{config.path}: PEFT adapted other layers than {list(targets[:_SHOWN])}")
    _train_in_float32(live)
    live.to(adapted.device)
    return adapted


def describe_model(config: ModelConfig, order: ModelOrder) -> tuple[AdapterSpec, str]:
    """What a federation's manifest needs of a base model: the spec and the digest of the weights."""
    adapted = load_model(config, order)
    return adapted.spec, adapted.base_model_digest


def write_adapter(model: AdaptedModel, adapter: Adapter, *, scaling: float) -> None:
    """Makes the live adapter this one, at its rank and scaling. Raises AdapterMismatch if it does not fit."""
    if adapter.spec != model.spec:
        raise AdapterMismatch("the adapter's modules or shapes are not those of the loaded model")
    if adapter.rank != model.rank:
        _rerank(model, adapter.rank)
    for layer in _lora_layers(model.live).values():
        layer.scaling[model.adapter_name] = scaling
    state = {key: torch.from_numpy(np.array(a)) for key, a in peft_format.to_state(adapter).items()}
    result: Any = set_peft_model_state_dict(model.live, state, adapter_name=model.adapter_name)
    refused, missing = sorted(result.unexpected_keys), sorted(_state_of(model).keys() - state.keys())
    if refused or missing:
        raise AdapterMismatch(f"PEFT took not {refused[:_SHOWN]} and was not given {missing[:_SHOWN]}")


def read_adapter(model: AdaptedModel) -> Adapter:
    """A copy of the live adapter, in float32; later training does not change it."""
    # PEFT's tensors share their storage with the model, hence the copy.
    arrays = {k: t.detach().to("cpu", torch.float32).numpy().copy() for k, t in _state_of(model).items()}
    return peft_format.from_state(arrays, model.spec)


def live_factors(model: AdaptedModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """lora_A [rank, in] and lora_B [out, rank] of every adapted layer: the very parameters, not copies."""
    name, layers = model.adapter_name, _lora_layers(model.live).values()
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers]


def device_of(config: ModelConfig) -> torch.device:
    """The device that the site names; auto is a GPU if there is one. Raises ModelError if there is none such."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ModelError(f'model.device {config.device!r}: "auto", "cpu", "cuda" or "cuda:1" is expected') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"model.device {config.device!r}: torch sees {torch.cuda.device_count()} GPU(s) here")
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
            ignore_patterns=["*/*"],
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


def _load_base(folder: Path, config: ModelConfig, order: ModelOrder, task: Task) -> Any:
    labels = dict(enumerate(order.labels))
    named = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}} if labels else {}
    try:
        base, found = task.auto_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=config.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # looked at below, where the message can say what to do
            **named,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{config.path}: cannot be loaded for {order.task}: {error}") from None
    _check_frozen_head(base, folder, config, order)
    new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    saved = tuple(order.modules_to_save)
    strays = sorted(key for key in new if not any(_is_under(key, name) for name in saved))
    if strays:
        modules = sorted({name.rpartition(".")[0] for name in strays})
        raise ModelError(
            f"{config.path}: the checkpoint has no fitting values for {strays[:_SHOWN]}, so every worker would "
            f"start with different random ones; add {modules[:_SHOWN]} to modules_to_save"
        )
    replaced = sorted(name for name in saved if _has_values(base, name, new))
    if replaced:
        log.warning(
            "values of the checkpoint are not used",
            modules_to_save=replaced,
            why="the federation starts modules_to_save from the coordinator's seed",
        )
    return base


def _widened(base: Any, config: ModelConfig) -> Any:
    if config.dtype == "float16":
        raise ModelError(f"{config.path}: float16 cannot be trained on a CPU; use bfloat16, float32 or auto")
    return base.float()


def _has_values(base: Any, saved: str, new: set[str]) -> bool:
    return any(_is_under(key, saved) and key not in new for key, _ in base.named_parameters())


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
    outside = (name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    heads = [name for name in outside if not name.startswith(f"{base.base_model_prefix}.")]
    if not heads:
        return bool(order.modules_to_save)
    return any(_is_under(heads[-1], saved) for saved in order.modules_to_save)


def _labels_of(base: Any, ordered: tuple[str, ...]) -> tuple[str, ...]:
    if ordered:
        return ordered
    return tuple(str(label) for _, label in sorted(base.config.id2label.items()))


def _resolve_targets(base: Any, order: ModelOrder) -> tuple[str, ...]:
    """The full names of the layers that LoRA goes on. Raises ModelError if a target matches none."""
    saved = order.modules_to_save
    inside = {
        name: module
        for name, module in base.named_modules()
        if name and not any(_is_under(name, head) for head in saved)
    }
    linear = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
    if order.target_modules == (ALL_LINEAR,):
        # The head is no part of the base: PEFT's own all-linear would take a frozen classifier too.
        return tuple(name for name in linear if name.startswith(f"{base.base_model_prefix}."))
    chosen: set[str] = set()
    for target in order.target_modules:
        matches = {name for name in inside if _ends_with(name, target)}
        others = sorted(matches - set(linear))
        if others:
            raise ModelError(f"target_modules {target!r}: {others[0]} is no linear layer")
        if not matches:
            last_parts = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(
                f"target_modules {target!r}: no layer of this {type(base).__name__} is called so; "
                f"linear layers here end in {', '.join(last_parts)}"
            )
        chosen |= matches
    if not chosen:
        raise ModelError(f"target_modules: at least one is needed, or {ALL_LINEAR!r}")
    return tuple(sorted(chosen))


def _resolve_heads(base: Any, modules_to_save: Sequence[str]) -> tuple[str, ...]:
    names = [name for name, _ in base.named_modules()]
    heads: set[str] = set()
    for wanted in modules_to_save:
        found = {name for name in names if _ends_with(name, wanted)}
        # PEFT compares the ends of names without a dot, so "classifier" would take pre_classifier as well.
        taken = {name for name in names if name.endswith(wanted)}
        if not found:
            top = sorted({name for name, _ in base.named_children()})
            raise ModelError(f"modules_to_save {wanted!r}: no such module; at the top there are {', '.join(top)}")
        if any(not any(_ends_with(name, each) for each in modules_to_save) for name in taken):
            raise ModelError(f"modules_to_save {wanted!r}: PEFT would also take {sorted(taken - found)}; name them too")
        heads |= found
    return tuple(sorted(heads))


def _lora_config(targets: Sequence[str], heads: Sequence[str], rank: int) -> LoraConfig:
    # No task type: PEFT would add heads to modules_to_save by itself.
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets),
        modules_to_save=list(heads) or None,
    )


def _lora_layers(live: PeftModel) -> dict[str, Any]:
    base = live.get_base_model()
    return {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}


def _state_of(model: AdaptedModel) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model.live,
        adapter_name=model.adapter_name,
        save_embedding_layers=False,  # "auto" may ask the hub
    )
    return state


def _spec_of(live: PeftModel, heads: Iterable[str]) -> AdapterSpec:
    base = live.get_base_model()
    modules = tuple(
        ModuleShape(name, layer.out_features, layer.in_features) for name, layer in _lora_layers(live).items()
    )
    tensors = []
    for head in heads:
        wrapper: Any = base.get_submodule(head)
        trained = wrapper.modules_to_save[_NAMES[0]]
        if any(True for _ in trained.buffers()):
            raise ModelError(f"modules_to_save {head!r}: it has buffers, which a federation cannot average")
        tensors += [TensorShape(f"{head}.{name}", tuple(p.shape)) for name, p in trained.named_parameters()]
    return AdapterSpec(modules, tuple(tensors))


def _rerank(model: AdaptedModel, rank: int) -> None:
    """Replaces the live adapter by one of another rank: milliseconds, the base model stays where it is."""
    spare = next(name for name in _NAMES if name != model.adapter_name)
    config = _lora_config([m.name for m in model.spec.modules], model.modules_to_save, rank)
    # In this order: between deleting the only adapter and adding the next, PEFT has no head to set.
    model.live.add_adapter(spare, config)
    model.live.set_adapter(spare)
    model.live.delete_adapter(model.adapter_name)
    model.adapter_name, model.rank = spare, rank
    _train_in_float32(model.live)


def _train_in_float32(live: PeftModel) -> None:
    # PEFT does so for the factors; a copied head keeps the base model's dtype, too coarse for small steps.
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_under(name: str, module: str) -> bool:
    """Whether a module or parameter lies in a module of that name, wherever that module is."""
    return f".{module}." in f".{name}."
