"""Which examples and which base model results were computed with, as digests: a results folder keeps to them.

Settings name files; what a file holds may change under the same name. Nothing here reads data or imports torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.transfer import write_durably

CONTENTS_FILE = "contents.json"
_SETTINGS = {"train_examples": "data.train", "test_examples": "data.test", "base_model": "model.path"}


@dataclass(frozen=True)
class Contents:
    """SHA-256 of what an experiment is made of."""

    train_examples: str
    test_examples: str
    base_model: str  # of the weight files that the settings name


def digest_of_examples(examples: Iterable[Mapping[str, Any]]) -> str:
    """Of all values in their order, whatever they are: texts, numbers, arrays, tensors on the CPU."""
    total = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            content = _bytes_of(example[name])
            total.update(f"{name} {len(content)} ".encode() + content)
    return total.hexdigest()


def claim_contents(file: Path, contents: Contents) -> None:
    """Writes down what the results beside this file are computed with. Raises ConfigError if it was something else."""
    wanted = asdict(contents)
    if not file.is_file():
        write_durably(file, json.dumps(wanted, indent=2).encode())
        return
    try:
        found = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise ConfigError(f"{file}: not what raflora wrote; name another folder for the results") from None
    for name, digest in wanted.items():
        if found.get(name) != digest:
            raise ConfigError(
                f"{_SETTINGS[name]}: not what earlier runs in this results folder were computed with ({file} holds its "
                "digest); name another folder for the results, or delete the old one"
            )


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int | list):  # lists of tokens may differ in length, which no array can
        return repr(value).encode()
    array = np.asarray(value)
    return f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()
