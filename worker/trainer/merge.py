"""An adapter merged into the weights of its base model: a folder that plain transformers loads, without PEFT or us.

Loads the adapter as any user would, from a stock PEFT folder. The base model comes unquantised and unchanged: the
digest of its weights must be the federation's. No code is copied, and nothing but safetensors is written.
"""

import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peft import PeftModel

from common.errors import AdapterMismatch
from worker.config import ModelConfig
from worker.peft_format import read_peft_folder
from worker.trainer.base_model import digest_of_weights, from_checkpoint, not_under, resolve_folder
from worker.trainer.chat_templates import answer_ends
from worker.trainer.task import ModelError, pad_by_end, tokenizer_in

MAX_SHARD_SIZE = "5GB"  # what hubs and file systems take without complaint
_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# What lies beside weights and is neither weights nor code: tokenizer, processor, chat template, generation settings.
_COPIED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "chat_template*", "*processor_config.json", "generation_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),  # which the base model's licence may ask for
)
_TEMPLATES = "additional_chat_templates"
_SHOWN = 5  # names in an error message


@dataclass(frozen=True)
class MergeOrder:
    """What is merged into what."""

    model: ModelConfig  # the base; dtype "auto" keeps that of its files
    adapter: Path  # a PEFT folder
    base_model_digest: str  # that the base must have
    task: str
    labels: tuple[str, ...]
    modules_to_save: tuple[str, ...]


def merge(order: MergeOrder, into: Path) -> str:
    """Writes the merged model into an empty folder; returns the dtype of its numbers.

    Raises ModelError if the base is another model than the federation's, is quantised or cannot be merged into, and
    AdapterMismatch if the adapter does not fit it.
    """
    folder = resolve_folder(order.model)
    _check_base(folder, order)
    base = _load_base(folder, order)
    _check_untied(base, folder, order)
    try:
        live = PeftModel.from_pretrained(base, str(order.adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterMismatch(f"{order.adapter}: PEFT cannot put it on {order.model.path}: {error}") from None
    _check_taken(live, order.adapter)
    try:
        merged: Any = live.merge_and_unload(safe_merge=True)
    except ValueError as error:  # numbers that the dtype cannot hold
        raise ModelError(
            f"{order.model.path}: the sum is not finite in {base.dtype}: {error}; use --dtype float32"
        ) from None
    _complete(merged, folder)
    merged.save_pretrained(into, max_shard_size=MAX_SHARD_SIZE)
    for weights in into.glob("*.safetensors"):  # which are written for their owner's eyes alone
        weights.chmod((into / _CONFIG).stat().st_mode)
    _copy_companions(folder, into)
    _let_pad(into)
    return str(merged.dtype).removeprefix("torch.")


def named_answer_ends(model: ModelConfig) -> dict[str, int]:
    """The tokens that end a base model's answers, by their texts; empty if its tokenizer cannot be had."""
    try:
        tokenizer = tokenizer_in(resolve_folder(model))
    except ModelError:
        return {}
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in answer_ends(tokenizer)}


def _check_base(folder: Path, order: MergeOrder) -> None:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / _CONFIG}: cannot be used: {error}") from None
    if config.get("quantization_config"):
        raise ModelError(
            f"{order.model.path}: its weights are quantised, and their sum with the adapter would be quantised anew; "
            "name the model with its original weights"
        )
    found = digest_of_weights(folder)
    if found != order.base_model_digest:
        raise ModelError(
            f"{order.model.path}: its weights have the digest {found}, but the federation trained on "
            f"{order.base_model_digest}; name that very model (--revision pins a commit of the hub)"
        )


def _load_base(folder: Path, order: MergeOrder) -> Any:
    base, new = from_checkpoint(folder, order.model, order.task, order.labels, dtype=order.model.dtype)
    made_up = not_under(new, order.modules_to_save)
    if made_up:
        raise ModelError(
            f"{order.model.path}: has no fitting values for {made_up[:_SHOWN]}, and the adapter brings none"
        )
    return base.eval()


def _check_untied(base: Any, folder: Path, order: MergeOrder) -> None:
    """A layer that shares its weights with another cannot take a change of its own."""
    adapter, _ = read_peft_folder(order.adapter)
    changed = {*(f"{name}.weight" for name in adapter.modules), *adapter.tensors}
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and changed.intersection(shared):
            raise ModelError(
                f"{order.model.path}: {' and '.join(sorted(shared))} are one and the same tensor in {folder.name}, and "
                "the adapter changes one of them alone; export without --merged and load it with PEFT"
            )


def _check_taken(live: PeftModel, adapter: Path) -> None:
    """PEFT passes over what it does not find; then the folder would be merged in part."""
    expected, _ = read_peft_folder(adapter)
    base = live.get_base_model()
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    if adapted != set(expected.modules):
        missing, more = sorted(set(expected.modules) - adapted), sorted(adapted - set(expected.modules))
        raise AdapterMismatch(
            f"{adapter}: PEFT adapted {more[:_SHOWN] or 'no'} layers beside those of the federation and left out "
            f"{missing[:_SHOWN] or 'none'}; does this version of transformers name layers as the workers' did?"
        )


def _complete(merged: Any, folder: Path) -> None:
    """Puts into the model's settings what training did without them: which tokens end an answer, and which one pads."""
    try:
        tokenizer = tokenizer_in(folder)
    except ModelError:
        return  # images need none, and who has one elsewhere uses that one's
    if merged.can_generate():
        own = merged.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        if missing := [token for token in answer_ends(tokenizer) if token not in ends]:
            merged.generation_config.eos_token_id = [*ends, *missing]
    elif tokenizer.eos_token is not None:
        pad_by_end(tokenizer, merged.config)


def _let_pad(into: Path) -> None:
    """Names the padding token of training in the copied tokenizer; without one it refuses two texts at once."""
    try:
        tokenizer = tokenizer_in(into)
    except ModelError:
        return
    if tokenizer.pad_token is not None or tokenizer.eos_token is None:
        return
    path = into / _TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "pad_token": tokenizer.eos_token}, indent=2) + "\n", encoding="utf-8")


def _copy_companions(folder: Path, into: Path) -> None:
    written = {path.name for path in into.iterdir()}
    for path in sorted(folder.iterdir()):
        is_wanted = any(fnmatchcase(path.name, pattern) for pattern in _COPIED)
        if is_wanted and path.is_file() and path.name not in written:
            shutil.copyfile(path, into / path.name)
    templates = folder / _TEMPLATES
    if templates.is_dir():
        (into / _TEMPLATES).mkdir(exist_ok=True)
        for path in sorted(templates.glob("*.jinja")):
            shutil.copyfile(path, into / _TEMPLATES / path.name)
