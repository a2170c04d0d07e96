"""The base model of features says what the whole encoder would say, and LoRA goes on it as on any other."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_encoders import CLASS_NAMES, LABELS, TEXTS, Split, feature_order, split, whole_embeddings, whole_logits
from tiny_models import PLAN, random_adapter, same, save_bert

from common.adapter import initial_adapter, slice_adapter
from common.codec import encode
from worker.config import ModelConfig
from worker.trainer.features import FeatureClassifier, collate_features
from worker.trainer.model import AdaptedModel, load_model, read_adapter, write_adapter
from worker.trainer.task import ModelError
from worker.trainer.training import Outcome, evaluate, train

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=[0, 2, 3])
def splitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(tmp_path_factory.mktemp("split"), trained_layers=request.param)


def base_of(splitted: Split) -> FeatureClassifier:
    model: FeatureClassifier = FeatureClassifier.from_pretrained(splitted.base_folder)
    model.train(False)
    return model


def logits_of(model: Any, examples: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(**collate_features(list(examples))).logits.numpy()
    return logits


def trained(model: AdaptedModel, splitted: Split, memory_batch: int | None = None, **plan: Any) -> Outcome:
    return train(
        model,
        splitted.examples(),
        dataclasses.replace(PLAN, **plan),
        collator=collate_features,
        memory_batch=memory_batch,
        report=lambda *_: None,
    )


def test_the_split_encoder_says_what_the_whole_one_says(splitted: Split) -> None:
    found = logits_of(base_of(splitted), splitted.examples())
    np.testing.assert_allclose(found, whole_logits(splitted.base_folder.parent / "source", TEXTS), atol=1e-5)


def test_the_head_is_the_names_of_the_classes_with_blanks(splitted: Split) -> None:
    names = [name.replace("_", " ") for name in CLASS_NAMES]
    expected = whole_embeddings(splitted.base_folder.parent / "source", names)
    np.testing.assert_allclose(base_of(splitted).classifier.weight.detach().numpy(), expected, atol=1e-6)


def test_neighbours_in_a_batch_do_not_matter(splitted: Split) -> None:
    # The second text has one token, the fourth thirteen: together they are packed, alone or alike they are not.
    model, examples = base_of(splitted), splitted.examples()
    together = logits_of(model, examples)
    alone = np.concatenate([logits_of(model, [example]) for example in examples])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    pair = logits_of(model, [examples[2], examples[3]])
    np.testing.assert_allclose(pair, together[[2, 3]], atol=1e-5)


def test_a_batch_with_hardly_any_padding_is_padded_and_masked(tmp_path: Path) -> None:
    splitted = split(tmp_path, trained_layers=2)
    texts = ["a good film a good film a good film", "a bad book a bad book a bad"] * 8
    features = splitted.features(texts)
    found = logits_of(base_of(splitted), [{"features": features[n], "labels": 0} for n in range(len(texts))])
    np.testing.assert_allclose(found, whole_logits(tmp_path / "source", texts), atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy(splitted: Split) -> None:
    found = base_of(splitted)(**collate_features(splitted.examples()))
    logits = found.logits.detach().double().numpy()
    likelihood = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.loss.item() == pytest.approx(-np.log(likelihood[np.arange(len(LABELS)), LABELS]).mean(), abs=1e-5)


def test_a_fresh_adapter_changes_nothing_and_training_does(splitted: Split) -> None:
    model = splitted.model(rank=2)
    before = logits_of(model.live.train(False), splitted.examples())
    np.testing.assert_allclose(before, logits_of(base_of(splitted), splitted.examples()), atol=1e-5)
    first = evaluate(model, splitted.examples(), collator=collate_features, memory_batch=None, report=lambda *_: None)
    trained(model, splitted, local_steps=30)
    last = evaluate(model, splitted.examples(), collator=collate_features, memory_batch=3, report=lambda *_: None)
    assert last.metrics["eval_loss"] < first.metrics["eval_loss"]
    assert last.metrics["accuracy"] >= first.metrics["accuracy"]


def test_the_same_slice_and_plan_give_the_same_bytes_at_every_rank(splitted: Split) -> None:
    model = splitted.model(rank=4)
    start = initial_adapter(model.spec, 4, seed=5)
    for rank in (1, 4):
        results = []
        for _ in range(2):
            write_adapter(model, slice_adapter(start, rank, scaling=1.0), scaling=1.0)
            trained(model, splitted)
            results.append(read_adapter(model))
        assert encode(results[0]) == encode(results[1])
        assert not same(results[0], slice_adapter(start, rank, scaling=1.0))


def test_a_batch_in_parts_is_the_same_batch(splitted: Split) -> None:
    model = splitted.model()
    start = random_adapter(model.spec, 4)
    found = []
    for memory_batch in (None, 1):
        write_adapter(model, start, scaling=0.1)
        trained(model, splitted, memory_batch, local_steps=1)
        found.append(read_adapter(model))
    for name, factors in found[0].modules.items():
        np.testing.assert_allclose(factors.lora_B, found[1].modules[name].lora_B, atol=1e-4)


def test_only_the_layers_that_were_asked_for_are_adapted(splitted: Split) -> None:
    names = {module.name for module in splitted.model().spec.modules}
    layers = len(splitted.encoder.top)
    expected = {f"body.layer.{n}.attention.self.{which}" for n in range(layers) for which in ("query", "value")}
    assert names == (expected or {"body.projection"})


def test_all_linear_leaves_the_head_alone(splitted: Split) -> None:
    names = {module.name for module in splitted.model(target_modules=("all-linear",)).spec.modules}
    assert len(names) == (6 * len(splitted.encoder.top) or 1)
    assert "classifier" not in names


def test_nothing_is_dropped_while_training(splitted: Split) -> None:
    config = base_of(splitted).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)


def test_a_frozen_head_of_other_labels_is_refused(splitted: Split) -> None:
    with pytest.raises(ModelError, match="its head is frozen"):
        splitted.model(labels=("one", "two", "three"))


def test_half_the_bits_are_enough(splitted: Split) -> None:
    config = ModelConfig(path=str(splitted.base_folder), device="cpu", offline=True, dtype="bfloat16")
    order = feature_order(len(splitted.encoder.top))
    model = load_model(config, order)
    write_adapter(model, initial_adapter(model.spec, 4, seed=1), scaling=1.0)
    assert trained(model, splitted, local_steps=2).metrics["train_loss"] > 0
    found = logits_of(model.live.train(False), splitted.examples())
    assert np.isfinite(found).all()


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    with pytest.raises(ModelError, match="describes a model of type 'bert'; 'raflora-features' is expected"):
        load_model(ModelConfig(path=str(tmp_path / "bert"), device="cpu", offline=True), feature_order(0))
