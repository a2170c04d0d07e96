"""Real models of transformers, tiny and with random weights, as folders that the worker loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
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
LLAMA_ORDER = ModelOrder(
    task="causal-lm",
    labels=(),
    target_modules=("q_proj", "v_proj"),
    modules_to_save=(),
    lora_rank=4,
    seed=1,
)
# Every turn ends in the end-of-sequence token, as in the templates of Llama 3 and Qwen; no {% generation %}.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Every turn ends in a token that is not the end of sequence, as where a base model is given ChatML's template.
FOREIGN_END = "<|system|>"  # a special token of this tokenizer that the template uses for nothing else
FOREIGN_TEMPLATE = CHAT_TEMPLATE.replace("{{ eos_token }}", FOREIGN_END)
LLAMA_VOCABULARY = 400
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


def tiny_llama(folder: Path, *, chat_template: bool = True, pad_token: bool = True, longest: int = 256) -> Path:
    """A Llama of two layers (hidden 32, four heads, two key-value heads) with the tokenizer of `save_bpe`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_bpe(folder, chat_template=chat_template, pad_token=pad_token)
    return folder


def save_bpe(folder: Path, *, chat_template: bool = True, pad_token: bool = True) -> None:
    """A byte-level BPE tokenizer of at most LLAMA_VOCABULARY tokens, learnt from sums in words; <s> is 0, </s> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=LLAMA_VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{row['question']} {row['answer']}" for row in word_problems(200)), learner)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD if pad_token else None,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    fast.save_pretrained(folder)


def word_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Records as in GSM8K: a question, and a worked answer that ends in `#### NUMBER`."""
    generator = np.random.default_rng(seed)
    names, things = ("Ada", "Bob", "Cleo"), ("apples", "books", "coins")
    rows = []
    for _ in range(count):
        name, thing = names[generator.integers(3)], things[generator.integers(3)]
        one, other = (int(number) for number in generator.integers(1, 10, size=2))
        question = f"{name} has {one} {thing} and buys {other} more. How many {thing} does {name} have?"
        rows.append({"question": question, "answer": f"{name} has {one} + {other} {thing}.\n#### {one + other}"})
    return rows


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
