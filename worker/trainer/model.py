"""One live LoRA adapter on a frozen base model: written, read and re-ranked between rounds.

The base model comes from base_model, the layers from targets; PEFT's key names are not here but in peft_format.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from common.adapter import Adapter, AdapterSpec, ModuleShape, TensorShape
from common.errors import AdapterMismatch
from worker import peft_format
from worker.config import ModelConfig
from worker.trainer.base_model import device_of, digest_of_weights, is_quantized, load_base, resolve_folder
from worker.trainer.group import Group
from worker.trainer.sharding import check_shardable, shard_base
from worker.trainer.targets import is_transposed, resolve_heads, resolve_targets
from worker.trainer.task import ModelError, Task
from worker.trainer.tasks import task_named
from worker.trainer_protocol import ModelOrder

_NAMES = ("one", "other")  # a live model changes its rank by changing from one adapter to the other
_SHOWN = 5  # names in an error message


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
    lora_dropout: float = 0.0

    @property
    def base(self) -> Any:
        """The transformers model inside."""
        return self.live.get_base_model()


def load_model(config: ModelConfig, order: ModelOrder, over: Group | None = None) -> AdaptedModel:
    """Loads the base model and puts LoRA of `order.lora_rank` on it; `over` a group its frozen weights are sharded.

    Raises ModelError or InvalidRequest.
    """
    task = task_named(order.task)
    folder = resolve_folder(config)
    digest = digest_of_weights(folder)
    device = device_of(config)
    base = load_base(folder, config, order)
    if over is not None:
        check_shardable(base, over)
    targets = resolve_targets(base, order)
    heads = resolve_heads(base, order.modules_to_save)
    torch.manual_seed(order.seed % (1 << 63))
    # Where only some layers are transposed, PEFT finds them out itself and says so.
    transposed = all(is_transposed(base.get_submodule(name)) for name in targets)
    lora = _lora_config(targets, heads, order.lora_rank, fan_in_fan_out=transposed)
    live = get_peft_model(base, lora, adapter_name=_NAMES[0])
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
    if over is not None:
        shard_base(live, targets, device, over)
    elif not is_quantized(base):
        live.to(device)
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


def set_dropout(model: AdaptedModel, lora_dropout: float) -> None:
    """Zeroes this share of what goes into lora_A while training, until it is set anew; other ranks keep it."""
    for layer in _lora_layers(model.live).values():
        chosen = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        layer.lora_dropout[model.adapter_name] = chosen.train(layer.training)
    model.lora_dropout = lora_dropout


def live_factors(model: AdaptedModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """lora_A [rank, in] and lora_B [out, rank] of every adapted layer: the very parameters, not copies."""
    name, layers = model.adapter_name, _lora_layers(model.live).values()
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers]


def _labels_of(base: Any, ordered: tuple[str, ...]) -> tuple[str, ...]:
    if ordered:
        return ordered
    return tuple(str(label) for _, label in sorted(base.config.id2label.items()))


def _lora_config(targets: Sequence[str], heads: Sequence[str], rank: int, *, fan_in_fan_out: bool) -> LoraConfig:
    # No task type: PEFT would add heads to modules_to_save by itself.
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
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
    current: Any = model.live.peft_config[model.adapter_name]
    targets = [module.name for module in model.spec.modules]
    config = _lora_config(targets, model.modules_to_save, rank, fan_in_fan_out=current.fan_in_fan_out)
    # In this order: between deleting the only adapter and adding the next, PEFT has no head to set.
    model.live.add_adapter(spare, config)
    model.live.set_adapter(spare)
    model.live.delete_adapter(model.adapter_name)
    model.adapter_name, model.rank = spare, rank
    set_dropout(model, model.lora_dropout)
    _train_in_float32(model.live)


def _train_in_float32(live: PeftModel) -> None:
    # PEFT does so for the factors; a copied head keeps the base model's dtype, too coarse for small steps.
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
