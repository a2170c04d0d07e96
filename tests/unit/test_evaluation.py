"""An evaluation as the coordinator's plan says, on a tiny Llama: what is measured, on what, and what is left."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs
from tiny_models import LLAMA_ORDER, PLAN, VIT_ORDER, random_adapter, save_vit, side_images, tiny_llama, word_problems
from torch import nn

from common.adapter import Adapter
from common.codec import encode
from common.errors import InvalidRequest
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer import process as trainer
from worker.trainer.data import DataError, load_data
from worker.trainer.evaluation import Pace, TestData, WrongMethod, evaluate_by
from worker.trainer.generation import Prompted, Writer, generate, log_likelihoods
from worker.trainer.model import AdaptedModel, load_model, read_adapter, set_dropout, write_adapter
from worker.trainer.training import train
from worker.trainer_protocol import (
    CHOICE,
    EXACT,
    GENERATION,
    LAST_NUMBER,
    LOSS,
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    Failed,
    Load,
    Loaded,
    ProgressMade,
    to_line,
)

pytestmark = pytest.mark.torch

PACE = Pace(memory_batch=4, report=lambda *_: None)
CITIES = ["Rome", "Paris or Lyon", "Oslo"]


@dataclass(frozen=True)
class Site:
    """A model that is loaded once, and test data that a test writes."""

    model: AdaptedModel
    folder: Path

    def tests(self, rows: Sequence[Mapping[str, Any]], *, seed: int = 1, **columns: Any) -> TestData:
        path = self.folder / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(test=str(path), max_length=128, **columns)
        preparation = self.model.task.prepare(self.model.folder, self.model.base, self.model.labels, config)
        data = load_data(config, preparation, seed=1, offline=True)
        return TestData(data, preparation, config, seed)

    def measure(self, plan: EvaluationPlan, tests: TestData) -> tuple[int, dict[str, float]]:
        return evaluate_by(plan, self.model, tests, PACE)

    def answers(self, tests: TestData, tokens: int) -> list[str]:
        """What the model itself says to the prompts."""
        asked: Any = tests.preparation
        prompts = [asked.prompt(row) for row in tests.data.test_rows]
        writer = Writer(asked.tokenizer, tokens, asked.ends)
        return generate(self.model, prompts, writer=writer, batch=1, report=lambda *_: None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    model = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), LLAMA_ORDER)
    write_adapter(model, random_adapter(model.spec, 4), scaling=0.5)
    return Site(model, folder)


def problems(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["question"], "response": row["answer"]} for row in word_problems(count)]


# --- loss


def test_by_loss_each_example_counts_or_the_first_of_a_seeded_order(site: Site) -> None:
    tests = site.tests(problems(12))
    everything = site.measure(EvaluationPlan(), tests)
    assert everything[0] == 12
    assert {"eval_loss"} <= everything[1].keys()
    few = EvaluationPlan(LOSS, max_examples=5)
    assert site.measure(few, tests) == site.measure(few, tests), "the same examples in every round"
    assert site.measure(few, tests)[0] == 5
    others = site.measure(few, replace(tests, seed=2))
    assert others[0] == 5
    assert others[1] != site.measure(few, tests)[1]
    assert site.measure(EvaluationPlan(LOSS, max_examples=99), tests) == everything


def test_the_first_of_a_seeded_order_are_among_more_of_them(site: Site) -> None:
    rows = [{"prompt": f"{number} + 0 =", "response": f"{number}"} for number in range(8)]
    tests = site.tests(rows)
    heard: dict[int, set[str]] = {}
    for most in (2, 5):
        asked: Any = tests.preparation
        seen: list[str] = []
        spy = _Spying(asked, seen)
        evaluate_by(EvaluationPlan(GENERATION, 1, EXACT, most), site.model, replace(tests, preparation=spy), PACE)
        heard[most] = set(seen)
    assert (len(heard[2]), len(heard[5])) == (2, 5)
    assert heard[2] < heard[5]


class _Spying:
    """A preparation that notes which records are asked for their prompt."""

    def __init__(self, preparation: Any, seen: list[str]) -> None:
        self._preparation = preparation
        self._seen = seen
        self.tokenizer = preparation.tokenizer
        self.ends = preparation.ends
        self.collator = preparation.collator
        self.response = preparation.response
        self.answer = preparation.answer
        self.example = preparation.example
        self.examples = preparation.examples

    def prompt(self, row: Any) -> Sequence[int]:
        self._seen.append(row.where)
        found: Sequence[int] = self._preparation.prompt(row)
        return found


# --- generation


def test_exact_match_is_the_share_of_answers_that_are_the_response(site: Site) -> None:
    rows = problems(6)
    said = site.answers(site.tests(rows), tokens=8)
    assert all(text.strip() for text in said)
    for row, text, is_right in zip(rows, said, (True, False, True, False, False, False), strict=True):
        row["response"] = "  " + text.replace(" ", "  ") + "\n" if is_right else text + " no"
    num_examples, metrics = site.measure(EvaluationPlan(GENERATION, 8, EXACT), site.tests(rows))
    assert num_examples == 6
    assert metrics["exact_match"] == pytest.approx(2 / 6)
    assert np.isfinite(metrics["eval_loss"])


def test_by_last_number_only_the_numbers_count(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = site.tests(
        [
            {"prompt": "one", "response": "1 + 1 = 2\n#### 2"},
            {"prompt": "two", "response": "#### 1,000"},
            {"prompt": "three", "response": "#### 3"},
            {"prompt": "four", "response": "#### -4"},
        ]
    )
    said = ["so 1 and 1 make 2.00", "#### 1000\n\nNext: 7", "three", "4"]
    monkeypatch.setattr("worker.trainer.evaluation.generate", lambda *_, **__: said)
    _, metrics = site.measure(EvaluationPlan(GENERATION, 8, LAST_NUMBER), tests)
    assert metrics["exact_match"] == 0.5


def test_generation_through_the_chat_template_asks_for_the_assistants_turn(site: Site) -> None:
    tests = site.tests(problems(2), chat=True)
    asked: Any = tests.preparation
    text = asked.tokenizer.decode(asked.prompt(tests.data.test_rows[0]))
    assert text.endswith("<|assistant|>")
    num_examples, metrics = site.measure(EvaluationPlan(GENERATION, 2, EXACT), tests)
    assert (num_examples, metrics["exact_match"]) == (2, 0.0)


def test_a_response_without_a_number_tells_the_operator_what_to_set_and_the_site_where_it_is(site: Site) -> None:
    tests = site.tests([*problems(1), {"prompt": "what?", "response": "none"}])
    with capture_logs() as logged, pytest.raises(WrongMethod) as told:
        site.measure(EvaluationPlan(GENERATION, 4, LAST_NUMBER), tests)
    assert 'set evaluation.match = "exact"' in str(told.value)
    assert str(site.folder) not in str(told.value), "which leaves the site"
    assert "test.jsonl, line 2" in logged[-1]["where"]


def test_more_tokens_than_the_model_has_places_for_are_refused(site: Site) -> None:
    with pytest.raises(WrongMethod, match="evaluation of 256 new tokens: this model reads and writes at most 256"):
        site.measure(EvaluationPlan(GENERATION, 256, EXACT), site.tests(problems(1)))


# --- choice


def questions(*right: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}: ", "choices": CITIES, "answer": answer} for n, answer in enumerate(right)]


def test_choice_takes_the_likeliest_answer_whole_and_by_its_characters(site: Site) -> None:
    tests = site.tests(questions(0, 0, 0, 0))
    asked: Any = tests.preparation
    picked: dict[str, list[int]] = {"accuracy": [], "accuracy_norm": []}
    for row in tests.data.test_rows:
        given = [Prompted(asked.prompt(row), asked.answer(row, text)) for text in CITIES]
        found = np.array(log_likelihoods(site.model, given, batch=1, report=lambda *_: None))
        picked["accuracy"].append(int(np.argmax(found)))
        picked["accuracy_norm"].append(int(np.argmax(found / np.array([4, 13, 4]))))
    assert picked["accuracy"] != picked["accuracy_norm"], "or the two metrics are not told apart here"
    for metric, numbers in picked.items():
        num_examples, metrics = site.measure(EvaluationPlan(CHOICE), site.tests(questions(*numbers)))
        assert (num_examples, metrics[metric]) == (4, 1.0)
        assert metrics.keys() == {"accuracy", "accuracy_norm"}
        others = [(number + 1) % 3 for number in numbers]
        assert site.measure(EvaluationPlan(CHOICE), site.tests(questions(*others)))[1][metric] == 0.0


def test_choices_of_different_numbers_stay_with_their_question(site: Site) -> None:
    rows = questions(0, 0, 0)
    rows[1]["choices"] = ["Rome", "Paris"]
    tests = site.tests(rows)
    assert 0.0 <= site.measure(EvaluationPlan(CHOICE), tests)[1]["accuracy"] <= 1.0
    alone = [site.measure(EvaluationPlan(CHOICE), site.tests([row]))[1]["accuracy"] for row in rows]
    assert site.measure(EvaluationPlan(CHOICE), tests)[1]["accuracy"] == pytest.approx(np.mean(alone))


def test_data_without_choices_lists_the_columns_it_has(site: Site) -> None:
    with pytest.raises(DataError, match="column 'choices' does not exist; there are prompt, response"):
        site.measure(EvaluationPlan(CHOICE), site.tests(problems(1)))


# --- what does not fit


@pytest.mark.parametrize("method", [GENERATION, CHOICE])
def test_a_method_that_does_not_fit_the_task_names_both(tmp_path: Path, method: str) -> None:
    model = load_model(ModelConfig(path=str(save_vit(tmp_path)), device="cpu", offline=True), VIT_ORDER)
    pictures = Site(model, tmp_path)
    with pytest.raises(WrongMethod) as refusal:
        pictures.measure(EvaluationPlan(method, 4), pictures.tests(side_images(2)))
    assert f"{method!r} does not fit the task 'image-classification'" in str(refusal.value)


def test_a_method_that_nobody_knows_is_refused(site: Site) -> None:
    with pytest.raises(InvalidRequest, match="evaluation method 'taste': loss, generation or choice is expected"):
        site.measure(EvaluationPlan("taste"), site.tests(problems(1)))


# --- what is left behind


def trained(site: Site, start: Adapter, tests: TestData) -> bytes:
    write_adapter(site.model, start, scaling=0.5)
    collator = tests.preparation.collator
    train(site.model, tests.data.test, PLAN, collator=collator, memory_batch=None, report=lambda *_: None)
    return encode(read_adapter(site.model))


@pytest.mark.parametrize("plan", [EvaluationPlan(), EvaluationPlan(GENERATION, 4, EXACT), EvaluationPlan(CHOICE)])
def test_what_is_trained_after_an_evaluation_has_the_same_bytes(site: Site, plan: EvaluationPlan) -> None:
    start = random_adapter(site.model.spec, 4)
    rows = [row | {"response": CITIES[row["answer"]]} for row in questions(0, 1, 2, 0)]
    tests = site.tests(rows)
    expected = trained(site, start, tests)
    write_adapter(site.model, start, scaling=0.5)
    before = site.measure(plan, tests)
    assert encode(read_adapter(site.model)) == encode(start), "an evaluation changes no number"
    assert trained(site, start, tests) == expected
    write_adapter(site.model, start, scaling=0.5)
    assert site.measure(plan, tests) == before, "and training changes nothing of how it is measured"


def test_dropout_of_the_training_before_it_counts_for_nothing(site: Site) -> None:
    adapter = random_adapter(site.model.spec, 4)
    tests = site.tests([row | {"response": CITIES[row["answer"]]} for row in questions(*[0, 1, 2] * 4)])
    asked: Any = tests.preparation
    given = [Prompted(asked.prompt(row), asked.answer(row, city)) for row in tests.data.test_rows for city in CITIES]

    def measured() -> tuple[Any, list[float]]:
        likelihoods = log_likelihoods(site.model, given, batch=4, report=lambda *_: None)
        return site.measure(EvaluationPlan(CHOICE), tests), likelihoods

    write_adapter(site.model, adapter, scaling=0.5)
    site.model.live.eval()
    expected = measured()
    try:
        todo: Any = {"collator": asked.collator, "memory_batch": None, "report": lambda *_: None}
        train(site.model, tests.data.test, replace(PLAN, lora_dropout=0.5, local_steps=1), **todo)
        write_adapter(site.model, adapter, scaling=0.5)
        assert any(isinstance(each, nn.Dropout) and each.p == 0.5 for each in site.model.live.modules())
        site.model.live.train()
        assert [measured(), measured()] == [expected, expected]
    finally:
        set_dropout(site.model, 0.0)


# --- in the trainer


def test_a_stop_is_heard_in_the_midst_of_an_answer(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for of_the_whole_process in ("set_up_logs", "_set_up_libraries"):
        monkeypatch.setattr(trainer, of_the_whole_process, lambda *_, **__: None)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems(10)))
    config = WorkerConfig(
        rank=4,
        threads=1,
        model=ModelConfig(path=str(site.folder), device="cpu", offline=True),
        data=DataConfig(train=str(path), max_length=128),
    )
    stopping = threading.Event()
    said: list[Answer] = []

    def stop_at(step: int) -> Callable[[Answer], None]:
        def say(answer: Answer) -> None:
            said.append(answer)
            # The loss comes first, in one batch; then 200 tokens of one batch, which report as 0 of 1.
            if isinstance(answer, ProgressMade) and answer.step == step:
                stopping.set()

        return say

    process = trainer._Trainer(stop_at(0), stopping)
    loaded = process.answer(to_line(Load(config.model_dump_json(), LLAMA_ORDER)))
    assert isinstance(loaded, Loaded)
    content = encode(random_adapter(site.model.spec, 4))
    (tmp_path / "slice").write_bytes(content)
    order = Evaluate(str(tmp_path / "slice"), 4, 0.5, "float32", EvaluationPlan(GENERATION, 200, LAST_NUMBER))
    stopped = process.answer(to_line(order))
    assert isinstance(stopped, Failed)
    assert (stopped.reason, stopped.fatal) == ("stopped", False)
    assert "at step 0 of 1" in stopped.message
    stopping.clear()
    short = replace(order, plan=replace(order.plan, max_new_tokens=2))
    process._say = said.append
    again = process.answer(to_line(short))
    assert isinstance(again, Evaluated), "the trainer lives on"
    assert again.metrics["exact_match"] == 0.0
