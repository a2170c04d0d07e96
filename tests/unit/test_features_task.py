"""Rows that hold features become examples; whatever is none is refused with its place."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from split_encoders import CLASS_NAMES, LABELS, feature_order, split
from tiny_models import PLAN, same

from common.adapter import initial_adapter
from common.errors import InvalidRequest
from worker.config import DataConfig, ModelConfig
from worker.trainer.data import DataError, Row, load_data
from worker.trainer.features import collate_features
from worker.trainer.model import load_model, read_adapter, write_adapter
from worker.trainer.task import Preparation
from worker.trainer.tasks import task_named
from worker.trainer.training import train

pytestmark = pytest.mark.torch


def preparation(width: int = 3, layers: int = 0, **columns: Any) -> Preparation:
    shape = SimpleNamespace(config=SimpleNamespace(hidden_size=width, num_hidden_layers=layers))
    return task_named("feature-classification").prepare(
        Path(), shape, ("no", "yes"), DataConfig(train="train.jsonl", **columns)
    )


def row(features: Any, label: Any = "yes") -> Row:
    return Row("train.jsonl, line 7", Path(), {"features": features, "label": label})


def test_a_list_of_numbers_is_an_example() -> None:
    example = preparation().example(row([1, 2.5, -3]))
    assert example["labels"] == 1
    assert example["features"].dtype == np.float32
    assert example["features"].tolist() == [1.0, 2.5, -3.0]


def test_token_features_are_rows_of_numbers() -> None:
    example = preparation(layers=2).example(row([[1, 2, 3], [4, 5, 6]], label=0))
    assert example["features"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert example["labels"] == 0


def test_the_columns_have_other_names_if_the_site_says_so() -> None:
    found = preparation(feature_column="vector", label_column="intent").example(
        Row("x", Path(), {"vector": [1, 2, 3], "intent": "no"})
    )
    assert (found["features"].tolist(), found["labels"]) == ([1, 2, 3], 0)


@pytest.mark.parametrize(
    "features",
    ["text", "[1, 2, 3]", 3, [], [1, 2], [1, 2, 3, 4], [[1, 2, 3]], ["a", "b", "c"], [1, [2], 3], {}],
)
def test_what_is_no_feature_vector_is_refused_with_its_place(features: Any) -> None:
    with pytest.raises(DataError, match=r"line 7: column 'features' (holds .*; 3 numbers are expected|is empty)"):
        preparation().example(row(features))


@pytest.mark.parametrize("features", [[1, 2, 3], [[1, 2]], [[]], [[1, 2, 3], [1, 2]]])
def test_what_is_no_list_of_token_features_is_refused(features: Any) -> None:
    with pytest.raises(DataError, match="rows of 3 numbers, one a token, are expected"):
        preparation(layers=1).example(row(features))


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300, None])
def test_what_is_not_finite_is_refused(number: float | None) -> None:
    with pytest.raises(DataError, match="numbers that are not finite"):
        preparation().example(row([1.0, number, 3.0]))


def test_a_label_of_nobody_is_refused() -> None:
    with pytest.raises(DataError, match="none of the federation's 2 labels"):
        preparation().example(row([1, 2, 3], label="maybe"))


def test_a_batch_of_vectors_is_stacked() -> None:
    batch = collate_features([preparation().example(row([n, 2, 3])) for n in range(4)])
    assert batch.keys() == {"features", "labels"}
    assert batch["features"].shape == (4, 3)
    assert batch["labels"].tolist() == [1, 1, 1, 1]


def test_a_batch_of_tokens_is_padded_and_masked() -> None:
    task = preparation(layers=1)
    batch = collate_features([task.example(row([[1, 2, 3]])), task.example(row([[4, 5, 6], [7, 8, 9]]))])
    assert batch["features"].tolist() == [[[1, 2, 3], [0, 0, 0]], [[4, 5, 6], [7, 8, 9]]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_the_worker_knows_the_task_by_name() -> None:
    with pytest.raises(InvalidRequest, match="feature-classification"):
        task_named("feature-clasification")


@pytest.mark.parametrize("trained_layers", [0, 2])
def test_a_worker_trains_from_a_file_of_features(tmp_path: Path, trained_layers: int) -> None:
    splitted = split(tmp_path, trained_layers)
    rows = [
        {"features": example["features"].tolist(), "label": CLASS_NAMES[label]}
        for example, label in zip(splitted.examples(), LABELS, strict=True)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    results = []
    for name in ("train.jsonl", "train.parquet"):
        config = DataConfig(train=str(tmp_path / name), test=str(tmp_path / name))
        model = splitted.model()
        task = model.task.prepare(model.folder, model.base, model.labels, config)
        examples = load_data(config, task, seed=1, offline=True).train
        write_adapter(model, initial_adapter(model.spec, 4, seed=5), scaling=1.0)
        train(model, examples, PLAN, collator=task.collator, memory_batch=None, report=lambda *_: None)
        results.append(read_adapter(model))
    assert same(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("trained_layers", [0, 2])
def test_a_gpu_says_what_the_cpu_says(tmp_path: Path, trained_layers: int) -> None:
    splitted = split(tmp_path, trained_layers)
    cpu = splitted.model()
    gpu = load_model(
        ModelConfig(path=str(splitted.base_folder), device="cuda", offline=True),
        feature_order(trained_layers),
    )
    batch = collate_features(splitted.examples())
    with torch.inference_mode():
        there = gpu.live.train(False)(**{name: each.cuda() for name, each in batch.items()}).logits.cpu()
        torch.testing.assert_close(there, cpu.live.train(False)(**batch).logits, atol=1e-3, rtol=1e-3)
