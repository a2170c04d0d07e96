"""Cameras mounted sideways: real handwritten digits that the base model has never seen from this side.

The base model (digits_base/) learned 500 upright digits. The sites hold others, turned by 90 degrees and inverted,
each site its own mixture. Comes with scikit-learn; nothing is downloaded.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulation.partition import dirichlet_partition, skewed_sample

BASE_FOLDER = Path(__file__).parent / "digits_base"
LABELS = tuple(str(digit) for digit in range(10))
PRETRAIN_EXAMPLES = 500
TEST_EXAMPLES = 300
_SEED = 2026  # of the one division into pretraining, sites and test
_SKLEARN_LEVELS = 16
_GREY_LEVELS = 255


@dataclass(frozen=True)
class Digits:
    """Grey images and what they show."""

    images: NDArray[np.uint8]  # [count, 8, 8]
    labels: NDArray[np.int64]  # [count]

    def take(self, indices: NDArray[np.int64]) -> "Digits":
        """Those at the indices."""
        return Digits(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class DigitsTask:
    """The three parts of the data: they share no image."""

    pretrain: Digits  # upright, as the base model saw them
    sites: Digits  # sideways and inverted, to be divided among the workers
    test: Digits  # sideways and inverted, nobody trains on them


def digits_task() -> DigitsTask:
    """The data, always divided the same way."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 # an extra that only the demo needs

    found = load_digits()
    images = np.round(found.images * (_GREY_LEVELS / _SKLEARN_LEVELS)).astype(np.uint8)
    every = Digits(images, found.target.astype(np.int64))
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(every.labels))
    pretrain, test, sites = np.split(order, [PRETRAIN_EXAMPLES, PRETRAIN_EXAMPLES + TEST_EXAMPLES])
    return DigitsTask(
        pretrain=every.take(pretrain), sites=_sideways(every.take(sites)), test=_sideways(every.take(test))
    )


def sites_for(names: Sequence[str], *, alpha: float = 1.0, seed: int = 0) -> dict[str, Digits]:
    """All of the sites' data divided among these workers."""
    sites = digits_task().sites
    parts = dirichlet_partition(sites.labels.tolist(), len(names), alpha=alpha, seed=seed, at_least=32)
    return {name: sites.take(part) for name, part in zip(names, parts, strict=True)}


def sample_for(name: str, *, count: int = 200, alpha: float = 1.0, seed: int = 0) -> Digits:
    """The data of one worker that knows only its name (a scaled container)."""
    sites = digits_task().sites
    return sites.take(skewed_sample(sites.labels.tolist(), name, count=count, alpha=alpha, seed=seed))


def write_jsonl(digits: Digits, path: Path) -> None:
    """One digit a line: `image` as rows of grey values from 0 to 255, `label` as its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for image, label in _pairs(digits):
            file.write(json.dumps({"image": image, "label": label}, separators=(",", ":")) + "\n")


def _pairs(digits: Digits) -> Iterable[tuple[list[list[int]], int]]:
    return zip(digits.images.tolist(), digits.labels.tolist(), strict=True)


def _sideways(digits: Digits) -> Digits:
    return Digits(_GREY_LEVELS - np.rot90(digits.images, axes=(1, 2)), digits.labels)
