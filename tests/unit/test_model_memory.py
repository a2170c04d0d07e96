"""Bases that take less memory: quantised for real (bitsandbytes has CPU kernels), recomputed, in bfloat16; dropout."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BERT_ORDER,
    LLAMA_ORDER,
    PLAN,
    VIT_ORDER,
    random_adapter,
    same,
    save_bert,
    save_vit,
    side_images,
    tiny_llama,
)
from torch import nn

from common.adapter import Adapter
from worker.config import DataConfig, ModelConfig
from worker.trainer.base_model import digest_of_weights
from worker.trainer.data import load_data
from worker.trainer.model import AdaptedModel, live_factors, load_model, read_adapter, set_dropout, write_adapter
from worker.trainer.task import ModelError
from worker.trainer.training import evaluate, train
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

TOKENS = torch.tensor([[10, 11, 12, 13], [14, 15, 16, 17]])
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quantized")
ALL = dataclasses.replace(LLAMA_ORDER, target_modules=("all-linear",))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_vit(tmp_path_factory.mktemp("vit"))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(16)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(before)


def load(folder: Path, order: ModelOrder, **settings: Any) -> AdaptedModel:
    return load_model(ModelConfig(path=str(folder), device="cpu", offline=True, **settings), order)


def logits(model: AdaptedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.live.eval()(input_ids=TOKENS).logits
    return found.float()


def trained(model: AdaptedModel, start: Adapter, folder: Path, **plan: Any) -> Adapter:
    """What a round makes of `start`, with the real Trainer."""
    config = DataConfig(train=str(folder / "train.jsonl"), holdout=0.25)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    data = load_data(config, preparation, seed=1, offline=True)
    write_adapter(model, start, scaling=1.0)
    todo: Any = {"collator": preparation.collator, "memory_batch": 2, "report": lambda *_: None}
    train(model, data.train, dataclasses.replace(PLAN, **plan), **todo)
    evaluate(model, data.test, **todo)  # in between, as in a federation
    return read_adapter(model)


# --- quantised


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_a_quantised_base_has_the_same_layers_and_the_same_digest(llama: Path, bits: str, kind: str) -> None:
    plain, model = load(llama, ALL), load(llama, ALL, quantization=bits)
    assert model.spec == plain.spec
    assert model.base_model_digest == plain.base_model_digest == digest_of_weights(llama)
    layers = [model.base.get_submodule(m.name).base_layer for m in model.spec.modules]
    assert {type(layer).__name__ for layer in layers} == {kind}
    assert type(model.base.lm_head) is nn.Linear
    kinds = {(p.requires_grad, p.dtype) for p in model.live.parameters()}
    assert kinds == {
        (True, torch.float32),
        (False, torch.bfloat16),
        (False, getattr(torch, f"{'u' * (bits == '4bit')}int8")),
    }


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_says_nearly_the_same(llama: Path, bits: str) -> None:
    plain, model = load(llama, ALL), load(llama, ALL, quantization=bits)
    adapter = random_adapter(plain.spec, 2)
    for each in (plain, model):
        write_adapter(each, adapter, scaling=0.02)
    assert same(read_adapter(model), adapter)
    one, other = logits(plain), logits(model)
    assert torch.nn.functional.cosine_similarity(one, other, dim=-1).min() > 0.9
    assert not torch.equal(one, other)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_trained_round_after_round_at_any_rank(vit: Path, bits: str) -> None:
    model = load(vit, VIT_ORDER, quantization=bits)
    frozen = {name: p.detach().clone() for name, p in model.base.named_parameters() if not p.requires_grad}
    starts = [random_adapter(model.spec, rank) for rank in (4, 2, 4)]
    found = [trained(model, start, vit) for start in starts]
    assert not any(same(start, after) for start, after in zip(starts, found, strict=True))
    assert same(found[2], found[0]), "the same round gives the same bytes"
    after = dict(model.base.named_parameters())
    assert all(torch.equal(after[name], before) for name, before in frozen.items() if name in after)


@needs_bitsandbytes
def test_what_is_trained_whole_is_not_quantised(bert: Path) -> None:
    order = dataclasses.replace(BERT_ORDER, modules_to_save=("classifier", "pooler"), target_modules=("all-linear",))
    model = load(bert, order, quantization="8bit")
    assert {t.name.rpartition(".")[0] for t in model.spec.tensors} == {"bert.pooler.dense", "classifier"}
    for name in ("classifier", "bert.pooler"):
        kinds = {type(m).__name__ for m in model.base.get_submodule(name).modules()}
        assert "Linear8bitLt" not in kinds
        assert "Linear" in kinds


@needs_bitsandbytes
def test_a_frozen_head_is_not_quantised(vit: Path) -> None:
    model = load(vit, VIT_ORDER, quantization="4bit")
    assert type(model.base.classifier) is nn.Linear


def test_without_bitsandbytes_the_extra_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r'model.quantization = "4bit" .*pip install "raflora\[quantized\]"'):
        load(llama, ALL, quantization="4bit")


def test_an_explicit_float16_is_refused_on_a_cpu_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="float16 cannot be trained on a CPU"):
        load(tmp_path, ALL, quantization="4bit", dtype="float16")


# --- activations recomputed


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["none", "4bit"])
def test_checkpointing_gives_the_same_gradients_and_runs_each_layer_twice(llama: Path, bits: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(llama, ALL, quantization=bits, gradient_checkpointing=checkpointing)
        write_adapter(model, random_adapter(model.spec, 2), scaling=0.02)
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        model.base.model.layers[1].mlp.up_proj.register_forward_hook(count)
        model.live.train()
        model.live(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert runs == 1 + checkpointing
        gradients.append([p.grad for pair in live_factors(model) for p in pair])
    for without, recomputed in zip(*gradients, strict=True):
        assert without is not None
        assert without.abs().max() > 0
        torch.testing.assert_close(recomputed, without, atol=1e-6, rtol=1e-5)


def test_a_round_with_checkpointing_gives_the_same_factors(vit: Path) -> None:
    plain, model = load(vit, VIT_ORDER), load(vit, VIT_ORDER, gradient_checkpointing=True)
    start = random_adapter(plain.spec, 4)
    one, other = trained(plain, start, vit), trained(model, start, vit)
    for name in one.modules:
        np.testing.assert_allclose(other.modules[name].lora_A, one.modules[name].lora_A, atol=1e-5)
        np.testing.assert_allclose(other.modules[name].lora_B, one.modules[name].lora_B, atol=1e-5)


# --- dropout


def test_dropout_is_on_while_training_and_survives_a_new_rank(llama: Path) -> None:
    model = load(llama, LLAMA_ORDER)
    adapter = random_adapter(model.spec, 4)
    write_adapter(model, adapter, scaling=1.0)
    plain = logits(model)
    set_dropout(model, 0.5)
    for rank in (4, 2, 4):
        write_adapter(model, random_adapter(model.spec, rank), scaling=1.0)
        model.live.train()
        first, second = (model.live(input_ids=TOKENS).logits for _ in range(2))
        assert not torch.equal(first, second), f"at rank {rank}"
    torch.testing.assert_close(logits(model), plain, atol=0, rtol=0)  # not while evaluating
    set_dropout(model, 0.0)
    model.live.train()
    first, second = (model.live(input_ids=TOKENS).logits for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_begins_in_the_mode_that_the_model_is_in(llama: Path) -> None:
    model = load(llama, LLAMA_ORDER)
    write_adapter(model, random_adapter(model.spec, 4), scaling=1.0)
    plain = logits(model)
    set_dropout(model, 0.9)
    torch.testing.assert_close(model.live(input_ids=TOKENS).logits, plain, atol=0, rtol=0)
