"""A round of local work with the real Trainer on a tiny ViT."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    BERT_ORDER,
    DISTILBERT_ORDER,
    PLAN,
    VIT_ORDER,
    random_adapter,
    same,
    save_bert,
    save_distilbert,
    save_vit,
    side_images,
)

from common.adapter import Adapter, initial_adapter, slice_adapter
from common.codec import encode
from common.errors import InvalidRequest
from worker.config import DataConfig, ModelConfig
from worker.trainer.data import LocalData, load_data
from worker.trainer.model import AdaptedModel, live_factors, load_model, read_adapter, write_adapter
from worker.trainer.task import Preparation
from worker.trainer.training import Diverged, Outcome, Pruning, evaluate, train
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch


@dataclasses.dataclass(frozen=True)
class Site:
    model: AdaptedModel
    preparation: Preparation
    data: LocalData

    def trained(self, start: Adapter, memory_batch: int | None = None, **plan: Any) -> tuple[Adapter, Outcome]:
        write_adapter(self.model, start, scaling=1.0)
        outcome = train(
            self.model,
            self.data.train,
            dataclasses.replace(PLAN, **plan),
            collator=self.preparation.collator,
            memory_batch=memory_batch,
            report=lambda *_: None,
        )
        return read_adapter(self.model), outcome

    def evaluated(self, adapter: Adapter) -> Outcome:
        write_adapter(self.model, adapter, scaling=1.0)
        return evaluate(
            self.model, self.data.test, collator=self.preparation.collator, memory_batch=None, report=lambda *_: None
        )


def site_of(folder: Path, order: ModelOrder, rows: list[Any], dtype: Any = "auto") -> Site:
    model = load_model(ModelConfig(path=str(folder), device="cpu", dtype=dtype, offline=True), order)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(folder / "train.jsonl"), holdout=0.25)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    return Site(model, preparation, load_data(config, preparation, seed=1, offline=True))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site_of(save_vit(tmp_path_factory.mktemp("vit")), VIT_ORDER, side_images(40))


def start(site: Site, rank: int = 4) -> Adapter:
    return slice_adapter(initial_adapter(site.model.spec, 8, seed=5), rank, scaling=1.0)


def test_the_same_slice_plan_and_data_give_the_same_bytes(site: Site) -> None:
    first, _ = site.trained(start(site))
    site.trained(random_adapter(site.model.spec, 2), seed=99)  # whatever came between
    again, _ = site.trained(start(site))
    assert encode(again) == encode(first)
    assert not same(first, start(site))


def test_another_seed_is_another_order_of_the_data(site: Site) -> None:
    assert encode(site.trained(start(site), seed=8)[0]) != encode(site.trained(start(site))[0])


def test_a_seed_of_64_bits_is_taken(site: Site) -> None:
    site.trained(start(site), seed=2**64 - 1)


def test_training_learns(site: Site) -> None:
    before = site.evaluated(start(site))
    adapter, _ = site.trained(start(site), local_steps=30, learning_rate=3e-2)
    after = site.evaluated(adapter)
    assert after.metrics["eval_loss"] < before.metrics["eval_loss"]
    assert after.metrics["accuracy"] >= 0.9


def test_an_evaluation_changes_nothing_and_repeats_itself(site: Site) -> None:
    adapter = random_adapter(site.model.spec, 4)
    first = site.evaluated(adapter)
    assert same(read_adapter(site.model), adapter)
    assert site.evaluated(adapter).metrics == first.metrics
    assert first.metrics.keys() == {"accuracy", "eval_loss"}


def test_a_batch_in_parts_is_the_same_batch(site: Site) -> None:
    whole, _ = site.trained(start(site), local_steps=1)
    parts, _ = site.trained(start(site), local_steps=1, memory_batch=3)  # 4 = 2 + 2
    for name, factors in whole.modules.items():
        torch.testing.assert_close(
            torch.tensor(factors.lora_B), torch.tensor(parts.modules[name].lora_B), atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("memory_batch", [1, 2, 3])
@pytest.mark.parametrize(("save", "order"), [(save_bert, BERT_ORDER), (save_distilbert, DISTILBERT_ORDER)])
def test_a_model_that_takes_any_argument_learns_the_same_from_parts(
    tmp_path: Path, save: Any, order: ModelOrder, memory_batch: int
) -> None:
    site = site_of(save(tmp_path, dropout=0.0), order, moods(14))
    assert len(site.data.train) == 10  # batches of 6 and 4: with parts of 3 the last one is 3 + 1
    plan: dict[str, Any] = {"batch_size": 6, "local_steps": 0, "local_epochs": 3.0, "max_grad_norm": 1e9}
    whole, measured = site.trained(start(site), **plan)
    parts, measured_in_parts = site.trained(start(site), memory_batch, **plan)
    assert measured_in_parts.metrics["train_loss"] == pytest.approx(measured.metrics["train_loss"], rel=1e-5)
    for name, factors in whole.modules.items():
        np.testing.assert_allclose(parts.modules[name].lora_A, factors.lora_A, atol=1e-4)
        np.testing.assert_allclose(parts.modules[name].lora_B, factors.lora_B, atol=1e-4)
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(parts.tensors[name], tensor, atol=1e-4)


def test_work_in_parts_is_heard_of_at_every_part(site: Site) -> None:
    seen: list[int] = []
    write_adapter(site.model, start(site), scaling=1.0)
    plan = dataclasses.replace(PLAN, local_steps=1)
    train(
        site.model,
        site.data.train,
        plan,
        collator=site.preparation.collator,
        memory_batch=1,
        report=lambda step, *_: seen.append(step),
    )
    assert seen == [0, 0, 0, 1]


def steps_of(site: Site, **plan: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    write_adapter(site.model, start(site), scaling=1.0)
    train(
        site.model,
        site.data.train,
        dataclasses.replace(PLAN, **plan),
        collator=site.preparation.collator,
        memory_batch=None,
        report=lambda step, total, loss: seen.append((step, total)) if math.isfinite(loss) else None,
    )
    return seen


def test_every_step_is_reported(site: Site) -> None:
    assert steps_of(site, local_steps=3) == [(1, 3), (2, 3), (3, 3)]


def test_epochs_count_when_no_steps_are_given(site: Site) -> None:
    assert len(site.data.train) == 30
    assert steps_of(site, local_steps=0, local_epochs=1.0)[-1] == (8, 8)  # 30 examples in batches of 4
    assert steps_of(site, local_steps=0, local_epochs=0.5)[-1] == (4, 4)


def test_more_steps_than_data_goes_round_again(site: Site) -> None:
    assert steps_of(site, local_steps=10)[-1] == (10, 10)


def test_only_the_adapter_is_trained(site: Site) -> None:
    frozen = {n: p.clone() for n, p in site.model.live.named_parameters() if not p.requires_grad}
    site.trained(start(site))
    after = dict(site.model.live.named_parameters())
    assert all(torch.equal(parameter, after[name]) for name, parameter in frozen.items())
    assert all(parameter.grad is None for parameter in after.values())


def test_a_loss_that_is_not_finite_ends_the_task_and_not_the_trainer(site: Site) -> None:
    healthy, _ = site.trained(start(site))
    with pytest.raises(Diverged, match="learning rate"):
        site.trained(start(site), learning_rate=1e30, local_steps=5, max_grad_norm=1e30)
    assert encode(site.trained(start(site))[0]) == encode(healthy)


def test_training_leaves_no_file(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site.trained(start(site))
    site.evaluated(start(site))
    assert list(tmp_path.iterdir()) == []


def moods(count: int) -> list[dict[str, object]]:
    return [{"text": ("good film", "bad book")[n % 2], "label": ("happy", "sad")[n % 2]} for n in range(count)]


def test_a_trained_head_travels_with_the_adapter(tmp_path: Path) -> None:
    site = site_of(save_bert(tmp_path), BERT_ORDER, moods(16))
    first = start(site)
    adapter, _ = site.trained(first)
    assert (adapter.tensors["classifier.weight"] != first.tensors["classifier.weight"]).any()
    loss = site.evaluated(adapter).metrics["eval_loss"]
    assert loss != site.evaluated(first).metrics["eval_loss"]
    assert loss == site.evaluated(adapter).metrics["eval_loss"]


def test_a_bfloat16_base_trains_the_same_in_every_round(tmp_path: Path) -> None:
    site = site_of(save_bert(tmp_path), BERT_ORDER, moods(16), dtype="bfloat16")
    first, second = (encode(site.trained(start(site))[0]) for _ in range(2))
    forward = vars(site.model.live)["forward"]  # accelerate's, for the mixed precision
    third = encode(site.trained(start(site))[0])
    assert first == second == third
    assert vars(site.model.live)["forward"] is forward  # its wrappers do not pile up


@pytest.mark.parametrize("plan", [{"batch_size": 0}, {"local_steps": 0, "local_epochs": 0.0}])
def test_a_plan_with_nothing_to_do_is_refused(site: Site, plan: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="nothing to do"):
        site.trained(start(site), **plan)


# ---------------------------------------------------------------- what a method asks of its clients


def kept_lora_A(one: Adapter, other: Adapter) -> list[bool]:
    return [np.array_equal(one.modules[name].lora_A, other.modules[name].lora_A) for name in one.modules]


def test_a_plan_that_freezes_lora_A_trains_lora_B_alone(site: Site) -> None:
    first = start(site)
    adapter, _ = site.trained(first, freezes_lora_A=True, weight_decay=0.1)
    assert all(kept_lora_A(adapter, first))
    assert all((factors.lora_B != 0.0).any() for factors in adapter.modules.values())


def test_lora_A_learns_again_after_a_frozen_round_of_another_rank(site: Site) -> None:
    plain, _ = site.trained(start(site))
    site.trained(start(site, 2), freezes_lora_A=True)
    again, _ = site.trained(start(site))
    assert encode(again) == encode(plain)
    assert not any(kept_lora_A(again, start(site)))


def test_lora_A_learns_again_after_a_frozen_round_that_failed(site: Site) -> None:
    with pytest.raises(Diverged):
        site.trained(start(site), freezes_lora_A=True, learning_rate=1e30, local_steps=5, max_grad_norm=1e30)
    assert all(lora_A.requires_grad and lora_B.requires_grad for lora_A, lora_B in live_factors(site.model))


def test_a_head_is_trained_beside_a_frozen_lora_A(tmp_path: Path) -> None:
    site = site_of(save_bert(tmp_path), BERT_ORDER, moods(16))
    first = start(site)
    adapter, _ = site.trained(first, freezes_lora_A=True)
    assert all(kept_lora_A(adapter, first))
    assert (adapter.tensors["classifier.weight"] != first.tensors["classifier.weight"]).any()


def pruned(site: Site, pruning: Pruning | None, memory_batch: int | None = None) -> tuple[Adapter, float]:
    """One step from an adapter that changes what the model says; the loss it started from."""
    write_adapter(site.model, random_adapter(site.model.spec, 4), scaling=1.0)
    outcome = train(
        site.model,
        site.data.train,
        dataclasses.replace(PLAN, local_steps=1),
        collator=site.preparation.collator,
        memory_batch=memory_batch,
        report=lambda *_: None,
        pruning=pruning,
    )
    return read_adapter(site.model), outcome.metrics["train_loss"]


def tail(adapter: Adapter, kept: int) -> float:
    products = (np.linalg.norm(f.lora_B[:, kept:]) * np.linalg.norm(f.lora_A[kept:]) for f in adapter.modules.values())
    return float(sum(products))


@pytest.mark.parametrize("memory_batch", [None, 2])
def test_the_pruning_term_counts_once_for_a_batch_and_only_above_the_rank_to_keep(
    site: Site, memory_batch: int | None
) -> None:
    plain, loss = pruned(site, None, memory_batch)
    adapter, pruned_loss = pruned(site, Pruning(share=0.7, penalty=0.5), memory_batch)
    before = random_adapter(site.model.spec, 4)
    assert pruned_loss - loss == pytest.approx(0.5 * tail(before, 2), rel=1e-4)  # floor(0.7 * 4) directions are kept
    assert tail(adapter, 2) < min(tail(plain, 2), tail(before, 2))


def test_the_pruning_term_pulls_at_no_direction_that_is_kept(site: Site) -> None:
    heavy, _ = pruned(site, Pruning(share=0.5, penalty=1e6))
    before = random_adapter(site.model.spec, 4)
    for name, factors in heavy.modules.items():
        # Beside that gradient every other is nothing, so what is kept stays where it was but for AdamW's epsilon.
        np.testing.assert_allclose(factors.lora_A[:2], before.modules[name].lora_A[:2], atol=PLAN.learning_rate)
        assert (np.abs(factors.lora_A[2:]) < np.abs(before.modules[name].lora_A[2:])).mean() > 0.9


def test_a_rank_that_cannot_shrink_has_no_pruning_term(site: Site) -> None:
    plain, _ = pruned(site, None)
    again, _ = pruned(site, Pruning(share=0.2, penalty=0.5))
    assert encode(again) == encode(plain)


def test_a_pruning_term_of_an_adapter_that_is_nothing_is_a_number(site: Site) -> None:
    write_adapter(site.model, start(site), scaling=1.0)
    outcome = train(
        site.model,
        site.data.train,
        PLAN,
        collator=site.preparation.collator,
        memory_batch=None,
        report=lambda *_: None,
        pruning=Pruning(share=0.5, penalty=0.1),
    )
    assert math.isfinite(outcome.metrics["train_loss"])
