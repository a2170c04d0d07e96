"""Loads an exported folder the way a user would, with stock PEFT, and measures it.

    python -m simulation.check_adapter FOLDER DATA [--base PATH]

Prints one JSON object. Nothing of the federation takes part: what counts is what PEFT itself makes of the folder.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from simulation.digits import BASE_FOLDER
from worker.config import DataConfig
from worker.trainer.data import read_rows
from worker.trainer.quiet import silence_libraries
from worker.trainer.tasks import ImageClassification


def check_adapter(folder: Path, data: Path, base: Path) -> dict[str, Any]:
    """The accuracy of base and adapter on a file of images, and the two lines that load them."""
    from peft import PeftModel  # noqa: PLC0415 - after worker.trainer, which quietens what it imports

    model = AutoModelForImageClassification.from_pretrained(base, local_files_only=True, use_safetensors=True)
    labels = [name for _, name in sorted(model.config.id2label.items())]
    preparation = ImageClassification().prepare(base, model, labels, DataConfig(train=str(data)))
    batch = preparation.collator([preparation.example(row) for row in read_rows(data)])
    base_accuracy = _accuracy(model.eval(), batch)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    return {
        "accuracy": _accuracy(adapted, batch),
        "base_accuracy": base_accuracy,
        "num_examples": len(batch["labels"]),
        "load": [
            f'base = AutoModelForImageClassification.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{folder}")',
        ],
    }


def _accuracy(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    with torch.inference_mode():
        named = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    return float((named == batch["labels"]).double().mean())


def main(arguments: list[str]) -> None:
    """Prints what check_adapter found."""
    parser = argparse.ArgumentParser(prog="python -m simulation.check_adapter")
    parser.add_argument("folder", type=Path, help="an exported PEFT folder")
    parser.add_argument("data", type=Path, help="a jsonl, csv or parquet file of images")
    parser.add_argument("--base", type=Path, default=BASE_FOLDER, help="the base model's folder")
    given = parser.parse_args(arguments)
    silence_libraries()
    print(json.dumps(check_adapter(given.folder, given.data, given.base)))


if __name__ == "__main__":
    main(sys.argv[1:])
