"""Dry training steps: examples of the model's true shape, memory and time of real steps on the CPU."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import BERT_ORDER, LLAMA_ORDER, MOODS, VIT_ORDER, save_bert, save_vit, tiny_llama

from common.errors import InvalidRequest
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer import dry_run
from worker.trainer.dry_run import Bench, load_bench, longest_example, measure
from worker.trainer.features import FeatureClassifier, FeatureConfig
from worker.trainer.model import read_adapter
from worker.trainer_protocol import (
    DryRun,
    DryRunDone,
    ModelOrder,
    answer_from_line,
    request_from_line,
    to_line,
)

pytestmark = pytest.mark.torch

WIDTH = 1024
FEATURES_ORDER = ModelOrder(
    task="feature-classification",
    labels=MOODS,
    target_modules=("projection",),
    modules_to_save=(),
    lora_rank=8,
    seed=1,
)
MIB = 1 << 20


def save_wide_features(folder: Path, *, layers: int = 0) -> Path:
    config = FeatureConfig(  # type: ignore[call-arg] # the number of labels is every configuration's
        hidden_size=WIDTH if not layers else 16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=len(MOODS),
    )
    FeatureClassifier(config).save_pretrained(folder)
    return folder


def bench_of(folder: Path, order: ModelOrder, max_length: int = 12) -> Bench:
    config = WorkerConfig(
        model=ModelConfig(path=str(folder), device="cpu", offline=True),
        data=DataConfig(train="there is no such file.jsonl", max_length=max_length),
    )
    return load_bench(config, order)


def run(order: ModelOrder, rank: int, *, micro_batch: int = 2, steps: int = 4) -> DryRun:
    return DryRun("{}", order, lora_rank=rank, micro_batch=micro_batch, steps=steps)


def ignore(step: int, total_steps: int, train_loss: float) -> None:
    pass


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_of(save_wide_features(tmp_path_factory.mktemp("wide")), FEATURES_ORDER)


def test_a_language_model_is_measured_on_as_many_tokens_as_the_settings_allow(tmp_path: Path) -> None:
    bench = bench_of(tiny_llama(tmp_path, longest=40), LLAMA_ORDER, max_length=32)
    assert (len(bench.example["input_ids"]), len(bench.example["labels"])) == (32, 32)
    assert measure(bench, run(LLAMA_ORDER, 2), ignore).seconds > 0
    assert len(longest_example(bench.model, 64)["input_ids"]) == 40, "the model has no more positions"


def test_a_text_is_as_long_as_model_and_tokenizer_take_it(tmp_path: Path) -> None:
    bench = bench_of(save_bert(tmp_path), BERT_ORDER, max_length=100)
    assert (len(bench.example["input_ids"]), bench.example["labels"]) == (16, 0)
    assert measure(bench, run(BERT_ORDER, 8), ignore).peak_bytes > MIB


def test_an_image_has_the_model_s_channels_and_size(tmp_path: Path) -> None:
    bench = bench_of(save_vit(tmp_path), VIT_ORDER)
    assert bench.example["pixel_values"].shape == (1, 8, 8)
    assert measure(bench, run(VIT_ORDER, 2), ignore).seconds > 0


def test_features_are_pooled_or_as_many_as_tokens(wide: Bench, tmp_path: Path) -> None:
    assert wide.example["features"].shape == (WIDTH,)
    order = replace(FEATURES_ORDER, target_modules=("all-linear",))
    bench = bench_of(save_wide_features(tmp_path, layers=1), order, max_length=12)
    assert bench.example["features"].shape == (12, 16)
    assert measure(bench, run(order, 8), ignore).seconds > 0


def test_memory_follows_the_rank_by_what_factors_gradients_and_optimizer_take(wide: Bench) -> None:
    small, large, small_again = (measure(wide, run(FEATURES_ORDER, rank), ignore).peak_bytes for rank in (8, 512, 8))
    # Two factors of 1024 numbers a rank; each is there as weight, gradient and two moments of the optimizer.
    at_least = (512 - 8) * 2 * WIDTH * 4 * 4
    assert small > 50 * MIB, "torch alone takes more"
    # A CPU's resident memory is off by a few MiB now and then; what is expected here is 16 MiB.
    assert 0.7 * at_least < large - small < 4 * at_least
    assert large - small_again > at_least / 2, "what a larger rank took counts for a smaller one after it"


def test_nothing_is_learnt_and_every_step_is_told(wide: Bench) -> None:
    steps: list[tuple[int, int]] = []
    measure(wide, run(FEATURES_ORDER, 4, steps=3), lambda step, total, _: steps.append((step, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    trained = read_adapter(wide.model)
    assert trained.rank == 4
    assert not trained.modules["body.projection"].lora_B.any()


def test_the_time_of_a_step_is_the_median_after_the_warm_up(wide: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter((7.0, 107.0, 108.0, 110.0, 113.0))  # the second step takes 100 s, then 1, 2 and 3
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    assert measure(wide, run(FEATURES_ORDER, 4, steps=5), ignore).seconds == 2.0


def test_steps_that_are_all_warm_up_are_refused(wide: Bench) -> None:
    with pytest.raises(InvalidRequest, match="more than the 2 of warm-up"):
        measure(wide, run(FEATURES_ORDER, 4, steps=2), ignore)


def test_what_a_report_raises_ends_the_measurement_and_the_model_lives_on(wide: Bench) -> None:
    def stop(step: int, total_steps: int, train_loss: float) -> None:
        raise KeyError("nobody wants it")

    with pytest.raises(KeyError):
        measure(wide, run(FEATURES_ORDER, 4), stop)
    assert all(p.grad is None for p in wide.model.live.parameters())
    assert measure(wide, run(FEATURES_ORDER, 4), ignore).seconds > 0


def test_an_input_of_another_kind_is_refused_by_name(wide: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide.model.base, "main_input_name", "input_values", raising=False)
    with pytest.raises(InvalidRequest, match="FeatureClassifier takes 'input_values'"):
        longest_example(wide.model, 8)


def test_request_and_answer_survive_the_pipe() -> None:
    request = DryRun("{}", BERT_ORDER, lora_rank=8, micro_batch=2, steps=5, lora_dropout=0.1)
    assert request_from_line(to_line(request)) == request
    answer = DryRunDone(1 << 34, 0.25, "ab" * 32, 64, "cuda:0", 1 << 35)
    assert answer_from_line(to_line(answer)) == answer
