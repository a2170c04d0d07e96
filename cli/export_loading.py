"""The lines of Python that load what was exported, for every task. Pure text; nothing is loaded here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.export_origin import Origin
from cli.words import plain

_OF_SOMEBODY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # as nearly every model of the hub is called
_TEXTS = "sequence-classification"
FEATURES = "feature-classification"
_AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_PROCESSORS = {
    "sequence-classification": ("tokenizer", "AutoTokenizer"),
    "image-classification": ("processor", "AutoImageProcessor"),
    "causal-lm": ("tokenizer", "AutoTokenizer"),
}


@dataclass(frozen=True)
class Place:
    """What to load and from where."""

    where: str  # a folder or a hub id
    base_model: str  # a folder or a hub id; of no interest to a merged model
    merged: bool


def unknown_base(name: str) -> Iterator[str]:
    """A warning if the lines that are printed will hardly find the base model by this name."""
    if not _OF_SOMEBODY.fullmatch(name) and not Path(name).expanduser().is_dir():
        yield (
            f"warning: the base model is called {plain(name)!r}, which is neither a folder here nor a USER/NAME of the "
            "hub; name it with --model, and the lines above, the model card and adapter_config.json will say so"
        )


def loading_lines(origin: Origin, place: Place) -> list[str]:
    """Lines that can be pasted into Python where transformers and, unless merged, PEFT are installed."""
    if origin.task not in _AUTO_CLASSES and origin.task != FEATURES:
        return []
    return _merged_lines(origin, place) if place.merged else _adapter_lines(origin, place)


def _merged_lines(origin: Origin, place: Place) -> list[str]:
    auto_class, (name, processor) = _AUTO_CLASSES[origin.task], _PROCESSORS[origin.task]
    where = repr(plain(place.where))
    return [
        f"from transformers import {auto_class}, {processor}",
        f"model = {auto_class}.from_pretrained({where})",
        f"{name} = {processor}.from_pretrained({where})",
    ]


def _adapter_lines(origin: Origin, place: Place) -> list[str]:
    base = repr(plain(place.base_model))
    lines = ["from peft import PeftModel"]
    if origin.task == FEATURES:
        # Its base model is of a type of our own, which no auto class knows.
        lines.append("from worker.trainer.features import FeatureClassifier  # of the package raflora[worker]")
        loader = "FeatureClassifier"
    else:
        loader = _AUTO_CLASSES[origin.task]
        names = [loader, _PROCESSORS[origin.task][1]]
        lines.append(f"from transformers import {', '.join(names)}")
    # A head that was trained has the federation's classes; a frozen one has the checkpoint's own.
    trained = origin.labels and origin.modules_to_save
    labels = f", num_labels={len(origin.labels)}, ignore_mismatched_sizes=True" if trained else ""
    lines += [
        f"base = {loader}.from_pretrained({base}{labels})",
        f"model = PeftModel.from_pretrained(base, {plain(place.where)!r})",
    ]
    if origin.task in _PROCESSORS:
        name, processor = _PROCESSORS[origin.task]
        lines.append(f"{name} = {processor}.from_pretrained({base})")
    if origin.task == _TEXTS:
        # As in training: a base that was made to write, not to tell classes apart, has no padding token.
        lines += [
            "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
            "pad = getattr(base.config, 'pad_token_id', None)",
            "base.config.pad_token_id = tokenizer.pad_token_id if pad is None else pad",
        ]
    if origin.labels:
        lines.append(f"labels = {[plain(label) for label in origin.labels]!r}")
    return lines
