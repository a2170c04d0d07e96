"""Causal language models: records become tokens of which the model learns the answers.

They are made once, when the data is loaded. What a record says is the business of conversations, which tokens that
are of tokens, and how they are trained of language_trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import structlog
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, EvalPrediction
from trl.data_utils import pack_dataset

from worker.config import DataConfig
from worker.trainer.conversations import (
    MESSAGES,
    Conversation,
    Instruction,
    PlainText,
    check_reading,
    format_of,
    read_record,
)
from worker.trainer.data import DataError, Example, Prepared, Row
from worker.trainer.language_trainer import NOT_LEARNT, LanguageCollator, LanguageTrainer, as_dataset, fused_head
from worker.trainer.modes import asked
from worker.trainer.task import ModelError, Preparation, longest_input, pad_by_end, tokenizer_in
from worker.trainer.tokens import Tokens

log = structlog.get_logger()

_TRIED_TOKENS = 8  # of the texts that the model is tried with


class CausalLanguageModel:
    """The next token of a text, an answer or a turn."""

    name = "causal-lm"
    auto_class = AutoModelForCausalLM
    trainer_class = LanguageTrainer
    evaluation_batch = 8

    def prepare(self, folder: Path, model: Any, labels: Sequence[str], config: DataConfig) -> Preparation:  # noqa: ARG002
        """Loads the tokenizer, and tries whether the model computes in training what it computes by itself."""
        check_reading(config)
        tokenizer = tokenizer_in(folder)
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{folder}: the tokenizer has no end-of-sequence token, so no model would learn where an answer ends; "
                "name the base model's in tokenizer_config.json (eos_token)"
            )
        pad_by_end(tokenizer, model.config)  # behind the text, where nothing looks at it and nothing is learnt
        _check_model(model, config)
        most = min(config.max_length, tokenizer.model_max_length, longest_input(model))
        return LanguagePreparation(Tokens(tokenizer, folder), config, _Limits(most, _num_embeddings(model)))

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The mean loss of a token, and the share of tokens that the model thought the likeliest."""
        sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        tokens = int(np.sum(prediction.label_ids))
        return {"loss": float(sums[0] / tokens), "token_accuracy": float(sums[1] / tokens)}


@dataclass(frozen=True)
class _Limits:
    max_length: int  # tokens of an example
    num_embeddings: int  # tokens that the model knows


class LanguagePreparation:
    """Makes examples of records: `input_ids`, and `labels` that name only the tokens to be learnt."""

    def __init__(self, tokens: Tokens, config: DataConfig, limits: _Limits) -> None:
        self.tokenizer = tokens.tokenizer
        self.ends = tokens.ends
        self.collator = LanguageCollator(tokens.tokenizer)
        self._tokens = tokens
        self._config = config
        self._limits = limits

    def example(self, row: Row) -> Example:
        """The record, cut to the maximal length. Raises DataError if nothing of the answer is left."""
        ids, labels = self._cut(*self._example(row, format_of(row, self._config)))
        if not _is_learnt(labels):
            raise DataError(
                f"{row.where}: the answer begins after token {len(ids)}, which is the last (data.max_length)"
            )
        return {"input_ids": ids, "labels": labels}

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:
        """The records that fit, and in training packed if the site says so. Raises DataError if none fits."""
        kind = format_of(rows[0], self._config)
        log.info("data format", format=kind, first=rows[0].where, is_chat=kind == MESSAGES or self._config.chat)
        kept: list[Example] = []
        num_cut = 0
        for row in rows:
            whole = self._example(row, kind)
            ids, labels = self._cut(*whole)
            if _is_learnt(labels):
                num_cut += len(ids) < len(whole[0])
                kept.append({"input_ids": ids, "labels": labels})
        self._tell(num_cut=num_cut, num_left_out=len(rows) - len(kept), num_records=len(rows))
        if not kept:
            raise DataError(
                f"{rows[0].where} and all {len(rows) - 1} after it: every example is longer than data.max_length "
                f"({self._limits.max_length} tokens) before its answer begins, so nothing could be learnt; raise it"
            )
        if is_training and self._config.packing:
            return Prepared(_packed(kept, self._limits.max_length), len(kept))
        return Prepared(as_dataset(kept), len(kept))

    def prompt(self, row: Row) -> Sequence[int]:
        """The tokens before the (last) answer, as in training. Raises DataError."""
        return self._tokens.of_prompt(self._asked(row), row.where)

    def response(self, row: Row) -> str:
        """The (last) answer that the record gives. Raises DataError."""
        record = self._asked(row)
        return record.response if isinstance(record, Instruction) else record.messages[record.last_answer].content

    def answer(self, row: Row, text: str) -> Sequence[int]:  # noqa: ARG002 # another format may need it
        """The tokens of this text as an answer, without an end of sequence."""
        return self._tokens.of_answer(text)

    def _example(self, row: Row, kind: str) -> tuple[list[int], list[int]]:
        ids, labels = self._tokens.of_record(read_record(row, self._config, kind), row.where)
        if max(ids, default=0) >= self._limits.num_embeddings:
            raise ModelError(
                f"{row.where}: the tokenizer gives token {max(ids)}, but the model knows only "
                f"{self._limits.num_embeddings}: it is another model's; put the base model's own into its folder"
            )
        return ids, labels

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        return ids[: self._limits.max_length], labels[: self._limits.max_length]

    def _asked(self, row: Row) -> Instruction | Conversation:
        record = read_record(row, self._config, format_of(row, self._config))
        if isinstance(record, PlainText):
            raise DataError(f"{row.where}: a plain text asks nothing; prompt and response, or messages, are expected")
        return record

    def _tell(self, *, num_cut: int, num_left_out: int, num_records: int) -> None:
        if num_cut or num_left_out:
            log.warning(
                "examples longer than data.max_length",
                max_length=self._limits.max_length,
                end_cut_off=num_cut,
                left_out=num_left_out,
                of=num_records,
                why="left out is what would lose its whole answer",
            )


def _is_learnt(labels: Sequence[int]) -> bool:
    return any(label != NOT_LEARNT for label in labels)


def _packed(examples: Sequence[Example], max_length: int) -> Any:
    datasets.disable_progress_bars()
    # In memory: nothing of a site's data is written to a disk here.
    how = {"keep_in_memory": True, "load_from_cache_file": False}
    return pack_dataset(as_dataset(examples), max_length, strategy="bfd", map_kwargs=how)


def _num_embeddings(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


# ---------------------------------------------------------------- what the model must be able to do


def _check_model(model: Any, config: DataConfig) -> None:
    """Raises ModelError if this model cannot be trained here as it would train by itself."""
    head = model.get_output_embeddings()
    if head is None or isinstance(head, BaseTunerLayer):
        raise ModelError(
            "target_modules: LoRA on a language model's head (lm_head) is not trained here, for the head is computed "
            "without its layer to save memory; leave it out, or train it whole with modules_to_save"
        )
    with asked(model):
        _check_head(model)
        if config.packing:
            _check_packing(model)


def _check_head(model: Any) -> None:
    """trl computes the loss from the last hidden states; an architecture that does more after them would be wrong."""
    ids = _tokens_to_try(model, _TRIED_TOKENS)
    own = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    with fused_head(model):
        fused = float(model(input_ids=ids, labels=ids, fused_lm_head=True).loss)
    if not abs(own - fused) <= 32 * torch.finfo(model.dtype).eps * max(1.0, abs(own)):
        raise ModelError(
            f"{type(model).__name__}: the loss of a trial is {own:.4f} by the model itself, but {fused:.4f} as trl "
            "computes it in training; this architecture does something after its last layer that trl does not know"
        )


def _check_packing(model: Any) -> None:
    """Whether the second of two packed texts is computed as if it stood alone, in both rows of a batch."""
    tokens = _tokens_to_try(model, 2 * _TRIED_TOKENS)
    second = tokens[:, _TRIED_TOKENS:]
    positions = torch.arange(_TRIED_TOKENS, device=tokens.device).repeat(2)[None]
    alone = model(input_ids=second, use_cache=False).logits.float()
    packed, seeing = (
        model(input_ids=tokens.repeat(2, 1), use_cache=False, **more).logits[:, _TRIED_TOKENS:].float()
        for more in ({"position_ids": positions.repeat(2, 1)}, {})
    )
    rounding = 32 * torch.finfo(model.dtype).eps * float(alone.abs().max())
    if not float((packed - alone).abs().max()) <= max(0.1 * float((seeing - alone).abs().max()), rounding):
        raise ModelError(
            f"{type(model).__name__}: packed examples would see each other in this model (attention "
            f"{model.config._attn_implementation!r}); set data.packing = false"
        )


def _tokens_to_try(model: Any, count: int) -> torch.Tensor:
    """[1, count], different from each other as far as there are so many."""
    return torch.arange(1, count + 1, device=model.device)[None] % _num_embeddings(model)
