"""A tiny experiment of simulated clients: its settings, and texts with labels in files beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulation.experiment import ExperimentConfig

LABELS = ("good_film", "bad_book", "very")
TRAIN: tuple[tuple[str, str], ...] = (
    ("a good film", "good_film"),
    ("the bad book", "bad_book"),
    ("very", "very"),
    ("not a very good book", "bad_book"),
    ("a very good film", "good_film"),
    ("good good good", "good_film"),
    ("the book", "bad_book"),
    ("very very", "very"),
)
TEST: tuple[tuple[str, str], ...] = (("good film", "good_film"), ("bad", "bad_book"), ("the very", "very"))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """As jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_texts(folder: Path) -> Path:
    """train.jsonl with names, test.jsonl with numbers for labels, labels.json."""
    write_rows(folder / "train.jsonl", [{"text": text, "label": label} for text, label in TRAIN])
    write_rows(folder / "test.jsonl", [{"text": text, "label": LABELS.index(label)} for text, label in TEST])
    (folder / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")
    return folder


def experiment_of(**sections: Mapping[str, Any]) -> ExperimentConfig:
    """An experiment in which some settings of some sections are others."""
    content: dict[str, dict[str, Any]] = {
        "model": {"path": "source", "task": "sequence-classification", "class_name_head": True, "device": "cpu"},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "labels_file": "labels.json", "max_length": 16},
        "clients": {"count": 2, "ranks": (2, 4), "per_round": 2, "min_examples": 1},
        "rounds": {"num_rounds": 2},
        "training": {"learning_rate": 1e-2, "local_steps": 2},
    }
    for name, settings in sections.items():
        content[name] = {k: v for k, v in {**content[name], **settings}.items() if v is not None}
    return ExperimentConfig.model_validate({"name": "tiny", "arms": [{"name": "raflora"}], **content})
