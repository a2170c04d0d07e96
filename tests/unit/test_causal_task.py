"""From records to tokens: what of them is learnt, what does not fit, and what is refused; with a real tokenizer."""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from tiny_models import EOS, LLAMA_ORDER, save_bpe, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, GPT2Config, GPT2LMHeadModel

from worker.config import DataConfig, ModelConfig
from worker.trainer.causal import CausalLanguageModel, LanguagePreparation
from worker.trainer.data import DataError, Row, load_data
from worker.trainer.model import load_model
from worker.trainer.task import ModelError
from worker.trainer.tasks import task_named
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "It is 8."},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of which files may be changed."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def prepared(folder: Path, base: Any, **settings: Any) -> LanguagePreparation:
    preparation = CausalLanguageModel().prepare(folder, base, (), DataConfig(train="train.jsonl", **settings))
    assert isinstance(preparation, LanguagePreparation)
    return preparation


def row(**values: Any) -> Row:
    return Row("train.jsonl, line 7", Path(), values)


def texts(preparation: LanguagePreparation, record: Row) -> tuple[str, str]:
    """The whole example and what is learnt of it."""
    example = preparation.example(record)
    learnt = [label for label in example["labels"] if label != -100]
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    return preparation.tokenizer.decode(example["input_ids"]), preparation.tokenizer.decode(learnt)


def use_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


# ---------------------------------------------------------------- what is learnt


def test_of_an_instruction_the_answer_and_its_end_are_learnt(llama: Path, base: Any) -> None:
    preparation = prepared(llama, base, prompt_template="Q: {prompt}\nA: ")
    assert texts(preparation, row(prompt="2 + 3?", response="5")) == (f"Q: 2 + 3?\nA: 5{EOS}", f"5{EOS}")


def test_the_prompt_is_tokenized_as_it_will_be_in_generation(llama: Path, base: Any) -> None:
    preparation = prepared(llama, base)
    record = row(prompt="Ada has 3 app", response="les.")
    together = preparation.tokenizer("Ada has 3 apples.")["input_ids"]
    prompt = list(preparation.prompt(record))
    assert list(preparation.example(record)["input_ids"][: len(prompt)]) == prompt != together[: len(prompt)]


def test_an_end_that_the_tokenizer_adds_by_itself_stands_neither_before_the_answer_nor_twice(
    llama: Path, folder: Path, base: Any
) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": EOS, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {EOS: {"id": EOS, "ids": [1], "tokens": [EOS]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    plain, eager = prepared(llama, base), prepared(folder, base)
    assert eager.tokenizer("2 + 3?")["input_ids"][-1] == eager.tokenizer.eos_token_id, "or nothing is shown"
    question = row(prompt="2 + 3?", response="5")
    assert list(eager.prompt(question)) == list(plain.prompt(question))
    assert list(eager.answer(question, "5")) == list(plain.answer(question, "5"))
    for record in (question, row(text="2 + 3 = 5")):
        assert texts(eager, record) == texts(plain, record)
    said = row(prompt=f"Say {EOS}", response="5")  # the site's own, at the end of a prompt, stays
    assert list(plain.prompt(said))[-1] == plain.tokenizer.eos_token_id


def test_of_a_plain_text_everything_is_learnt_but_the_first_token(llama: Path, base: Any) -> None:
    preparation = prepared(llama, base)
    example = preparation.example(row(text="Ada has 3 apples."))
    assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert preparation.tokenizer.decode(example["input_ids"]) == f"Ada has 3 apples.{EOS}"


def test_of_a_conversation_the_assistants_turns_are_learnt(llama: Path, base: Any) -> None:
    whole, learnt = texts(prepared(llama, base), row(messages=CHAT))
    assert learnt == f"It is 5.{EOS}It is 8.{EOS}"
    assert whole.startswith("<s><|system|>Add.</s><|user|>2 + 3?</s><|assistant|>It is 5.</s><|user|>")


def test_prompt_and_response_as_two_turns_are_what_those_turns_are(llama: Path, base: Any) -> None:
    as_turns = prepared(llama, base, chat=True).example(row(prompt="2 + 3?", response="5"))
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    assert as_turns == prepared(llama, base).example(row(messages=messages))


def test_marks_of_the_template_count_before_anything_else(folder: Path, base: Any) -> None:
    use_template(
        folder,
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}{{ eos_token }}{%- endgeneration -%}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    )
    assert texts(prepared(folder, base), row(messages=CHAT))[1] == f"It is 5.{EOS}It is 8.{EOS}"


def test_an_answer_that_a_template_leaves_open_gets_an_end(folder: Path, base: Any) -> None:
    use_template(folder, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    whole, learnt = texts(prepared(folder, base), row(messages=CHAT[1:3]))
    assert whole == f"user: 2 + 3?\nassistant: It is 5.{EOS}"
    assert learnt == f"assistant: It is 5.{EOS}"  # nothing asks for it in this template


def test_a_template_gets_the_same_day_every_day(folder: Path, base: Any) -> None:
    use_template(
        folder,
        "{{ strftime_now('%d %b %Y') }} {{ date_string }}|"
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    whole, _ = texts(prepared(folder, base), row(messages=CHAT[1:3]))
    assert whole.startswith("26 Jul 2024 26 Jul 2024|")


def known_template(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "specials", "turn"),
    [
        ("qwen2_5", ["<|im_start|>", "<|im_end|>"], "It is {}.<|im_end|>"),
        ("qwen3", ["<|im_start|>", "<|im_end|>"], "<think>\n\n</think>\n\nIt is {}.<|im_end|>"),
        ("llama3_2", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "It is {}.<|eot_id|>"),
        ("gemma3", ["<start_of_turn>", "<end_of_turn>"], "It is {}.<end_of_turn>"),
    ],
)
def test_templates_of_well_known_models(folder: Path, base: Any, name: str, specials: list[str], turn: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = known_template(name)
    tokenizer.save_pretrained(folder)
    preparation = prepared(folder, base)
    assert texts(preparation, row(messages=CHAT[1:3]))[1] == turn.format(5)
    learnt = texts(preparation, row(messages=CHAT[1:]))[1]
    assert learnt.replace(">\n<", "><").rstrip("\n") == turn.format(5) + turn.format(8)


def test_a_template_that_nobody_knows_and_that_tells_nothing_apart_is_refused(folder: Path, base: Any) -> None:
    use_template(folder, "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(DataError, match=r"line 7: the chat template renders message 2 .*endgeneration"):
        prepared(folder, base).example(row(messages=CHAT[1:3]))


def test_what_a_template_refuses_is_told_with_its_place(folder: Path, base: Any) -> None:
    use_template(folder, "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(DataError, match="line 7: the chat template refuses these messages: Roles must alternate"):
        prepared(folder, base).example(row(messages=CHAT))


def test_without_a_chat_template_messages_are_refused_and_told_what_to_do(
    llama: Path, tmp_path: Path, base: Any
) -> None:
    save_bpe(tmp_path, chat_template=False)
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja.*data\.chat = false"):
        prepared(tmp_path, base).example(row(messages=CHAT))
    assert texts(prepared(tmp_path, base), row(prompt="2 + 3?", response="5"))[1] == f"5{EOS}"


# ---------------------------------------------------------------- what an evaluation asks for


def test_prompt_and_answer_of_an_evaluation_are_those_of_the_training(llama: Path, base: Any) -> None:
    for preparation, record in [
        (prepared(llama, base), row(prompt="2 + 3?", response="It is 8.")),
        (prepared(llama, base, chat=True), row(prompt="2 + 3?", response="It is 8.")),
        (prepared(llama, base), row(messages=CHAT)),
    ]:
        answer = preparation.answer(record, "It is 8.")
        end = preparation.tokenizer.eos_token_id
        assert [*preparation.prompt(record), *answer, end] == list(preparation.example(record)["input_ids"])
        assert preparation.response(record) == "It is 8."


def test_a_plain_text_has_no_question(llama: Path, base: Any) -> None:
    with pytest.raises(DataError, match="asks nothing"):
        prepared(llama, base).prompt(row(text="Ada"))


# ---------------------------------------------------------------- what does not fit


def loaded(folder: Path, tmp_path: Path, base: Any, rows: list[Any], **settings: Any) -> Any:
    for name, part in (("train", rows), ("test", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
    config = DataConfig(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), **settings)
    return load_data(config, CausalLanguageModel().prepare(folder, base, (), config), seed=1, offline=True)


SHORT, LONG = {"prompt": "2 + 3?", "response": "5"}, {"prompt": "Ada " * 20, "response": "5"}
CUT = {"prompt": "2 + 3?", "response": "Ada " * 20}


def test_an_example_that_would_lose_its_whole_answer_is_left_out_and_told(
    llama: Path, tmp_path: Path, base: Any
) -> None:
    with capture_logs() as logs:
        data = loaded(llama, tmp_path, base, [SHORT, LONG, CUT, SHORT], max_length=16)
    assert data.num_examples == len(data.train) == 3
    assert [len(example["input_ids"]) for example in data.train][1] == 16
    told = next(line for line in logs if line["log_level"] == "warning")
    assert (told["left_out"], told["end_cut_off"], told["of"], told["max_length"]) == (1, 1, 4, 16)


def test_data_of_which_nothing_fits_is_refused(llama: Path, tmp_path: Path, base: Any) -> None:
    with pytest.raises(DataError, match=r"line 1 and all 1 after it: every example is longer than data\.max_"):
        loaded(llama, tmp_path, base, [LONG, LONG], max_length=16)


def test_a_single_example_that_does_not_fit_is_refused(llama: Path, base: Any) -> None:
    with pytest.raises(DataError, match=r"line 7: the answer begins after token 16.*data\.max_length"):
        prepared(llama, base, max_length=16).example(row(**LONG))


def test_no_example_is_longer_than_the_model_reads(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "short", longest=16)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert len(prepared(folder, base, max_length=4096).example(row(**CUT))["input_ids"]) == 16


def test_an_empty_file_says_what_to_do(llama: Path, tmp_path: Path, base: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: holds no records, .*put records into it"):
        loaded(llama, tmp_path, base, [])


# ---------------------------------------------------------------- packing


def test_packing_puts_several_records_into_one_example_and_counts_the_records(
    llama: Path, tmp_path: Path, base: Any
) -> None:
    data = loaded(llama, tmp_path, base, [SHORT] * 10, max_length=32, packing=True)
    assert data.num_examples == 10
    assert len(data.train) < 5
    assert sum(sum(example["seq_lengths"]) for example in data.train) == sum(
        len(example["input_ids"]) for example in data.train
    )
    assert len(data.test) == 1
    assert "seq_lengths" not in data.test[0]


def test_a_packed_batch_is_computed_as_if_every_example_stood_alone(llama: Path, tmp_path: Path, base: Any) -> None:
    rows = [{"prompt": f"{n} + {n}?", "response": "Ada " * n} for n in range(1, 9)]
    packing = prepared(llama, base, packing=True, max_length=64)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    records = [Row(f"line {n}", tmp_path, each) for n, each in enumerate(rows)]
    packed = packing.examples(records, is_training=True).examples
    alone = packing.examples(records, is_training=False).examples
    assert len(packed) < len(alone)

    def losses(examples: Any) -> tuple[float, int]:
        batch = packing.collator(list(examples))
        with torch.no_grad():
            # With a cache transformers looks at no positions; training has none.
            logits = base(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        return float(found), int(batch["labels"][:, 1:].ne(-100).sum())

    (packed_loss, packed_tokens), (loss, tokens) = losses(packed), losses(alone)
    assert packed_tokens == tokens
    assert packed_loss == pytest.approx(loss, rel=1e-5)


def test_a_model_in_which_packed_examples_see_each_other_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    own = model.forward

    def blind(*args: Any, position_ids: Any = None, **rest: Any) -> Any:
        return own(*args, **rest)

    monkeypatch.setattr(model, "forward", blind)
    with pytest.raises(ModelError, match=r"packed examples would see each other.*data\.packing = false"):
        prepared(llama, model, packing=True)
    prepared(llama, model)


# ---------------------------------------------------------------- models


def test_a_model_whose_head_does_more_than_trl_knows_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    own = model.forward

    def louder(*args: Any, labels: Any = None, **rest: Any) -> Any:
        found = own(*args, labels=labels, **rest)
        found.loss = found.loss * 1.01
        return found

    monkeypatch.setattr(model, "forward", louder)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: the loss of a trial is .* by the model itself, but"):
        prepared(llama, model)


def test_lora_on_the_head_is_refused(folder: Path) -> None:
    order = ModelOrder(**{**vars(LLAMA_ORDER), "target_modules": ("lm_head",)})
    model = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), order)
    with pytest.raises(ModelError, match=r"lm_head.*modules_to_save"):
        prepared(folder, model.base)


def test_trying_a_model_leaves_it_as_it_was(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).train()
    model.lm_head.eval()
    prepared(llama, model, packing=True)
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training
    assert "forward" not in vars(model)


def test_a_model_of_another_family_is_taken_and_packs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    save_bpe(tmp_path, pad_token=False)
    preparation = prepared(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path), packing=True)
    assert preparation.tokenizer.pad_token == EOS


def test_a_tokenizer_of_another_model_is_refused(folder: Path, base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(100)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"line 7: the tokenizer gives token 4\d\d, but the model knows only 400"):
        prepared(folder, base).example(row(text="a <extra99>"))


def test_a_tokenizer_without_an_end_of_sequence_is_refused(folder: Path, base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*tokenizer_config\.json"):
        prepared(folder, base)


def test_the_mean_loss_weighs_tokens_and_not_examples() -> None:
    sums = np.array([[2.0, 1.0], [6.0, 3.0]])  # of two examples: losses, tokens that were right
    found = CausalLanguageModel().metrics(EvalPrediction(sums, np.array([1, 4])))
    assert found == {"loss": 8.0 / 5, "token_accuracy": 4.0 / 5}


def test_the_task_is_known_by_its_name() -> None:
    assert isinstance(task_named("causal-lm"), CausalLanguageModel)
