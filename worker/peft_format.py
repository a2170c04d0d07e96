"""PEFT's names and files: the only place that knows how PEFT spells keys and what its folders hold.

Nothing here imports torch or PEFT, so that an adapter can be exported where neither is installed.
"""

import json
from collections.abc import Mapping, Sequence
from math import inf, nextafter, sqrt
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.adapter import Adapter, AdapterSpec, Array, Factors
from common.errors import AdapterMismatch
from common.transfer import write_durably

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
# What PEFT can do and an adapter of ours never holds: a folder that says so is not one that we wrote.
_FOREIGN = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
_SHOWN = 3  # names in an error message


def key_of_lora_A(module: str) -> str:
    """PEFT's key of a module's lora_A."""
    return f"{_PREFIX}{module}{_LORA_A}"


def key_of_lora_B(module: str) -> str:
    """PEFT's key of a module's lora_B."""
    return f"{_PREFIX}{module}{_LORA_B}"


def key_of_tensor(name: str) -> str:
    """PEFT's key of a tensor that is trained whole ("classifier.weight")."""
    return f"{_PREFIX}{name}"


def to_state(adapter: Adapter) -> dict[str, Array]:
    """The adapter under PEFT's keys, as `get_peft_model_state_dict` gives it."""
    state = {key_of_tensor(name): tensor for name, tensor in adapter.tensors.items()}
    for name, factors in adapter.modules.items():
        state[key_of_lora_A(name)] = factors.lora_A
        state[key_of_lora_B(name)] = factors.lora_B
    return state


def from_state(state: Mapping[str, Array], spec: AdapterSpec) -> Adapter:
    """The inverse of to_state. Raises AdapterMismatch if the keys are not exactly those of the spec."""
    expected = {key_of_tensor(t.name) for t in spec.tensors}
    for module in spec.modules:
        expected |= {key_of_lora_A(module.name), key_of_lora_B(module.name)}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise AdapterMismatch(
            f"PEFT state: missing {missing[:_SHOWN] or 'none'}, unexpected {unexpected[:_SHOWN] or 'none'}"
        )
    modules = {
        module.name: Factors(state[key_of_lora_A(module.name)], state[key_of_lora_B(module.name)])
        for module in spec.modules
    }
    return Adapter(modules, {t.name: state[key_of_tensor(t.name)] for t in spec.tensors})


def adapter_config(
    adapter: Adapter, *, scaling: float, base_model: str, task: str, modules_to_save: Sequence[str]
) -> dict[str, Any]:
    """The adapter_config.json of a stock PEFT folder; `base_model` loses all but its last part if it is a path."""
    alpha, use_rslora = lora_alpha_of(scaling, adapter.rank)
    return {
        "peft_type": "LORA",
        # PEFT adds every "classifier" and "score" to modules_to_save when it is told SEQ_CLS, so only a task
        # whose class adds nothing is named.
        "task_type": "CAUSAL_LM" if task == "causal-lm" else None,
        "base_model_name_or_path": public_name(base_model),
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": sorted(modules_to_save) or None,
    }


def lora_alpha_of(scaling: float, rank: int) -> tuple[int | float, bool]:
    """lora_alpha and use_rslora from which PEFT computes this very scaling at this rank.

    PEFT divides lora_alpha by the rank, or with use_rslora by its square root. A whole lora_alpha is taken where one
    of the two gives one; for a few odd scalings no number does, and the nearest is off by one part in 10^16.
    """
    divisors = (False, float(rank)), (True, sqrt(rank))
    for use_rslora, divisor in divisors:
        whole = round(scaling * divisor)
        if whole and whole / divisor == scaling:
            return whole, use_rslora
    for use_rslora, divisor in divisors:
        near = scaling * divisor
        for alpha in (near, nextafter(near, inf), nextafter(near, -inf)):
            if alpha / divisor == scaling:
                return alpha, use_rslora
    return scaling * rank, False


def read_peft_folder(folder: Path) -> tuple[Adapter, float]:
    """The adapter in a folder that write_peft_folder wrote, and its scaling. Raises AdapterMismatch for any other."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        state = load((folder / WEIGHTS_FILE).read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except OSError as error:
        raise AdapterMismatch(f"{error.filename}: cannot be read: {error.strerror}; name a PEFT folder") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterMismatch(f"{folder}: {CONFIG_FILE} or {WEIGHTS_FILE} is damaged: {error!r}") from None
    foreign = [name for name in _FOREIGN if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA" or foreign:
        raise AdapterMismatch(f"{folder}: {foreign or config.get('peft_type')} is not what raflora exports")
    named = {key.removeprefix(_PREFIX): np.asarray(array, dtype=np.float32) for key, array in state.items()}
    modules = [name.removesuffix(_LORA_A) for name in named if name.endswith(_LORA_A)]
    try:
        factors = {name: Factors(named.pop(name + _LORA_A), named.pop(name + _LORA_B)) for name in sorted(modules)}
    except KeyError as error:
        raise AdapterMismatch(f"{folder}: {WEIGHTS_FILE} lacks {error}") from None
    adapter = Adapter(factors, named)
    if adapter.rank != rank:
        raise AdapterMismatch(f"{folder}: {CONFIG_FILE} says rank {rank}, {WEIGHTS_FILE} holds rank {adapter.rank}")
    return adapter, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def public_name(base_model: str) -> str:
    """The name without the folders of this machine; a hub id stays whole."""
    path = PurePath(base_model)
    if path.is_absolute() or base_model.startswith((".", "~")):
        return path.name
    return base_model


def write_peft_folder(
    folder: Path,
    adapter: Adapter,
    *,
    scaling: float,
    base_model: str,
    task: str,
    modules_to_save: Sequence[str],
) -> None:
    """Writes a folder that stock `PeftModel.from_pretrained(base, folder)` loads.

    `adapter` holds the factors as a client multiplies them by `scaling`; `modules_to_save` are the names of the
    modules (not tensors) outside LoRA. Raises AdapterMismatch if they do not cover the adapter's tensors.
    """
    orphans = [n for n in adapter.tensors if not any(n.startswith(f"{m}.") for m in modules_to_save)]
    if orphans:
        raise AdapterMismatch(
            f"{folder}: the tensors {orphans[:_SHOWN]} belong to none of modules_to_save {list(modules_to_save)}"
        )
    config = adapter_config(adapter, scaling=scaling, base_model=base_model, task=task, modules_to_save=modules_to_save)
    state = {key: np.ascontiguousarray(array) for key, array in sorted(to_state(adapter).items())}
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is replaced in one step: a reader never sees half of one.
    write_durably(folder / WEIGHTS_FILE, save(state, metadata={"format": "pt"}))
    write_durably(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
