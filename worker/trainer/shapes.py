"""What a base model looks like, from its config.json alone: adapted layers, their shapes, how large the rest is.

Built on torch's meta device, so a model of any size costs nothing: no weights are read or downloaded, and none are
made. What depends on weights (the digest, whether a head is trained) is not here but in model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from common.adapter import AdapterSpec, ModuleShape, TensorShape
from worker.config import ModelConfig
from worker.trainer.targets import is_transposed, layers_of_the_base, resolve_heads, resolve_targets
from worker.trainer.task import ModelError
from worker.trainer.tasks import task_named
from worker.trainer_protocol import ModelOrder


@dataclass(frozen=True)
class Shapes:
    """The same spec that a loaded model has, and what `raflora spec` says of the base beside it."""

    spec: AdapterSpec
    base: Mapping[str, int | str]  # the object "base" of a spec file


def shapes_of(config: ModelConfig, order: ModelOrder) -> Shapes:
    """The shapes of a local folder's or a hub model's config.json. Raises ModelError or InvalidRequest."""
    base = _on_meta(config, order)
    targets, heads = resolve_targets(base, order), resolve_heads(base, order.modules_to_save)
    modules = tuple(ModuleShape(name, *_sides_of(base.get_submodule(name))) for name in targets)
    tensors = tuple(
        TensorShape(f"{head}.{name}", tuple(parameter.shape))
        for head in heads
        for name, parameter in base.get_submodule(head).named_parameters()
    )
    return Shapes(AdapterSpec(modules, tensors), base_facts(base))


def base_facts(base: Any) -> Mapping[str, int | str]:
    """What is known of the model beside the adapted layers; what its configuration does not say is 0."""
    settings = base.config.get_text_config()
    layers = [base.get_submodule(name) for name in layers_of_the_base(base)]
    return {
        "model_type": str(base.config.model_type),
        "dtype": str(base.config.dtype or torch.float32).removeprefix("torch."),
        # A weight that two modules share is one parameter.
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "linear_parameters": sum(layer.weight.numel() for layer in layers),
        "hidden_size": _number(settings, "hidden_size"),
        "layers": _number(settings, "num_hidden_layers"),
        "vocabulary": _number(settings, "vocab_size"),
        "tokens": _patches_of(base.config),
    }


def _on_meta(config: ModelConfig, order: ModelOrder) -> Any:
    path = Path(config.path).expanduser()
    labels = dict(enumerate(order.labels))
    named = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}} if labels else {}
    try:
        settings = AutoConfig.from_pretrained(
            path if path.is_dir() else config.path,
            revision=config.revision,
            local_files_only=config.offline or path.is_dir(),
            trust_remote_code=False,
            **named,
        )
        with torch.device("meta"):
            return task_named(order.task).auto_class.from_config(settings, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{config.path}: no config.json that {order.task} can use, in a folder or on the hub: {error}"
        ) from None


def _sides_of(layer: nn.Module) -> tuple[int, int]:
    """A linear layer's out_features and in_features."""
    first, second = layer.get_parameter("weight").shape
    return (second, first) if is_transposed(layer) else (first, second)


def _patches_of(settings: Any) -> int:
    """Tokens of every image, the class token included; 0 for what is no image model of patches."""
    image, patch = getattr(settings, "image_size", None), getattr(settings, "patch_size", None)
    if not (isinstance(image, int) and isinstance(patch, int) and patch > 0):
        return 0
    return (image // patch) ** 2 + 1


def _number(settings: Any, name: str) -> int:
    found = getattr(settings, name, 0)
    return found if isinstance(found, int) else 0
