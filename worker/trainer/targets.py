"""Which layers of a base model LoRA goes on, and which are trained whole: from the federation's words to full names.

Nothing is guessed: a word that no layer answers to is refused with the words that some do. PEFT is not imported here.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from worker.trainer.task import ModelError
from worker.trainer_protocol import ModelOrder

ALL_LINEAR = "all-linear"
_WILD = frozenset("*?")
_SHOWN = 5  # names in an error message


def resolve_targets(base: Any, order: ModelOrder) -> tuple[str, ...]:
    """The full names of the layers that LoRA goes on: names, name endings, patterns, or every linear layer.

    A name means every layer that is called so or ends in it. A pattern means the linear layers of the base whose name
    it matches, whole or from any dot on; like all-linear it never takes the head. Raises ModelError if a target
    matches none, or something that LoRA's factors cannot stand beside.
    """
    saved = order.modules_to_save
    inside = {
        name: module
        for name, module in base.named_modules()
        if name and not any(is_under(name, head) for head in saved)
    }
    of_base = [name for name in layers_of_the_base(base) if name in inside]
    if order.target_modules == (ALL_LINEAR,):
        if not of_base:
            raise ModelError(f"target_modules {ALL_LINEAR!r}: this {type(base).__name__} has no linear layer")
        return tuple(of_base)
    chosen: set[str] = set()
    for target in order.target_modules:
        found = _matching(target, of_base) if _WILD & set(target) else _named(target, inside, base)
        if not found:
            raise ModelError(_nothing_is_called(target, base, inside))
        chosen |= found
    if not chosen:
        raise ModelError(f"target_modules: at least one is needed, or {ALL_LINEAR!r}")
    return tuple(sorted(chosen))


def resolve_heads(base: Any, modules_to_save: Sequence[str]) -> tuple[str, ...]:
    """The full names of the modules that are trained whole. Raises ModelError if a name matches none, or too many."""
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
        for name in sorted(found):
            _refuse_tied(f"modules_to_save {wanted!r}", name, base)
        heads |= found
    return tuple(sorted(heads))


def is_linear(module: nn.Module) -> bool:
    """Whether it is a matrix product, in whatever precision (bitsandbytes' layers are nn.Linear) and orientation."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is [in, out]: GPT-2's Conv1D, unless it is quantised."""
    return isinstance(module, Conv1D)


def layers_of_the_base(base: Any) -> list[str]:
    """The full names of the linear layers below the head, in the model's order."""
    prefix = base.base_model_prefix
    has_prefix = bool(prefix) and isinstance(getattr(base, prefix, None), nn.Module)
    start = f"{prefix}." if has_prefix else ""
    # PEFT's own all-linear would take a frozen classifier too.
    return [name for name, module in base.named_modules() if is_linear(module) and name.startswith(start)]


def is_under(name: str, module: str) -> bool:
    """Whether a module or parameter lies in a module of that name, wherever that module is."""
    return f".{module}." in f".{name}."


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    """What the pattern stands for, as a whole name or from a dot on.

    Linear in the name's length for each part of the pattern, whatever the coordinator wrote: translate makes every
    "*" but the last an atomic group, which never tries again what it has passed.
    """
    whole, ending = re.compile(translate(pattern)), re.compile(translate(f"*.{pattern}"))
    return {name for name in names if whole.match(name) or ending.match(name)}


def _named(target: str, inside: Mapping[str, nn.Module], base: Any) -> set[str]:
    found = {name for name in inside if _ends_with(name, target)}
    for name in sorted(found):
        if not is_linear(inside[name]):
            raise ModelError(_not_linear(target, name, inside[name]))
        _refuse_tied(f"target_modules {target!r}", name, base)
    return found


def _not_linear(target: str, name: str, module: nn.Module) -> str:
    said = f"target_modules {target!r}: {name} is no linear layer but a {type(module).__name__}"
    if isinstance(module, nn.Embedding):
        return f"{said}, and only the factors of a matrix product are aggregated; leave it out"
    layers = [f"{name}.{inner}" for inner, layer in module.named_modules() if is_linear(layer)]
    if layers:
        return f"{said}; name layers inside it, for example {', '.join(layers[:_SHOWN])}, or {name + '.*'!r}"
    return f"{said}, and only the factors of a matrix product are aggregated; leave it out"


def _nothing_is_called(target: str, base: Any, inside: Mapping[str, nn.Module]) -> str:
    model = type(base).__name__
    tensors = [name for name, _ in base.named_parameters() if _ends_with(name, target)]
    if tensors:
        return (
            f"target_modules {target!r}: {tensors[0]} of this {model} is a tensor, not a linear layer (a mixture's "
            "experts lie in one tensor, which has no factors of its own); leave it out"
        )
    head = base.get_output_embeddings()  # of a language model, on which no LoRA is trained
    offered = (name for name, module in inside.items() if is_linear(module) and module is not head)
    last_parts = sorted({name.rpartition(".")[2] for name in offered})
    kind = "linear layer of the base below the head" if _WILD & set(target) else "layer"
    return (
        f"target_modules {target!r}: no {kind} of this {model} is called so; "
        f"linear layers here end in {', '.join(last_parts)} (adapter.target_modules, the operator's)"
    )


def _refuse_tied(what: str, name: str, base: Any) -> None:
    """Raises ModelError if a weight of the module is also another's: what is learnt for one would change both."""
    of_module = {id(p): key for key, p in base.get_submodule(name).named_parameters(prefix=name)}
    for key, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in of_module and not is_under(key, name):
            raise ModelError(
                f"{what}: the weight of {name} is also {key} (tied); PEFT would change it for one of the two alone, "
                "which a merged model cannot hold; leave it out"
            )
