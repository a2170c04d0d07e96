"""A tiny text encoder, split, its base model loaded with LoRA; and the whole encoder beside it as the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_models import save_bert
from transformers import AutoModel, AutoTokenizer

from simulation.encoder import Features, SplitEncoder, features_of, load_encoder, write_base
from simulation.prepare import FeatureExamples
from worker.config import ModelConfig
from worker.trainer.model import AdaptedModel, load_model
from worker.trainer_protocol import ModelOrder

CLASS_NAMES = ("good_film", "bad_book", "very")
TEXTS = (
    "a good film",
    "the bad book",
    "very",
    "not a very good book the film bad very good a a the",
    "a very bad film",
    "good good good",
    "the book a film",
    "bad",
)
LABELS = np.asarray([0, 1, 2, 1, 0, 0, 1, 2], dtype=np.int64)
LAYERS = 3
CPU = torch.device("cpu")


def feature_order(trained_layers: int, rank: int = 4, **more: Any) -> ModelOrder:
    """What a coordinator asks of a base model of features."""
    settings: dict[str, Any] = {
        "task": "feature-classification",
        "labels": CLASS_NAMES,
        "target_modules": ("query", "value") if trained_layers else ("projection",),
        "modules_to_save": (),
        "lora_rank": rank,
        "seed": 1,
    }
    return ModelOrder(**{**settings, **more})


@dataclass(frozen=True)
class Split:
    encoder: SplitEncoder
    base_folder: Path
    cache_dir: Path

    def features(self, texts: Sequence[str] = TEXTS) -> Features:
        return features_of(self.encoder, texts, self.cache_dir, lambda *_: None)

    def examples(self) -> FeatureExamples:
        return FeatureExamples(self.features(), LABELS)

    def model(self, rank: int = 4, **order: Any) -> AdaptedModel:
        config = ModelConfig(path=str(self.base_folder), device="cpu", offline=True)
        return load_model(config, feature_order(len(self.encoder.top), rank, **order))


def split(folder: Path, trained_layers: int, max_length: int = 16) -> Split:
    """A BERT of three layers in `folder`/source, split."""
    source = folder / "source"
    if not source.exists():
        save_bert(source, layers=LAYERS)
    encoder = load_encoder(source, trained_layers=trained_layers, max_length=max_length, device=CPU)
    base = folder / f"base-{trained_layers}"
    write_base(encoder, CLASS_NAMES, base)
    return Split(encoder, base, folder / "cache")


def whole_embeddings(source: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """The textbook way: one padded batch through the whole encoder, mean over the mask, length 1."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source).train(False)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.numpy()
    mask = batch["attention_mask"].numpy()[:, :, None]
    mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    embedded: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return embedded


def whole_logits(source: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """Cosine with each class's name, times twenty."""
    names = [name.replace("_", " ") for name in CLASS_NAMES]
    logits: NDArray[np.float32] = 20 * whole_embeddings(source, texts) @ whole_embeddings(source, names).T
    return logits
