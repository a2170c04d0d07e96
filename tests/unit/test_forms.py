"""What a coordinator can say at all, one line a case; the rest is in tests/integration/test_hostile_coordinator.py."""

from dataclasses import replace
from typing import get_args

import pytest

from common.errors import InvalidRequest
from coordinator.config import BaseModelConfig
from worker.config import KNOWN_TASKS
from worker.forms import MAX_HEARTBEAT_SECONDS, MAX_LABELS, MAX_LAYERS, check_place, check_welcome
from worker.messages import MAX_TEXT_CHARACTERS, ModelRequest, Place, Polled, Welcome, printable

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
