"""Memory runs out for real: an allocation that no machine has, and a process that may have no more."""

import dataclasses
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from tiny_models import LLAMA_ORDER, PLAN, VIT_ORDER, random_adapter, save_bpe, save_vit, side_images
from transformers import LlamaConfig, LlamaForCausalLM

from common import codec
from common.adapter import Adapter
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer.data import load_data
from worker.trainer.fitting import MicroBatch, OutOfMemory, largest_divisor, loaded
from worker.trainer.model import load_model
from worker.trainer.process import _Session, _Trainer
from worker.trainer_protocol import Evaluate, Evaluated, Load, Train, Trained, to_line

pytestmark = pytest.mark.torch

TOO_LARGE = 1 << 60


def allocate(size: int, *, fits: int) -> int:
    """As a training step whose activations grow with its examples."""
    return len(torch.empty(TOO_LARGE if size > fits else 1, dtype=torch.uint8))


def fit(limit: MicroBatch, *, fits: int, batch_size: int = 12) -> tuple[list[int], int]:
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        return allocate(size, fits=fits)

    _, found = limit.fit(work, batch_size=batch_size, doing="training at LoRA rank 8", device="cpu")
    return tried, found


@pytest.mark.parametrize(
    ("batch_size", "fits", "tried"),
    [(12, 12, [12]), (12, 11, [12, 6]), (12, 3, [12, 6, 3]), (12, 1, [12, 6, 3, 1]), (7, 6, [7, 1]), (1, 1, [1])],
)
def test_the_micro_batch_is_halved_until_it_fits(batch_size: int, fits: int, tried: list[int]) -> None:
    assert fit(MicroBatch(), fits=fits, batch_size=batch_size) == (tried, tried[-1])


def test_what_fitted_is_where_the_next_round_begins() -> None:
    limit = MicroBatch(at_most=6)
    assert fit(limit, fits=3) == ([6, 3], 3)
    assert fit(limit, fits=12) == ([3], 3)
    assert fit(limit, fits=12, batch_size=8) == ([2], 2)  # of another batch, the largest divisor up to 3


def test_it_is_told_what_was_tried() -> None:
    with capture_logs() as logs:
        fit(MicroBatch(), fits=6)
    (told,) = logs
    assert (told["log_level"], told["before"], told["micro_batch"], told["batch_size"]) == ("warning", 12, 6, 12)
    assert "allocate" in told["error"]


def test_one_example_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        OutOfMemory, match=r"rank 8: even one example at a time does not fit .* of cpu; set a smaller rank"
    ):
        fit(MicroBatch(), fits=0)


def test_another_error_is_not_tried_again() -> None:
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    with pytest.raises(RuntimeError, match="same dtype"):
        MicroBatch().fit(work, batch_size=4, doing="training at LoRA rank 8", device="cpu")
    assert tried == [4]


def test_what_filled_the_memory_is_let_go_before_the_next_try() -> None:
    seen: list[Any] = []

    def work(size: int) -> int:
        assert all(activations() is None for activations in seen)
        activations = torch.ones(4)
        seen.append(weakref.ref(activations))
        return allocate(size, fits=1)

    MicroBatch().fit(work, batch_size=4, doing="training at LoRA rank 8", device="cpu")
    assert len(seen) == 3


def test_a_model_that_does_not_fit_names_the_rank_and_the_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutOfMemory, match=r'rank 64 does not fit into the memory of cpu; .*"4bit".*smaller rank'):
        loaded(lambda: allocate(1, fits=0), lora_rank=64, device="cpu")
    assert "allocate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="else"):
        loaded(lambda: int("something else"), lora_rank=64, device="cpu")


@pytest.mark.parametrize(("number", "at_most", "divisor"), [(12, 5, 4), (12, 100, 12), (7, 6, 1)])
def test_the_largest_divisor(number: int, at_most: int, divisor: int) -> None:
    assert largest_divisor(number, at_most=at_most) == divisor


# --- the trainer


class TooManyAtOnce:
    """The site's own batches, and as much memory beside them as a much larger model would take."""

    def __init__(self, collator: Any, fits: int) -> None:
        self.collator, self.fits = collator, fits

    def __call__(self, examples: list[Any]) -> Any:
        allocate(len(examples), fits=self.fits)
        return self.collator(examples)


def trainer_with(folder: Path, *, fits: int) -> tuple[_Trainer, _Session, TooManyAtOnce]:
    """A trainer in whose memory so many examples fit."""
    data_config = DataConfig(train=str(folder / "train.jsonl"), holdout=0.25)
    config = WorkerConfig(model=ModelConfig(path=str(folder), device="cpu", offline=True), data=data_config)
    model = load_model(config.model, VIT_ORDER)
    preparation: Any = model.task.prepare(model.folder, model.base, model.labels, config.data)
    data = load_data(config.data, preparation, seed=1, offline=True)
    memory = preparation.collator = TooManyAtOnce(preparation.collator, fits)
    trainer = _Trainer(lambda _: None, threading.Event())
    # Not by a Load, which sets up logs and warnings for a whole process.
    session = trainer._session = _Session(config, model, preparation, data, 1, MicroBatch(), MicroBatch())
    write_slice(folder, random_adapter(session.model.spec, 4))
    return trainer, session, memory


def trained_with(folder: Path, *, fits: int) -> tuple[list[Trained], list[Adapter]]:
    """Two rounds of such a trainer, and the factors of each."""
    trainer, session, _ = trainer_with(folder, fits=fits)
    answers, factors = [], []
    for _ in range(2):
        answer = trainer.answer(to_line(train_order(folder)))
        assert isinstance(answer, Trained), answer
        answers.append(answer)
        layout = codec.Layout(session.model.spec, 4, codec.WireDtype.FLOAT32)
        factors.append(codec.decode((folder / "update").read_bytes(), layout, whose="the update"))
    return answers, factors


def write_slice(folder: Path, adapter: Adapter) -> None:
    (folder / "slice").write_bytes(codec.encode(adapter, codec.WireDtype.FLOAT32))


def train_order(folder: Path, **plan: Any) -> Train:
    todo = dataclasses.replace(PLAN, **plan)
    return Train(str(folder / "slice"), str(folder / "update"), 4, 1.0, "float32", todo)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_vit(tmp_path_factory.mktemp("vit"))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(16)))
    return folder


def test_the_trainer_begins_again_from_the_slice_and_trains_the_same_batch(vit: Path) -> None:
    with capture_logs() as logs:
        (first, second), (one, other) = trained_with(vit, fits=2)
    (whole, _), (expected, _) = trained_with(vit, fits=4)
    (told,) = [line for line in logs if "out of memory" in line["event"]]  # in the first round, not in the second
    assert (told["before"], told["micro_batch"]) == (4, 2)
    assert first.metrics["micro_batch"] == second.metrics["micro_batch"] == 2
    assert whole.metrics["micro_batch"] == 4
    assert first.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-4)
    for name, factors in expected.modules.items():
        np.testing.assert_array_equal(one.modules[name].lora_B, other.modules[name].lora_B)
        np.testing.assert_allclose(one.modules[name].lora_B, factors.lora_B, atol=1e-3)


def test_training_and_evaluation_each_remember_what_fitted_them(vit: Path) -> None:
    trainer, session, memory = trainer_with(vit, fits=2)
    test = to_line(Evaluate(str(vit / "slice"), 4, 1.0, "float32"))
    assert isinstance(trainer.answer(test), Evaluated)
    assert (session.evaluating.at_most, session.training.at_most) == (2, None)
    memory.fits = 4
    answer = trainer.answer(to_line(train_order(vit)))
    assert isinstance(answer, Trained)
    assert answer.metrics["micro_batch"] == 4
    assert session.evaluating.at_most == 2
    memory.fits = 1
    assert isinstance(trainer.answer(to_line(train_order(vit))), Trained)
    assert (session.evaluating.at_most, session.training.at_most) == (2, 1)


LIMITED = """
import json, resource, sys, threading
from pathlib import Path
from worker.trainer.process import _Trainer

trainer = _Trainer(lambda _: None, threading.Event())
requests = Path(sys.argv[1]).read_bytes().splitlines()
for line, mib in zip(requests, map(int, sys.argv[2:]), strict=True):
    if mib:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20), resource.RLIM_INFINITY))
    answer = trainer.answer(line)
    print(json.dumps([type(answer).__name__, getattr(answer, "message", "") or dict(getattr(answer, "metrics", {}))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_a_process_whose_memory_runs_out_goes_on_with_less(tmp_path: Path) -> None:
    # The logits of a batch are 16 x 128 x 10,000 numbers, 82 MB, and a step holds several such tensors.
    save_bpe(tmp_path)
    settings: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=10_000, **settings)).save_pretrained(tmp_path)
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": "Ada has apples. " * 60}) + "\n") * 20)
    config = WorkerConfig(
        model=ModelConfig(path=str(tmp_path), device="cpu", offline=True),
        data=DataConfig(train=str(tmp_path / "train.jsonl"), holdout=0.2, max_length=128),
        threads=1,
    )
    write_slice(tmp_path, random_adapter(load_model(config.model, LLAMA_ORDER).spec, 4))
    todo = to_line(train_order(tmp_path, local_steps=1, batch_size=16))
    (tmp_path / "requests").write_bytes(to_line(Load(config.model_dump_json(), LLAMA_ORDER)) + todo)
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "requests"), "0", "160"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith('["')]
    assert [kind for kind, _ in answers] == ["Loaded", "Trained"], found.stderr[-2000:]
    assert 1 <= answers[1][1]["micro_batch"] <= 8
    assert "again with fewer examples at once" in found.stderr
