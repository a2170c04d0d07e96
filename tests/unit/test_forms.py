"""What a coordinator can say at all, one line a case; the rest is in tests/integration/test_hostile_coordinator.py."""

from dataclasses import replace
from typing import get_args

import pytest

from common.errors import InvalidRequest
from coordinator.config import BaseModelConfig, EvaluationConfig, TrainingConfig
from worker.config import KNOWN_TASKS
from worker.forms import (
    MAX_BATCH_SIZE,
    MAX_EVALUATED_EXAMPLES,
    MAX_HEARTBEAT_SECONDS,
    MAX_LABELS,
    MAX_LAYER_PATTERNS,
    MAX_LAYERS,
    MAX_NEW_TOKENS,
    MAX_RANK,
    MAX_RANK_LEVELS,
    MAX_WARMUP_STEPS,
    check_place,
    check_task,
    check_welcome,
)
from worker.messages import (
    MAX_TEXT_CHARACTERS,
    Blob,
    ModelRequest,
    Place,
    Polled,
    Task,
    TaskKind,
    Welcome,
    printable,
)
from worker.trainer_protocol import CHOICE, GENERATION, LAST_NUMBER, LOSS, MATCHES, METHODS, EvaluationPlan, Plan

MODEL = ModelRequest(
    base_model="a model",
    base_model_digest="",
    task="image-classification",
    labels=("left", "rechts und links", "上"),
    target_modules=("all-linear",),
    modules_to_save=("classifier", "bert.pooler.dense"),
    global_rank=8,
    seed=(1 << 64) - 1,
)
WELCOME = Welcome(protocol=1, federation="hospitals-2026.a", model=MODEL)
PLACE = Place(lora_rank=4, manifest_digest="a" * 64, heartbeat_seconds=0.3, wire_dtype="bfloat16", status_sentence="")

ANSWERS = EvaluationPlan(GENERATION, max_new_tokens=256, match=LAST_NUMBER)


def evaluation(plan: EvaluationPlan, kind: TaskKind = TaskKind.EVALUATE) -> Task:
    return Task(
        kind=kind,
        round=3,
        attempt=1,
        lease_token=1,
        lora_rank=4,
        scaling=1.0,
        adapter=Blob("a" * 64, 100),
        plan=Plan(1e-3, 1, 0.0, 4, 0.0, 1.0, 0, 1),
        manifest_digest="b" * 64,
        evaluation=plan,
    )


def test_what_real_federations_say_is_taken() -> None:
    check_welcome(WELCOME)
    check_welcome(replace(WELCOME, model=replace(MODEL, labels=tuple(map(str, range(21_841))))))
    check_welcome(replace(WELCOME, model=replace(MODEL, labels=())))
    check_place(PLACE)
    check_place(replace(PLACE, heartbeat_seconds=MAX_HEARTBEAT_SECONDS))


def test_the_tasks_are_the_coordinators() -> None:
    assert get_args(BaseModelConfig.model_fields["task"].annotation) == KNOWN_TASKS


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, labels=tuple(map(str, range(MAX_LABELS + 1)))),
        replace(MODEL, target_modules=tuple(f"layer{number}" for number in range(MAX_LAYERS + 1))),
        replace(MODEL, modules_to_save=("a..b",)),
        replace(MODEL, modules_to_save=(".a",)),
    ],
)
def test_one_more_than_a_bound_is_too_many(model: ModelRequest) -> None:
    with pytest.raises(InvalidRequest):
        check_welcome(replace(WELCOME, model=model))


def test_what_rounds_will_ask_for_is_within_bounds() -> None:
    check_welcome(replace(WELCOME, batch_size=MAX_BATCH_SIZE, lora_dropout=0.99))
    with pytest.raises(InvalidRequest, match="handshake: batch_size 65537; expected: up to 65536"):
        check_welcome(replace(WELCOME, batch_size=MAX_BATCH_SIZE + 1))
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="handshake: lora_dropout"):
            check_welcome(replace(WELCOME, lora_dropout=dropout))


def test_the_operator_s_levels_and_share_are_within_bounds() -> None:
    most = tuple(range(1, MAX_RANK_LEVELS + 1))
    check_welcome(replace(WELCOME, rank_levels=most, memory_share=1.0))
    check_welcome(replace(WELCOME, rank_levels=(1, MAX_RANK), memory_share=0.0))
    with pytest.raises(InvalidRequest, match="handshake: 65 rank levels; at most 64 are taken"):
        check_welcome(replace(WELCOME, rank_levels=(*most, 65)))
    for level in (0, MAX_RANK + 1):
        with pytest.raises(InvalidRequest, match=f"handshake: rank level {level}; expected: 1 to 4096"):
            check_welcome(replace(WELCOME, rank_levels=(level,)))
    for share in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="handshake: memory_share"):
            check_welcome(replace(WELCOME, memory_share=share))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("waiting for 1 more client", "waiting for 1 more client"),
        ("Grüße, 上海", "Grüße, 上海"),
        ("a\x1b[2Jb\r\nc\td\x00e\u202ef\x9bg\u2028h", "a?[2Jb  c d?e?f?g?h"),
        ("x" * (MAX_TEXT_CHARACTERS + 1), "x" * (MAX_TEXT_CHARACTERS - 3) + "..."),
    ],
)
def test_text_is_cleaned_and_cut(text: str, clean: str) -> None:
    assert printable(text) == clean
    assert Polled((), is_finished=False, status_sentence=text).status_sentence == clean
    assert replace(PLACE, status_sentence=text).status_sentence == clean
    assert replace(MODEL, base_model=text).base_model == clean


def test_patterns_are_fewer_than_layers() -> None:
    most = tuple(f"layers.{number}.*_proj" for number in range(MAX_LAYER_PATTERNS))
    check_welcome(replace(WELCOME, model=replace(MODEL, target_modules=(*most, "query", "value"))))
    with pytest.raises(InvalidRequest, match="handshake: 65 patterns; at most 64 are taken"):
        check_welcome(replace(WELCOME, model=replace(MODEL, target_modules=(*most, "*.q_proj"))))


# --- training


def training(**changes: object) -> Task:
    task = evaluation(EvaluationPlan(), TaskKind.TRAIN)
    return replace(task, plan=replace(task.plan, **changes))  # type: ignore[arg-type]


def test_a_plan_at_its_bounds_is_taken() -> None:
    check_task(training(lora_dropout=0.999, warmup_steps=MAX_WARMUP_STEPS))
    (most,) = [m.le for m in TrainingConfig.model_fields["warmup_steps"].metadata if hasattr(m, "le")]
    assert most == MAX_WARMUP_STEPS, "what the operator may write, a worker takes"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_dropout": 1.0}, "lora_dropout 1.0; expected: at least 0 and below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout -0.1; expected"),
        ({"lora_dropout": float("nan")}, "lora_dropout nan; expected"),
        ({"warmup_steps": MAX_WARMUP_STEPS + 1}, "warmup_steps 1000001; expected: 0 to 1000000"),
        ({"warmup_steps": -1}, "warmup_steps -1; expected"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_task(training(**changes))
    assert f"round 3: {sentence}" in str(refusal.value)


# --- evaluations


def test_the_ways_to_evaluate_are_the_coordinators() -> None:
    assert get_args(EvaluationConfig.model_fields["method"].annotation) == METHODS
    assert get_args(EvaluationConfig.model_fields["match"].annotation) == MATCHES
    (most,) = [m.le for m in EvaluationConfig.model_fields["max_new_tokens"].metadata if hasattr(m, "le")]
    assert most == MAX_NEW_TOKENS, "what the operator may write, a worker takes"


@pytest.mark.parametrize(
    "plan",
    [
        EvaluationPlan(),
        EvaluationPlan(LOSS, max_examples=MAX_EVALUATED_EXAMPLES),
        EvaluationPlan(CHOICE),
        ANSWERS,
        replace(ANSWERS, max_new_tokens=MAX_NEW_TOKENS),
    ],
)
def test_an_evaluation_that_can_be_meant_is_taken(plan: EvaluationPlan) -> None:
    check_task(evaluation(plan))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (EvaluationPlan("bleu"), "evaluation method 'bleu'; expected: loss, generation, choice"),
        (EvaluationPlan("x\x1b[2J" * 100), "evaluation method"),
        (replace(ANSWERS, match=".*"), "evaluation match '.*'; expected: exact, last-number"),
        (replace(ANSWERS, max_new_tokens=0), "max_new_tokens 0; expected: 1 to 32768"),
        (replace(ANSWERS, max_new_tokens=MAX_NEW_TOKENS + 1), "max_new_tokens 32769; expected: 1 to 32768"),
        (EvaluationPlan(LOSS, max_new_tokens=1 << 31), "max_new_tokens 2147483648; expected: 0 to 32768"),
        (EvaluationPlan(max_examples=MAX_EVALUATED_EXAMPLES + 1), "max_examples"),
        (EvaluationPlan(max_examples=-1), "max_examples -1"),
    ],
)
def test_an_evaluation_that_cannot_be_meant_is_refused(plan: EvaluationPlan, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_task(evaluation(plan))
    assert f"round 3: {sentence}" in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_the_evaluation_of_a_task_that_trains_does_not_matter() -> None:
    check_task(evaluation(EvaluationPlan("bleu"), TaskKind.TRAIN))
