"""What an experiment's settings become: the model, the order, and the very examples that a worker would have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments import LABELS, TEST, TRAIN, experiment_of, write_rows, write_texts
from tiny_models import PLAN, save_bert, save_vit, side_images

from common.errors import ConfigError
from simulation.digits import BASE_FOLDER
from simulation.prepare import Files, Prepared, prepare
from worker.config import DataConfig
from worker.trainer.data import LocalData, load_data
from worker.trainer.model import load_model, read_adapter
from worker.trainer.task import ModelError
from worker.trainer.training import evaluate, train

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAFLORA_DATA", raising=False)
    save_bert(tmp_path / "source", layers=2)
    return write_texts(tmp_path)


def prepared(folder: Path, told: list[tuple[int, int]] | None = None, **sections: Any) -> Prepared:
    files = Files(experiment_folder=folder, cache_dir=folder / "cache", base_folder=folder / "base")
    said = [] if told is None else told
    return prepare(experiment_of(**sections), files, lambda done, total: said.append((done, total)))


def local_round(found: Prepared) -> Mapping[str, float]:
    """Loads, trains and evaluates as a simulated client does."""
    model = load_model(found.model_config, found.order(lora_rank=2, seed=3))
    collator = found.collator_for(model)
    train(model, found.train_examples, PLAN, collator=collator, memory_batch=None, report=lambda *_: None)
    assert read_adapter(model).rank == 2
    return evaluate(model, found.test_examples, collator=collator, memory_batch=None, report=lambda *_: None).metrics


def same_examples(ours: Any, theirs: Any) -> bool:
    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return bool(torch.equal(one, other))
        return bool(one == other)

    return len(ours) == len(theirs) and all(
        one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("trained_layers", [0, 1])
def test_a_class_name_head_trains_on_features(folder: Path, trained_layers: int) -> None:
    layers = {"trained_layers": trained_layers, "target_modules": ("query", "value")}
    told: list[tuple[int, int]] = []
    found = prepared(folder, told, model=layers)
    assert found.task == "feature-classification"
    assert found.labels == LABELS
    assert found.target_modules == (("query", "value") if trained_layers else ("projection",))
    assert (len(found.train_examples), len(found.test_examples)) == (len(TRAIN), len(TEST))
    assert found.train_examples[0]["features"].ndim == (2 if trained_layers else 1)
    assert [example["labels"] for example in found.train_examples] == found.train_labels.tolist()
    assert [example["labels"] for example in found.test_examples[0:3]] == found.test_labels.tolist()
    assert told[-1] == (len(TRAIN) + len(TEST), len(TRAIN) + len(TEST))
    assert local_round(found).keys() == {"accuracy", "eval_loss"}


def test_what_was_encoded_is_not_encoded_again(folder: Path) -> None:
    first = prepared(folder)
    told: list[tuple[int, int]] = []
    again = prepared(folder, told)
    assert not told
    assert np.array_equal(first.train_examples[-1]["features"], again.train_examples[len(TRAIN) - 1]["features"])
    with pytest.raises(IndexError):
        again.train_examples[len(TRAIN)]


def test_a_whole_text_model_has_the_examples_of_a_worker(folder: Path) -> None:
    found = prepared(folder, model=WHOLE)
    model = load_model(found.model_config, found.order(lora_rank=2, seed=3))
    config = DataConfig(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), max_length=16)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    theirs: LocalData = load_data(config, preparation, seed=0, offline=True)
    assert same_examples(found.train_examples, theirs.train)
    assert same_examples(found.test_examples, theirs.test)
    assert found.modules_to_save == ("classifier",)
    assert local_round(found).keys() == {"accuracy", "eval_loss"}


def test_an_image_model_has_the_examples_of_a_worker(tmp_path: Path) -> None:
    save_vit(tmp_path / "vit")
    write_rows(tmp_path / "train.jsonl", side_images(6))
    write_rows(tmp_path / "test.jsonl", side_images(4, seed=1))
    found = prepared(
        tmp_path,
        model={
            "path": str(tmp_path / "vit"),
            "task": "image-classification",
            "class_name_head": False,
            "target_modules": ("q_proj",),
        },
        data={"labels": ("left", "right"), "labels_file": None},
    )
    model = load_model(found.model_config, found.order(lora_rank=2, seed=3))
    config = DataConfig(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    assert same_examples(found.train_examples, load_data(config, preparation, seed=0, offline=True).train)
    assert local_round(found).keys() == {"accuracy", "eval_loss"}


def test_digits_are_the_demo_s_base_model_and_data(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = prepared(
        tmp_path,
        model={"path": "digits", "task": "image-classification", "class_name_head": False},
        data={"train": "digits", "test": "digits", "labels_file": None, "max_train": 20, "max_test": 30},
    )
    assert found.model_config.path == str(BASE_FOLDER)
    assert local_round(found)["accuracy"] < 0.5


WHOLE = {"class_name_head": False, "target_modules": ("query",), "modules_to_save": ("classifier",)}


def other_train(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [{"text": text, "label": label} for text, label in (*TRAIN[1:], TRAIN[0])])


def other_test(folder: Path) -> None:
    write_rows(folder / "test.jsonl", [{"text": "good book", "label": 0}])


def other_labels(folder: Path) -> None:
    (folder / "labels.json").write_text(json.dumps(LABELS[::-1]))


def other_model(folder: Path) -> None:
    save_bert(folder / "source", layers=3)


@pytest.mark.parametrize("model", [{}, WHOLE])
@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (other_train, r"data\.train"),
        (other_test, r"data\.test"),
        (other_labels, r"data\.train"),
        (other_model, r"model\.path"),
    ],
)
def test_what_changes_under_the_same_settings_is_noticed(folder: Path, change: Any, setting: str, model: Any) -> None:
    first = prepared(folder, model=model)
    assert prepared(folder, model=model).contents == first.contents
    change(folder)
    with pytest.raises(ConfigError, match=f"{setting}: not what earlier runs in this results folder were computed"):
        prepared(folder, model=model)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"class_name_head": False, "trained_layers": 1}}, "trained_layers is for class_name_head"),
        ({"model": {"task": "image-classification"}}, "class_name_head is for task 'sequence-classification'"),
        ({"model": {"modules_to_save": ("classifier",)}}, "a class-name head stays frozen"),
        ({"data": {"train": "digits", "test": "digits", "labels_file": None}}, "'digits' holds images"),
        ({"model": {"class_name_head": False}, "data": {"max_length": 131_073}}, r"data\.max_length: .*found 131073"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(folder: Path, sections: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(folder, **sections)


def test_a_model_that_is_nowhere_or_no_model_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor in the local hub cache"):
        prepared(folder, model={"path": "nobody/nothing", "offline": True})
    (folder / "source" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        prepared(folder, model={"class_name_head": False})
