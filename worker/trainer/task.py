"""What a kind of task is: the model class, how a row becomes an example and examples a batch, what is measured.

The kinds themselves are in tasks and causal.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import AutoTokenizer, EvalPrediction

from common.errors import RafloraError
from worker.config import DataConfig
from worker.trainer.data import Example, Prepared, Row

_UNBOUNDED = 1 << 30
_POSITIONS = ("position_embeddings", "embed_positions")  # as transformers calls its tables of learnt positions

Collator = Callable[[list[Any]], dict[str, Any]]


class ModelError(RafloraError):
    """The base model cannot be used as the federation asks; the message says why and what to do."""

    code = "FAILED_PRECONDITION"
    reason = "model_error"


class Preparation(Protocol):
    """What turns this site's rows into what the model takes; made once per load."""

    def example(self, row: Row) -> Example:
        """One row as the model's inputs and `labels`. Raises DataError that names file, row and column."""
        ...

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:
        """All of a file's or data set's rows. Raises DataError."""
        ...

    @property
    def collator(self) -> Collator:
        """Makes a batch of a list of examples."""
        ...


class Task(Protocol):
    """One kind of task."""

    name: str
    auto_class: Any  # transformers' class with from_pretrained
    trainer_class: Any  # ExactTrainer or its like: what a batch teaches depends on no division of it
    evaluation_batch: int  # examples at once, at most; without gradients more fit than in training

    def prepare(self, folder: Path, model: Any, labels: Sequence[str], config: DataConfig) -> Preparation:
        """The preparation that belongs to the model in `folder`. Raises ModelError if its files are not there."""
        ...

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What is measured besides the loss."""
        ...


def longest_input(model: Any) -> int:
    """How many tokens the model reads (and writes) at most, in all; 2^30 if nothing bounds it.

    RoBERTa and its like count positions from behind that of the padding token, so their last ones are never reached.
    """
    most = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNBOUNDED)
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
        if is_table and module.padding_idx is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most


def pad_by_end(tokenizer: Any, config: Any) -> None:
    """A tokenizer without a padding token pads with its end of sequence, and the model's configuration says so."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer that lies in a folder. Raises ModelError if it cannot be loaded or knows no words."""
    advice = f"put the tokenizer of the base model (tokenizer.json, tokenizer_config.json) into {folder}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: no tokenizer that can be loaded; {advice}: {error}") from None
    # Without a vocabulary transformers makes an empty tokenizer, to which every word is unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"{folder}: the tokenizer knows no words; {advice}")
    return tokenizer
