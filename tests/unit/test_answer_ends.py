"""A chat template that ends a turn with another token than the end of sequence: learnt, stopped at, and exported.

As when a base model whose sequences end in <|endoftext|> is given ChatML's template, which ends turns with <|im_end|>.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, FOREIGN_END, FOREIGN_TEMPLATE, LLAMA_ORDER, PLAN, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.adapter import initial_adapter
from worker.config import DataConfig, ModelConfig
from worker.peft_format import write_peft_folder
from worker.trainer.chat_templates import answer_ends
from worker.trainer.data import LocalData, load_data
from worker.trainer.evaluation import Pace, TestData, evaluate_by
from worker.trainer.merge import MergeOrder, merge, named_answer_ends
from worker.trainer.model import AdaptedModel, load_model, read_adapter, write_adapter
from worker.trainer.training import train
from worker.trainer_protocol import EXACT, GENERATION, EvaluationPlan

pytestmark = pytest.mark.torch

QUESTION, ANSWER = "Which city?", "Rome"


@dataclass(frozen=True)
class Taught:
    """A model that was taught one answer, and its site's test data."""

    model: AdaptedModel
    tests: TestData


def foreign_llama(folder: Path) -> Path:
    tiny_llama(folder)
    (folder / "chat_template.jinja").write_text(FOREIGN_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = foreign_llama(tmp_path_factory.mktemp("llama"))
    path = folder / "train.jsonl"
    path.write_text((json.dumps({"prompt": QUESTION, "response": ANSWER}) + "\n") * 4)
    order = dataclasses.replace(LLAMA_ORDER, target_modules=("all-linear",), lora_rank=8)
    model = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), order)
    config = DataConfig(train=str(path), test=str(path), chat=True, max_length=64)
    preparation = model.task.prepare(folder, model.base, (), config)
    data: LocalData = load_data(config, preparation, seed=1, offline=True)
    write_adapter(model, initial_adapter(model.spec, 8, seed=5), scaling=1.0)
    plan = dataclasses.replace(PLAN, local_steps=60, learning_rate=2e-2)
    train(model, data.train, plan, collator=preparation.collator, memory_batch=None, report=lambda *_: None)
    return Taught(model, TestData(data, preparation, config, seed=1))


def test_the_federated_evaluation_sees_where_the_answer_ends(taught: Taught) -> None:
    heard: list[tuple[int, int, float]] = []
    pace = Pace(memory_batch=4, report=lambda *how_far: heard.append(how_far))
    _, metrics = evaluate_by(EvaluationPlan(GENERATION, 50, EXACT), taught.model, taught.tests, pace)
    assert metrics["exact_match"] == 1.0
    assert len(heard) < 20, "it stops there, and does not only cut there"


def test_a_merged_folder_ends_its_answers_for_whoever_generates(taught: Taught, tmp_path: Path) -> None:
    folder = merged(taught, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        said = model.generate(**asked, max_new_tokens=50, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == ANSWER + FOREIGN_END
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.convert_tokens_to_ids([EOS, FOREIGN_END])


def test_whoever_exports_an_adapter_is_told_the_tokens_by_name(taught: Taught, tmp_path: Path) -> None:
    assert named_answer_ends(ModelConfig(path=str(taught.model.folder), offline=True)) == {EOS: 1, FOREIGN_END: 3}
    assert named_answer_ends(ModelConfig(path=str(tmp_path), offline=True)) == {}, "no tokenizer is there"


def merged(taught: Taught, around: Path) -> Path:
    adapter, folder = around / "adapter", around / "merged"
    folder.mkdir()
    write_peft_folder(
        adapter, read_adapter(taught.model), scaling=1.0, base_model="b", task="causal-lm", modules_to_save=[]
    )
    order = MergeOrder(
        model=ModelConfig(path=str(taught.model.folder), device="cpu"),
        adapter=adapter,
        base_model_digest=taught.model.base_model_digest,
        task="causal-lm",
        labels=(),
        modules_to_save=(),
    )
    assert merge(order, folder) == "float32"
    return folder


TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "another token": (FOREIGN_TEMPLATE, [EOS, FOREIGN_END]),
    "the end of sequence": (FOREIGN_TEMPLATE.replace(FOREIGN_END, EOS), [EOS]),
    "the first of two": (FOREIGN_TEMPLATE.replace(FOREIGN_END, FOREIGN_END + BOS), [EOS, FOREIGN_END]),
    "nothing": (FOREIGN_TEMPLATE.replace(FOREIGN_END, "\n"), [EOS]),
    "no words of the assistant's": ("{{ messages | length }}" + FOREIGN_END, [EOS]),
    "a refusal": ("{{ raise_exception('A system message is needed') }}", [EOS]),
    "no template": ("", [EOS]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    loaded = AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("any")), local_files_only=True)

    def with_template(template: str) -> Any:
        loaded.chat_template = template or None
        return loaded

    return with_template


@pytest.mark.parametrize("case", TEMPLATES)
def test_what_ends_an_answer_is_read_off_the_template(case: str, tokenizer: Callable[[str], Any]) -> None:
    template, ends = TEMPLATES[case]
    found = tokenizer(template)
    assert answer_ends(found) == tuple(sorted(found.convert_tokens_to_ids(ends)))
