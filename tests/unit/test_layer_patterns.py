"""Patterns that a coordinator sends: which can be meant at all, and which a site's policy lets through."""

from dataclasses import replace

import pytest

from common.errors import InvalidRequest
from worker import forms, policy
from worker.config import SitePolicy
from worker.forms import MAX_LAYER_CHARACTERS, MAX_LAYER_PATTERNS
from worker.messages import ModelRequest, Welcome
from worker.policy import PolicyRefused

MODEL = ModelRequest(
    base_model="a model",
    base_model_digest="",
    task="causal-lm",
    labels=(),
    target_modules=("all-linear",),
    modules_to_save=(),
    global_rank=8,
    seed=1,
)


def welcome(*target_modules: str, modules_to_save: tuple[str, ...] = ()) -> Welcome:
    model = replace(MODEL, target_modules=target_modules, modules_to_save=modules_to_save)
    return Welcome(protocol=1, federation="hospitals", model=model)


@pytest.mark.parametrize(
    "pattern", ["*_proj", "model.layers.1?.self_attn.q_proj", "*", "?", "layers.*.mlp.*", "a" * MAX_LAYER_CHARACTERS]
)
def test_stars_and_question_marks_can_be_meant(pattern: str) -> None:
    forms.check_welcome(welcome(pattern))


@pytest.mark.parametrize(
    "pattern",
    [r".*\.q_proj", "[qv]_proj", "(a+)+b", "q_proj|v_proj", "..", "*" * (MAX_LAYER_CHARACTERS + 1), "", "q\n"],
)
def test_no_other_pattern_can_be_meant(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=r"target_modules .*a layer's name or its end; \* and \? are allowed"):
        forms.check_welcome(welcome(pattern))


@pytest.mark.parametrize("name", ["classif*", "?", "classifie?"])
def test_what_is_trained_whole_is_named_in_full(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"modules_to_save .*no pattern"):
        forms.check_welcome(welcome("q_proj", modules_to_save=(name,)))


def test_patterns_are_few() -> None:
    forms.check_welcome(welcome(*(f"*.{number}" for number in range(MAX_LAYER_PATTERNS)), "q_proj", "v_proj"))
    with pytest.raises(InvalidRequest, match=f"{MAX_LAYER_PATTERNS + 1} patterns; at most {MAX_LAYER_PATTERNS}"):
        forms.check_welcome(welcome(*(f"*.{number}" for number in range(MAX_LAYER_PATTERNS + 1))))


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("layers.1?.self_attn.q_proj", "q_proj"),
        ("layers.1?.self_attn.q_proj", "self_attn.q_proj"),
        ("*.q_proj", "q_proj"),
        ("?.q_proj", "q_proj"),
    ],
)
def test_a_pattern_is_allowed_if_all_that_it_stands_for_is(pattern: str, allowed: str) -> None:
    policy.check_welcome(SitePolicy(allowed_target_modules=(allowed,)), welcome(pattern))


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("*", "q_proj"),
        ("*q_proj", "q_proj"),  # also xq_proj
        ("?q_proj", "q_proj"),
        ("*_proj", "q_proj"),
        ("q_pro?", "q_proj"),
        ("q_*", "q_proj"),
        ("q_proj*", "q_proj"),
        ("self_attn.?_proj", "self_attn.q_proj"),
        ("*.q_proj", "self_attn.q_proj"),  # also mlp.q_proj
        ("self_att?.q_proj", "self_attn.q_proj"),
        ("all-linea?", "all-linear"),
    ],
)
def test_a_pattern_is_refused_if_it_could_stand_for_more(pattern: str, allowed: str) -> None:
    with pytest.raises(PolicyRefused, match=r"policy\.allowed_target_modules allows"):
        policy.check_welcome(SitePolicy(allowed_target_modules=(allowed,)), welcome(pattern))
