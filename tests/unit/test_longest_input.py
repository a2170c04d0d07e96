"""How long a text may be: by the settings, the tokenizer and the model's positions, of which RoBERTa has fewer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import BERT_ORDER, MOODS, WORDS, save_bert, save_distilbert, tiny_llama
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from worker.config import DataConfig, ModelConfig
from worker.trainer.data import Row
from worker.trainer.dry_run import longest_example
from worker.trainer.model import load_model
from worker.trainer.task import longest_input

pytestmark = pytest.mark.torch

POSITIONS = 34
LONGEST = POSITIONS - 1  # positions begin behind that of the padding token, which is token 0 here


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa whose tokenizer sets no limit."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    config = RobertaConfig(
        vocab_size=2 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        num_labels=len(MOODS),
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(save_bert(folder.parent / "bert"))
    tokenizer.model_max_length = 1 << 60
    tokenizer.save_pretrained(folder)
    return folder


def test_a_roberta_takes_a_text_that_is_too_long(roberta: Path) -> None:
    model = load_model(ModelConfig(path=str(roberta), device="cpu", offline=True), BERT_ORDER)
    config = DataConfig(train="x.csv", max_length=64)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    row = Row("x.csv, line 2", roberta, {"text": "good film " * 50, "label": 1})
    batch = preparation.collator([preparation.example(row)])
    assert batch["input_ids"].shape == (1, LONGEST)
    assert len(longest_example(model, 64)["input_ids"]) == LONGEST
    with torch.no_grad():
        assert model.live(**batch).logits.shape == (1, len(MOODS))


@pytest.mark.parametrize(("save", "longest"), [(save_bert, 16), (save_distilbert, 16), (tiny_llama, 256)])
def test_other_models_use_all_their_positions(tmp_path: Path, save: Callable[[Path], Path], longest: int) -> None:
    from transformers import AutoModel  # noqa: PLC0415

    model = AutoModel.from_pretrained(save(tmp_path))
    assert longest_input(model) == model.config.max_position_embeddings == longest


def test_a_model_without_positions_has_no_bound() -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)  # type: ignore[assignment]
    assert longest_input(model) == 1 << 30
