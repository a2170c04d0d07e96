"""Real models of transformers, tiny and with random weights, as folders that the worker loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from common.adapter import Adapter, AdapterSpec, Factors
from worker.trainer_protocol import ModelOrder, Plan

WORDS = ("good", "bad", "film", "book", "very", "not", "a", "the")
_PADDING, _UNKNOWN = "[PAD]", "[UNK]"
_VOCABULARY = {word: number for number, word in enumerate((_PADDING, _UNKNOWN, *WORDS))}
SIDES = ("left", "right")
MOODS = ("sad", "happy", "neither")

VIT_ORDER = ModelOrder(
    task="image-classification",
    labels=SIDES,
    target_modules=("q_proj", "v_proj"),
    modules_to_save=(),
    lora_rank=4,
    seed=1,
)
BERT_ORDER = ModelOrder(
    task="sequence-classification",
    labels=MOODS,
    target_modules=("query", "value"),
    modules_to_save=("classifier",),
    lora_rank=4,
    seed=1,
)
DISTILBERT_ORDER = ModelOrder(
    task="sequence-classification",
    labels=MOODS,
    target_modules=("q_lin", "v_lin"),
    modules_to_save=("pre_classifier", "classifier"),
    lora_rank=4,
    seed=1,
)
PLAN = Plan(
    learning_rate=1e-2,
    local_steps=3,
    local_epochs=0.0,
    batch_size=4,
    weight_decay=0.0,
    max_grad_norm=1.0,
    warmup_steps=0,
    seed=7,
)


def save_vit(folder: Path, labels: Sequence[str] = SIDES) -> Path:
    """A ViT for grey images of 8 x 8 that tells `labels` apart."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(
        do_resize=False, image_mean=[0.5], image_std=[0.5], size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    return folder


def save_bert(folder: Path, *, with_pooler: bool = True, dropout: float = 0.1, layers: int = 1) -> Path:
    """A BERT with a tokenizer of eight words; without a pooler it is the checkpoint of a masked language model."""
    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg] # the number of labels is every configuration's
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(_VOCABULARY),
        max_position_embeddings=16,
        num_labels=len(MOODS),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    (BertForSequenceClassification if with_pooler else BertForMaskedLM)(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def save_distilbert(folder: Path, *, dropout: float = 0.1) -> Path:
    """A DistilBERT with the same tokenizer."""
    torch.manual_seed(0)
    config = DistilBertConfig(  # type: ignore[call-arg] # the number of labels is every configuration's
        dim=16,
        hidden_dim=24,
        n_layers=1,
        n_heads=2,
        vocab_size=len(_VOCABULARY),
        max_position_embeddings=16,
        num_labels=len(MOODS),
        dropout=dropout,
        attention_dropout=dropout,
        seq_classif_dropout=dropout,
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel(_VOCABULARY, unk_token=_UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, unk_token=_UNKNOWN, pad_token=_PADDING, model_max_length=16
    ).save_pretrained(folder)


def side_images(count: int, seed: int = 0) -> list[Mapping[str, object]]:
    """Noise that is brighter on the side of its label."""
    generator = np.random.default_rng(seed)
    rows: list[Mapping[str, object]] = []
    for number in range(count):
        image = generator.integers(0, 100, size=(8, 8))
        image[:, 4 * (number % 2) :][:, :4] += 150
        rows.append({"image": image.tolist(), "label": SIDES[number % 2]})
    return rows


def random_adapter(spec: AdapterSpec, rank: int, seed: int = 0) -> Adapter:
    """An adapter that changes what the model says."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return generator.standard_normal(shape).astype(np.float32)

    modules = {m.name: Factors(draw(rank, m.in_features), draw(m.out_features, rank)) for m in spec.modules}
    return Adapter(modules, {t.name: draw(*t.shape) for t in spec.tensors})


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same numbers."""
    if one.spec != other.spec or one.rank != other.rank:
        return False
    factors = all(
        np.array_equal(one.modules[n].lora_A, other.modules[n].lora_A)
        and np.array_equal(one.modules[n].lora_B, other.modules[n].lora_B)
        for n in one.modules
    )
    return factors and all(np.array_equal(one.tensors[n], other.tensors[n]) for n in one.tensors)
