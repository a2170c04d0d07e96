"""A frozen base model that is divided among the processes of a group: each keeps a part of every layer's weights.

A layer is gathered when it is computed, forwards and again backwards, and let go at once (PyTorch's FSDP2). LoRA's
factors and what else is trained stay whole in every process, so that reading, writing and summing them knows nothing
of this. Nothing here trains, and no weight is ever written.
"""

from collections.abc import Iterable
from typing import Any

import structlog
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from worker.trainer.base_model import is_quantized
from worker.trainer.group import Group
from worker.trainer.task import ModelError

_C10D: Any = distributed  # it exports its groups, but as ones that may not be there

log = structlog.get_logger()


def check_shardable(base: Any, group: Group) -> None:
    """Raises ModelError if the weights cannot be divided."""
    if is_quantized(base):
        raise ModelError(
            f"launch: the weights of this {type(base).__name__} are quantised, and those cannot be sharded over the "
            f'{group.size} processes; choose one of the two: model.quantization = "none" and a checkpoint that is '
            "not quantised, or a group that does not shard (launch.shard_base = false)"
        )


def shard_base(live: PeftModel, adapted: Iterable[str], device: torch.device, group: Group) -> None:
    """Divides the frozen weights, which lie on the CPU, over the group, and brings each part to this process's device.

    `adapted` names the layers with LoRA: the members of the lists that hold them are what is gathered at once, and the
    rest of the model (embeddings, head) is one more. While they are brought there, one of them is whole at a time.
    """
    base: Any = live.get_base_model()
    kept, everybody = _kept_whole(live), _C10D.group.WORLD
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(everybody, device.type),
        "reshard_after_forward": True,
        "ignored_params": kept,
    }
    layers = [base.get_submodule(name) for name in _repeated(base, adapted)]
    for layer in layers:
        fully_shard(layer, **how)
    fully_shard(base, **how)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    log.info("the frozen base is sharded", processes=group.size, layers=len(layers), **_weights_of(base))
    _keep_in_step([base, *layers], group)


def _kept_whole(live: PeftModel) -> set[nn.Parameter]:
    """What is trained, and what PEFT copies when it makes another adapter: the heads that are trained whole."""
    copied = [module for module in live.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {p for p in live.parameters() if p.requires_grad} | {p for module in copied for p in module.parameters()}


def _weights_of(base: nn.Module) -> dict[str, int]:
    """How many frozen weights lie in this process, and how many there are."""
    parts = [p for p in base.parameters() if isinstance(p, DTensor)]
    return {"weights_here": sum(p.to_local().numel() for p in parts), "of": sum(p.numel() for p in parts)}


def _repeated(base: nn.Module, adapted: Iterable[str]) -> list[str]:
    """The members of the outermost lists of modules that hold an adapted layer, in the model's order."""
    lists = {name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    holding = set()
    for layer in adapted:
        parts = layer.split(".")
        above = (".".join(parts[:length]) for length in range(1, len(parts)))
        outermost = next((name for name in above if name in lists), None)
        if outermost is not None:
            holding.add(outermost)
    return [name for name, _ in base.named_modules() if name.rpartition(".")[0] in holding]


def _keep_in_step(units: list[Any], group: Group) -> None:
    """Before every forward pass all processes agree to make one; who has none to make gathers along with the others."""
    root, layers = units[0], units[1:]
    order: list[Any] = []  # in which a pass gathers, as the last one did

    def before_pass(*_: Any) -> None:
        group.agree_to_pass()
        if order:
            # FSDP forgets a pass after its backward, which in an evaluation never comes.
            root.reset_iter_state()
        order[:] = [root]

    def accompany() -> None:
        for unit in order:
            unit.unshard()
            unit.reshard()

    root.register_forward_pre_hook(before_pass, prepend=True)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: order.append(module), prepend=True)
    group.accompany = accompany
