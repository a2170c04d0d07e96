"""The built-in example: its data, and that the committed base model is what its README says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_adapter
from transformers import AutoModelForImageClassification

from simulation.check_adapter import check_adapter
from simulation.digits import BASE_FOLDER, LABELS, digits_task, sample_for, sites_for, write_jsonl
from simulation.pretrain_digits import accuracy, as_pixels
from worker.config import DataConfig, ModelConfig
from worker.peft_format import write_peft_folder
from worker.trainer.data import read_rows
from worker.trainer.model import load_model
from worker.trainer.tasks import ImageClassification
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

ORDER = ModelOrder("image-classification", LABELS, ("all-linear",), (), 2, 0)


def test_no_image_is_in_two_parts() -> None:
    task = digits_task()
    assert [len(part.labels) for part in (task.pretrain, task.test, task.sites)] == [500, 300, 997]
    # The original has no two equal images, so turned back none may occur twice.
    upright = [task.pretrain.images, *(np.rot90(255 - p.images, -1, (1, 2)) for p in (task.test, task.sites))]
    assert len({image.tobytes() for part in upright for image in part}) == 1797


def test_the_sites_divide_all_of_their_data() -> None:
    parts = sites_for(["a", "b", "c"], alpha=1.0, seed=3)
    assert sum(len(part.labels) for part in parts.values()) == 997
    assert min(len(part.labels) for part in parts.values()) >= 32


def test_a_name_alone_decides_a_sites_data() -> None:
    assert np.array_equal(sample_for("ada").images, sample_for("ada").images)
    assert not np.array_equal(sample_for("ada").labels, sample_for("bob").labels)


def test_a_written_file_is_what_a_worker_reads(tmp_path: Path) -> None:
    digits = sample_for("ada", count=20)
    write_jsonl(digits, tmp_path / "new" / "train.jsonl")
    rows = list(read_rows(tmp_path / "new" / "train.jsonl"))
    assert [row["label"] for row in rows] == digits.labels.tolist()
    model = AutoModelForImageClassification.from_pretrained(BASE_FOLDER)
    preparation = ImageClassification().prepare(BASE_FOLDER, model, LABELS, DataConfig(train="-"))
    pixels = preparation.collator([preparation.example(row) for row in rows])["pixel_values"]
    assert np.allclose(pixels.numpy(), as_pixels(digits).numpy(), atol=1e-6)


def test_the_base_model_knows_upright_digits_and_no_sideways_ones() -> None:
    model = AutoModelForImageClassification.from_pretrained(BASE_FOLDER).eval()
    task = digits_task()
    assert accuracy(model, task.pretrain) > 0.95
    assert accuracy(model, task.test) < 0.2


def test_a_fresh_process_with_stock_peft_measures_an_exported_folder(tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(BASE_FOLDER), device="cpu", offline=True), ORDER)
    write_peft_folder(
        tmp_path / "adapter",
        random_adapter(model.spec, 2),
        scaling=1.0,
        base_model=str(BASE_FOLDER),
        task=ORDER.task,
        modules_to_save=(),
    )
    write_jsonl(sample_for("ada", count=50), tmp_path / "test.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "simulation.check_adapter", str(tmp_path / "adapter"), str(tmp_path / "test.jsonl")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found == check_adapter(tmp_path / "adapter", tmp_path / "test.jsonl", BASE_FOLDER)
    assert (found["num_examples"], len(found["load"])) == (50, 2)
