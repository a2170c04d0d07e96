"""The text classification example as it is shipped: its two files, its data, and the trainer that loads them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import save_bert

from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from worker.config import WorkerConfig
from worker.trainer_protocol import Load, Loaded, ModelOrder, answer_from_line, to_line

pytestmark = pytest.mark.torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "text-classification"


@pytest.fixture
def in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)


@pytest.mark.usefixtures("in_its_folder")
def test_every_label_of_the_federation_has_sentences_and_no_other() -> None:
    federation = load_settings(CoordinatorConfig, Path("federation.toml"), environ={})
    lines = [json.loads(line) for line in Path("train.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = Counter(line["label"] for line in lines)
    assert set(counts) == set(federation.model.labels)
    assert min(counts.values()) >= 8
    assert federation.rounds.min_clients == 2


@pytest.mark.usefixtures("in_its_folder")
def test_a_worker_loads_what_the_two_files_say(tmp_path: Path) -> None:
    federation = load_settings(CoordinatorConfig, Path("federation.toml"), environ={})
    overrides = [f"model.path={save_bert(tmp_path / 'base')}", f"state_dir={tmp_path}", "threads=1"]
    site = load_settings(
        WorkerConfig, Path("worker.toml"), overrides=[*overrides, "model.offline=true", "model.device=cpu"], environ={}
    )
    order = ModelOrder(
        task=federation.model.task,
        labels=federation.model.labels,
        target_modules=federation.adapter.target_modules,
        modules_to_save=federation.adapter.modules_to_save,
        lora_rank=min(site.rank, federation.adapter.global_rank),
        seed=federation.rounds.seed,
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "worker.trainer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as trainer:
        assert trainer.stdin
        assert trainer.stdout
        trainer.stdin.write(to_line(Load(site.model_dump_json(), order, federation.name)))
        trainer.stdin.flush()
        answer = answer_from_line(trainer.stdout.readline())
        trainer.kill()
    assert isinstance(answer, Loaded), answer
    assert [name.rpartition(".")[2] for name, *_ in answer.modules] == ["query", "value"]
    assert all(name.startswith("bert.encoder.layer.0.attention.") for name, *_ in answer.modules)
    assert {name.partition(".")[0] for name, _ in answer.tensors} == {"classifier"}
    assert answer.num_examples == 21  # nine of thirty are held out
