"""Tiny models with a trained adapter, served by a canned coordinator, and what the federation's own model says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from canned_coordinator import Canned
from raflora.v1 import status_pb2
from tiny_models import (
    BERT_ORDER,
    LLAMA_ORDER,
    LLAMA_VOCABULARY,
    MOODS,
    VIT_ORDER,
    random_adapter,
    save_bert,
    save_bpe,
    save_vit,
    tiny_llama,
)
from transformers import GPT2Config, GPT2LMHeadModel

from common.adapter import Adapter, Factors
from common.codec import digest_of, encode
from worker.config import DataConfig, ModelConfig
from worker.trainer.model import AdaptedModel, load_model, write_adapter
from worker.trainer_protocol import ModelOrder

GPT2_ORDER = ModelOrder(
    task="causal-lm",
    labels=(),
    target_modules=("c_attn", "mlp.c_proj"),
    modules_to_save=(),
    lora_rank=4,
    seed=1,
)
GPT2_CLASSIFIER_ORDER = ModelOrder(
    task="sequence-classification",
    labels=MOODS,
    target_modules=("c_attn",),
    modules_to_save=("score",),
    lora_rank=4,
    seed=1,
)
RANK = 4
# The second is shorter: of a batch the model must know which tokens are none.
TWO_TEXTS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 1, 1]])
TOKENS = torch.tensor([[3, 4, 5, 6, 7]])
PIXELS = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 of one layer; its linear layers are Conv1D, whose weights lie the other way round."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_gpt2_classifier(folder: Path) -> Path:
    """A GPT-2 made to write, without a padding token in its settings or its tokenizer, as the hub has it."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=LLAMA_VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_bpe(folder, chat_template=False, pad_token=False)
    return folder


@dataclass(frozen=True)
class Kind:
    """One model, and the scaling that its federation uses."""

    name: str
    save: Any
    order: ModelOrder
    scaling: float
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


KINDS = {
    kind.name: kind
    for kind in (
        # Constant, alpha / rank and rsLoRA's; one that no whole lora_alpha spells.
        Kind("bert", save_bert, BERT_ORDER, 0.3, {"input_ids": TOKENS}),
        Kind("vit", save_vit, VIT_ORDER, 3 / RANK, {"pixel_values": PIXELS}),
        Kind("llama", tiny_llama, LLAMA_ORDER, 1 / RANK**0.5, {"input_ids": TOKENS}),
        Kind("gpt2-classifier", save_gpt2_classifier, GPT2_CLASSIFIER_ORDER, 0.5, {"input_ids": TWO_TEXTS}),
        Kind("gpt2", save_gpt2, GPT2_ORDER, 0.25, {"input_ids": TOKENS}),
    )
}


@dataclass(frozen=True)
class Trained:
    """A base model's folder, an adapter for it, and the federation's own model with it."""

    kind: Kind
    base: Path
    model: AdaptedModel
    adapter: Adapter
    canned: Canned

    def logits(self, rank: int = RANK) -> np.ndarray[Any, Any]:
        """What the worker's model answers with the first directions of the adapter."""
        write_adapter(self.model, first(self.adapter, rank), scaling=self.kind.scaling)
        self.model.live.eval()
        with torch.inference_mode():
            return np.asarray(self.model.live(**self.kind.inputs).logits)

    def without_update(self) -> Adapter:
        """The adapter whose head is trained and whose layers are the base's."""
        modules = {name: Factors(f.lora_A, np.zeros_like(f.lora_B)) for name, f in self.adapter.modules.items()}
        return Adapter(modules, self.adapter.tensors)


def trained(kind: Kind, around: Path) -> Trained:
    """Saves the base model into `around` and draws an adapter that changes what it says."""
    base = kind.save(around / kind.name)
    model = load_model(ModelConfig(path=str(base), device="cpu"), kind.order)
    if kind.order.task == "sequence-classification":  # which gives a model for writing a padding token
        model.task.prepare(base, model.base, model.labels, DataConfig())
    adapter = random_adapter(model.spec, RANK)
    return Trained(kind, base, model, adapter, canned_of(kind, base.name, model, adapter))


def canned_of(kind: Kind, name: str, model: AdaptedModel, adapter: Adapter) -> Canned:
    """A coordinator that has published it after round 2."""
    content = encode(adapter)
    status = status_pb2.FederationStatus(
        federation="tiny", software_version="0.1.0", method="raflora", global_rank=RANK, num_rounds=2,
        manifest_digest="c" * 64,
    )  # fmt: skip
    header = status_pb2.AdapterHeader(
        digest=digest_of(content),
        size_bytes=len(content),
        lora_rank=RANK,
        scaling=kind.scaling,
        round=2,
        base_model=name,
        base_model_digest=model.base_model_digest,
        task=kind.order.task,
        modules=[module.name for module in model.spec.modules],
        modules_to_save=kind.order.modules_to_save,
        labels=kind.order.labels,
    )
    return Canned(status=status, header=header, adapter=content, rounds=[a_round(1), a_round(2)])


def a_round(number: int) -> status_pb2.RoundSummary:
    """Of two clients of unequal rank, evaluated."""
    return status_pb2.RoundSummary(
        round=number,
        adapter_digest=f"{number}" * 64,
        contributions=[
            status_pb2.Contribution(client_id="hospital-nord", lora_rank=2, num_examples=100 * number),
            status_pb2.Contribution(client_id="hospital-sued", lora_rank=4, num_examples=50),
        ],
        federated_metrics={"accuracy": 0.5 + number / 10, "eval_loss": 0.25},
        rank_levels=[status_pb2.RankLevelSummary(lora_rank=2, clients=1, num_examples=20, metrics={"accuracy": 0.5})],
    )


def first(adapter: Adapter, rank: int) -> Adapter:
    """Its first directions, with the same scaling."""
    modules = {n: Factors(f.lora_A[:rank], f.lora_B[:, :rank]) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)


def printed_lines(told: str) -> list[str]:
    """The Python that an export printed: what is indented."""
    return [line.strip() for line in told.splitlines() if re.match(r"  \S", line)]
