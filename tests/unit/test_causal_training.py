"""A round of local work on a tiny Llama, through trl: exact, repeatable, and nothing of it leaves."""

import dataclasses
import json
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LLAMA_ORDER, PLAN, random_adapter, same, tiny_llama, word_problems

from common.adapter import Adapter, initial_adapter
from common.codec import encode
from worker.config import DataConfig, ModelConfig
from worker.trainer import language_trainer
from worker.trainer.data import LocalData, load_data
from worker.trainer.model import AdaptedModel, load_model, read_adapter, write_adapter
from worker.trainer.task import Preparation
from worker.trainer.training import Diverged, Outcome, Pruning, evaluate, train
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

EXACT: dict[str, Any] = {"learning_rate": 1e-2, "max_grad_norm": 1e9}


@dataclasses.dataclass(frozen=True)
class Site:
    model: AdaptedModel
    preparation: Preparation
    data: LocalData

    def trained(
        self, start: Adapter, memory_batch: int | None = None, pruning: Pruning | None = None, **plan: Any
    ) -> tuple[Adapter, Outcome]:
        write_adapter(self.model, start, scaling=1.0)
        outcome = train(
            self.model,
            self.data.train,
            dataclasses.replace(PLAN, **plan),
            collator=self.preparation.collator,
            memory_batch=memory_batch,
            report=lambda *_: None,
            pruning=pruning,
        )
        return read_adapter(self.model), outcome

    def evaluated(self, adapter: Adapter, memory_batch: int | None = None) -> dict[str, float]:
        write_adapter(self.model, adapter, scaling=1.0)
        outcome = evaluate(
            self.model,
            self.data.test,
            collator=self.preparation.collator,
            memory_batch=memory_batch,
            report=lambda *_: None,
        )
        return dict(outcome.metrics)

    def start(self) -> Adapter:
        return initial_adapter(self.model.spec, 4, seed=5)


def site_of(
    folder: Path, *, dtype: Any = "auto", quantization: Any = "none", order: ModelOrder = LLAMA_ORDER, **data: Any
) -> Site:
    config = ModelConfig(path=str(folder), device="cpu", dtype=dtype, quantization=quantization, offline=True)
    model = load_model(config, order)
    # Of unequal lengths, so that a mean over examples is not a mean over tokens.
    rows = [{**row, "answer": " ".join([row["answer"]] * (1 + n % 4))} for n, row in enumerate(word_problems(24))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = DataConfig(
        train=str(folder / "train.jsonl"), holdout=0.25, prompt_column="question", response_column="answer", **data
    )
    preparation = model.task.prepare(model.folder, model.base, model.labels, columns)
    return Site(model, preparation, load_data(columns, preparation, seed=1, offline=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def site(folder: Path) -> Site:
    return site_of(folder, max_length=200)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Site:
    return site_of(folder, max_length=200, packing=True)


def assert_close(one: Adapter, other: Adapter) -> None:
    for name, factors in one.modules.items():
        np.testing.assert_allclose(other.modules[name].lora_A, factors.lora_A, atol=1e-4)
        np.testing.assert_allclose(other.modules[name].lora_B, factors.lora_B, atol=1e-4)


def test_the_same_slice_plan_and_data_give_the_same_bytes(site: Site) -> None:
    first, _ = site.trained(site.start())
    site.trained(random_adapter(site.model.spec, 2), seed=99)  # whatever came between
    again, _ = site.trained(site.start())
    assert encode(again) == encode(first)
    assert not same(first, site.start())
    assert encode(site.trained(site.start(), seed=8)[0]) != encode(first)


def test_training_learns(site: Site) -> None:
    before = site.evaluated(site.start())
    adapter, _ = site.trained(site.start(), local_steps=60, learning_rate=5e-2)
    after = site.evaluated(adapter)
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    assert after["token_accuracy"] > before["token_accuracy"]


@pytest.fixture(params=["own loss", "fused head"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a loss, whatever the size of the batch."""
    if request.param == "fused head":
        monkeypatch.setattr(language_trainer, "MAX_LOGITS_BYTES", 0)
    return str(request.param)


def test_many_logits_teach_what_few_do(site: Site, packed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (site, packed):
        with monkeypatch.context() as changed:
            changed.setattr(language_trainer, "MAX_LOGITS_BYTES", 0)
            fused, told = each.trained(each.start(), **EXACT)
        own, also = each.trained(each.start(), **EXACT)
        assert not same(own, each.start())
        assert_close(own, fused)
        assert told.metrics["train_loss"] == pytest.approx(also.metrics["train_loss"], rel=1e-4)


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("memory_batch", [1, 2])
@pytest.mark.parametrize("kind", ["site", "packed"])
def test_every_token_weighs_the_same_in_however_many_parts(
    kind: str, memory_batch: int, request: pytest.FixtureRequest
) -> None:
    site: Site = request.getfixturevalue(kind)
    # 18 examples in batches of 4, the last of 2; packed there are fewer.
    plan: dict[str, Any] = {"local_steps": 0, "local_epochs": 1.0, **EXACT}
    whole, measured = site.trained(site.start(), **plan)
    parts, measured_in_parts = site.trained(site.start(), memory_batch, **plan)
    assert measured_in_parts.metrics["train_loss"] == pytest.approx(measured.metrics["train_loss"], rel=1e-5)
    assert_close(whole, parts)


@pytest.mark.usefixtures("head")
def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(site: Site) -> None:
    count = len(site.data.train)
    _, outcome = site.trained(site.start(), batch_size=count, local_steps=1)
    write_adapter(site.model, site.start(), scaling=1.0)
    assert outcome.metrics["train_loss"] == pytest.approx(mean_loss(site, site.data.train), rel=1e-5)


def mean_loss(site: Site, examples: Any) -> float:
    """One example after the other, by the model itself and in ten lines."""
    losses = []
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            site.model.live.eval()
            scores = torch.log_softmax(site.model.live(input_ids=ids).logits[0, :-1], dim=-1)
        losses += [float(-scores[n, label]) for n, label in enumerate(labels[1:]) if label != -100]
    return float(np.mean(losses))


def test_the_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch(site: Site) -> None:
    adapter = random_adapter(site.model.spec, 4)
    found = site.evaluated(adapter)
    assert found["eval_loss"] == pytest.approx(mean_loss(site, site.data.test), rel=1e-5)
    assert site.evaluated(adapter, memory_batch=1) == pytest.approx(found, rel=1e-5)
    assert same(read_adapter(site.model), adapter)
    assert found.keys() == {"eval_loss", "token_accuracy"}


@pytest.mark.usefixtures("head")
def test_packed_examples_teach_what_they_teach_alone(site: Site, packed: Site) -> None:
    assert packed.data.num_examples == site.data.num_examples == 18 > len(packed.data.train)
    plan: dict[str, Any] = {"local_steps": 1, "batch_size": 18, **EXACT}
    alone, loss = site.trained(site.start(), **plan)
    together, packed_loss = packed.trained(packed.start(), **plan)
    assert packed_loss.metrics["train_loss"] == pytest.approx(loss.metrics["train_loss"], rel=1e-5)
    assert_close(alone, together)


def test_packed_training_repeats_itself(packed: Site) -> None:
    assert encode(packed.trained(packed.start())[0]) == encode(packed.trained(packed.start())[0])


def test_dropout_is_drawn_from_the_plans_seed_and_ends_with_the_round(site: Site) -> None:
    plain, _ = site.trained(site.start())
    first, second = (site.trained(site.start(), lora_dropout=0.5)[0] for _ in range(2))
    assert encode(first) == encode(second) != encode(plain)
    assert encode(site.trained(site.start())[0]) == encode(plain)


def test_lora_A_can_stay_frozen(site: Site) -> None:
    adapter, _ = site.trained(site.start(), freezes_lora_A=True)
    for name, factors in site.start().modules.items():
        assert np.array_equal(adapter.modules[name].lora_A, factors.lora_A)
        assert (adapter.modules[name].lora_B != 0).any()


@pytest.mark.usefixtures("head")
def test_the_pruning_term_counts_once_for_a_batch(site: Site) -> None:
    start = random_adapter(site.model.spec, 4)
    plan: dict[str, Any] = {"local_steps": 1, "batch_size": 6}
    _, plain = site.trained(start, **plan)
    for memory_batch in (None, 1, 4):
        _, pruned = site.trained(start, memory_batch, Pruning(share=0.5, penalty=0.5), **plan)
        tail = sum(np.linalg.norm(f.lora_B[:, 2:]) * np.linalg.norm(f.lora_A[2:]) for f in start.modules.values())
        difference = pruned.metrics["train_loss"] - plain.metrics["train_loss"]
        assert difference == pytest.approx(0.5 * float(tail), rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_task_and_not_the_trainer(site: Site) -> None:
    healthy, _ = site.trained(site.start())
    with pytest.raises(Diverged, match="learning rate"):
        site.trained(site.start(), learning_rate=1e30, local_steps=5, max_grad_norm=1e30)
    assert encode(site.trained(site.start())[0]) == encode(healthy)


def test_the_model_is_left_without_what_trl_put_on_it(site: Site) -> None:
    for _ in range(2):
        site.trained(site.start(), local_steps=1)
        site.evaluated(site.start())
    assert "forward" not in vars(site.model.base)
    assert all(parameter.grad is None for parameter in site.model.live.parameters())


def test_a_bfloat16_base_repeats_itself_and_keeps_lora_in_float32(tmp_path: Path) -> None:
    site = site_of(tiny_llama(tmp_path), dtype="bfloat16")
    first, second = (encode(site.trained(site.start())[0]) for _ in range(2))
    assert first == second
    assert {p.dtype for p in site.model.live.parameters() if p.requires_grad} == {torch.float32}
    assert "forward" not in vars(site.model.base)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quantized")
def test_over_a_quantised_base_lora_stays_float32(folder: Path) -> None:
    quantised = site_of(folder, quantization="4bit", max_length=200)
    start = quantised.start()
    trained, outcome = quantised.trained(start)
    assert np.isfinite(outcome.metrics["train_loss"])
    assert {p.dtype for p in quantised.model.live.parameters() if p.requires_grad} == {torch.float32}
    for name, factors in trained.modules.items():
        for array, before in ((factors.lora_A, start.modules[name].lora_A), (factors.lora_B, 0.0)):
            assert np.isfinite(array).all()
            assert (array != before).any()
            assert (array.view(np.uint32) & 0xFFFF).any(), "numbers that bfloat16 could hold have been rounded to it"


def test_a_head_that_is_trained_whole_learns(tmp_path: Path) -> None:
    order = dataclasses.replace(LLAMA_ORDER, modules_to_save=("lm_head",))
    site = site_of(tiny_llama(tmp_path), order=order)
    start = random_adapter(site.model.spec, 4)
    adapter, _ = site.trained(start)
    assert (adapter.tensors["lm_head.weight"] != start.tensors["lm_head.weight"]).any()


def test_nothing_speaks_to_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl tells its makers about every trainer unless it is kept from it."""
    heard: list[object] = []

    def refuse(_: socket.socket, address: object) -> None:
        heard.append(address)
        raise OSError("no network here")

    monkeypatch.delenv("CI", raising=False)  # there it would tell nobody
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: refuse(socket.socket(), where))
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: heard.append(what))
    site = site_of(folder, packing=True)
    site.trained(site.start(), local_steps=1)
    site.evaluated(site.start())
    assert heard == []
