"""PEFT's options in [adapter]: each is refused with its reason, or with the key that says it here."""

import tomllib
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from coordinator.lora_options import WHY_REFUSED

FEDERATION = """
[model]
base_model = "llama"
task = "causal-lm"
[adapter]
target_modules = ["q_proj", "layers.1?.mlp.*"]
global_rank = 8
{option}
[rounds]
num_rounds = 2
[training]
learning_rate = 1e-3
"""


def settings(folder: Path, option: str = "", *overrides: str) -> CoordinatorConfig:
    path = folder / "federation.toml"
    path.write_text(FEDERATION.format(option=option))
    return load_settings(CoordinatorConfig, path, overrides=overrides, environ={})


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("use_dora = true", "adapter: use_dora: DoRA .* magnitude .*leave it out"),
        ('bias = "lora_only"', "adapter: bias: only LoRA's factors and modules_to_save .*name a whole module"),
        ("use_rslora = true", 'adapter: use_rslora: write scaling = "alpha_over_sqrt_rank"'),
        ("lora_dropout = 0.1", r"adapter: lora_dropout: .*write lora_dropout under \[training\]"),
        ("rank_pattern = { q_proj = 4 }", r"adapter: rank_pattern: a client has one rank .*write \[ranks\]"),
        ("alpha_pattern = { q_proj = 4 }", "adapter: alpha_pattern: all layers share one scaling"),
        ("layers_to_transform = [1, 2]", r'layers_to_transform: .*target_modules = \["layers.1\?.self_attn.q_proj"\]'),
        ('layers_pattern = "layers"', "layers_pattern: write the layers as patterns"),
        ('init_lora_weights = "pissa"', "init_lora_weights: the coordinator makes the first adapter from rounds.seed"),
        ('target_parameters = ["experts"]', "target_parameters: only linear layers are adapted"),
        ('exclude_modules = ["lm_head"]', "exclude_modules: write in target_modules"),
        ("r = 8", "adapter: r: .*write global_rank"),
    ],
)
def test_an_option_of_peft_is_refused_with_its_reason(tmp_path: Path, option: str, reason: str) -> None:
    assert next(iter(tomllib.loads(option))) in WHY_REFUSED
    with pytest.raises(ConfigError, match=reason) as raised:
        settings(tmp_path, option)
    assert str(tmp_path / "federation.toml") in str(raised.value)


def test_what_the_refusals_advise_is_taken(tmp_path: Path) -> None:
    advised = 'scaling = "alpha_over_sqrt_rank"\nlora_alpha = 16'
    config = settings(tmp_path, advised, "training.lora_dropout=0.1")
    assert (config.adapter.scaling, config.training.lora_dropout) == ("alpha_over_sqrt_rank", 0.1)
    settings(tmp_path, "", 'adapter.target_modules=["layers.1?.self_attn.q_proj"]')


def test_two_of_them_are_told_together_and_a_slip_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use_dora: .*; bias: "):
        settings(tmp_path, 'use_dora = true\nbias = "all"')
    with pytest.raises(ConfigError, match=r"adapter\.global_rnak: there is no such key; did you mean global_rank"):
        settings(tmp_path, "global_rnak = 8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('adapter.target_modules=["[qv]_proj"]', r"'\[qv\]_proj': a layer's name.*\* and \? stand for anything"),
        ('adapter.target_modules=[".*q_proj|v"]', "there is no other pattern"),
        ('adapter.modules_to_save=["classif*"]', r"'classif\*': .*not a pattern"),
    ],
)
def test_a_pattern_of_another_kind_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, "", override)


def test_a_section_that_is_none_is_told_as_one() -> None:
    with pytest.raises(ConfigError, match=r"--set adapter: adapter: .*valid dictionary"):
        load_settings(CoordinatorConfig, None, overrides=["adapter=everything"], environ={})


def test_the_page_on_models_names_every_refused_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data-and-models.md").read_text(encoding="utf-8")
    assert [option for option in WHY_REFUSED if f"`{option}`" not in page] == []
