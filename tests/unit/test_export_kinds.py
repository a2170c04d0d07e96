"""Padding, scaling and what vLLM takes: pure rules of an export, by numbers that can be checked by hand."""

import json
import shlex
from dataclasses import replace
from math import isclose, sqrt
from pathlib import Path

import numpy as np
import pytest
from origins import ORIGIN

from cli.errors import Failed
from cli.export_loading import Place, loading_lines
from cli.export_origin import Origin, read_origin, write_origin
from cli.export_vllm import (
    ACCEPTED_RANKS,
    Server,
    accepted_rank,
    check_served,
    pad_adapter,
    serve_lines,
    served_name,
    warnings_for,
)
from common.adapter import Adapter, Factors
from common.errors import AdapterMismatch, ConfigError
from coordinator.config import CoordinatorConfig
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE, lora_alpha_of, read_peft_folder, write_peft_folder

ADAPTER = Adapter(
    {"q_proj": Factors(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([[5.0, 6.0]], np.float32))},
    {"classifier.weight": np.ones((2, 2), np.float32)},
)
LLAMA = replace(
    ORIGIN, task="causal-lm", labels=(), modules=("model.layers.0.self_attn.q_proj",), modules_to_save=()
)  # fmt: skip
HERE = Place("folder", "org/base", merged=False)


def scaling_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """As PEFT and vLLM compute it."""
    return alpha / sqrt(rank) if rslora else alpha / rank


@pytest.mark.parametrize("rule", ["constant", "alpha_over_rank", "alpha_over_sqrt_rank"])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 12, 48, 64])
def test_peft_computes_the_federations_scaling(rule: str, alpha: float, rank: int) -> None:
    scaling = {"constant": alpha, "alpha_over_rank": alpha / rank, "alpha_over_sqrt_rank": alpha / sqrt(rank)}[rule]
    lora_alpha, rslora = lora_alpha_of(scaling, rank)
    assert scaling_of(lora_alpha, rank, rslora=rslora) == scaling
    if alpha >= 1:
        assert isinstance(lora_alpha, int)


@pytest.mark.parametrize("scaling", [0.1, 0.3, 1 / 3, 2 / 7, 1e-3, 17.77])
@pytest.mark.parametrize("rank", [3, 5, 7, 24, 320])
def test_an_odd_scaling_is_met_to_the_last_digit_of_a_float(scaling: float, rank: int) -> None:
    lora_alpha, rslora = lora_alpha_of(scaling, rank)
    assert isclose(scaling_of(lora_alpha, rank, rslora=rslora), scaling, rel_tol=4e-16)


@pytest.mark.parametrize("rank", ACCEPTED_RANKS)
@pytest.mark.parametrize("scaling", [1.0, 0.75, 16 / sqrt(5), 1 / 3])
def test_padding_keeps_the_scaling(scaling: float, rank: int) -> None:
    lora_alpha, rslora = lora_alpha_of(scaling, rank)
    assert isclose(scaling_of(lora_alpha, rank, rslora=rslora), scaling, rel_tol=4e-16)


def test_padding_adds_zeros_and_changes_no_product() -> None:
    padded = pad_adapter(ADAPTER, 4).modules["q_proj"]
    assert padded.lora_A.tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert padded.lora_B.tolist() == [[5, 6, 0, 0]]
    before = ADAPTER.modules["q_proj"]
    assert np.array_equal(padded.lora_B @ padded.lora_A, before.lora_B @ before.lora_A)


def test_padding_never_cuts() -> None:
    with pytest.raises(ConfigError, match="the adapter has rank 2; cut it with --rank 1"):
        pad_adapter(ADAPTER, 1)


@pytest.mark.parametrize(("rank", "accepted"), [(1, 8), (8, 8), (9, 16), (48, 64), (257, 320), (512, 512)])
def test_vllm_takes_the_next_of_its_ranks(rank: int, accepted: int) -> None:
    assert accepted_rank(rank) == accepted


def test_a_rank_beyond_vllms_is_refused() -> None:
    with pytest.raises(Failed, match="rank 513: vLLM takes at most 512; cut it with --rank 512"):
        accepted_rank(513)


def test_vllm_serves_language_models_without_whole_modules() -> None:
    check_served(LLAMA)
    with pytest.raises(Failed, match="task is 'image-classification'"):
        check_served(replace(LLAMA, task="image-classification"))
    with pytest.raises(Failed, match=r"\['lm_head'\] whole.*--merged"):
        check_served(replace(LLAMA, modules_to_save=("lm_head",)))


def test_layers_that_vllm_may_not_take_are_named() -> None:
    assert warnings_for(LLAMA) == []
    (warning,) = warnings_for(replace(LLAMA, modules=("h.0.attn.c_attn", "h.0.mlp.c_proj")))
    assert "c_attn, c_proj" in warning


def test_the_commands_survive_a_shell() -> None:
    serve, request = serve_lines("it's mine", "/tmp/a b", Server("org/base model", 16, (2, 7)))
    assert shlex.split(serve) == [
        *("vllm", "serve", "org/base model", "--enable-lora", "--max-lora-rank", "16"),
        *("--lora-modules", "it-s-mine=/tmp/a b"),
    ]
    asked = json.loads(shlex.split(request)[-1])
    assert (asked["model"], asked["stop_token_ids"]) == ("it-s-mine", [2, 7])


@pytest.mark.parametrize(("name", "served"), [("gsm8k", "gsm8k"), ("../x", "x"), ("$(rm)", "rm"), ("...", "adapter")])
def test_a_served_name_needs_no_quotes(name: str, served: str) -> None:
    assert served_name(name) == served


def test_a_peft_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_peft_folder(tmp_path, ADAPTER, scaling=0.7, base_model="m", task="t", modules_to_save=["classifier"])
    adapter, scaling = read_peft_folder(tmp_path)
    assert isclose(scaling, 0.7, rel_tol=4e-16)
    assert np.array_equal(adapter.modules["q_proj"].lora_A, ADAPTER.modules["q_proj"].lora_A)
    assert np.array_equal(adapter.tensors["classifier.weight"], ADAPTER.tensors["classifier.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 3}, "says rank 3.*holds rank 2"),
        ({"r": "many"}, "damaged"),
    ],
)
def test_a_folder_of_somebody_else_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    write_peft_folder(tmp_path, ADAPTER, scaling=1.0, base_model="m", task="t", modules_to_save=["classifier"])
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(AdapterMismatch, match=said):
        read_peft_folder(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [None, b"{", b"\x00" * 20])
def test_a_damaged_folder_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    write_peft_folder(tmp_path, ADAPTER, scaling=1.0, base_model="m", task="t", modules_to_save=["classifier"])
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterMismatch):
        read_peft_folder(tmp_path)


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_origin(tmp_path, ORIGIN)
    assert read_origin(tmp_path) == ORIGIN


@pytest.mark.parametrize("content", ["", "{}", '{"federation": 3}', "[]"])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    write_origin(tmp_path, ORIGIN)
    (tmp_path / "raflora.json").write_text(content)
    with pytest.raises(ConfigError, match=r"raflora\.json: is damaged"):
        read_origin(tmp_path)


def test_a_folder_without_a_record_says_where_records_come_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`raflora export` or a coordinator's export_dir"):
        read_origin(tmp_path)


def tasks_of_the_coordinator() -> list[str]:
    """Those that a federation can have."""
    model = CoordinatorConfig.model_fields["model"].annotation
    assert model is not None
    return list(model.model_fields["task"].annotation.__args__)


@pytest.mark.parametrize("task", tasks_of_the_coordinator())
@pytest.mark.parametrize("merged", [False, True])
def test_every_task_has_lines_that_load_it(task: str, merged: bool) -> None:
    origin: Origin = replace(ORIGIN, task=task)
    if merged and task == "feature-classification":
        return  # refused before there is anything to load
    lines = loading_lines(origin, replace(HERE, merged=merged))
    compile("\n".join(lines), "lines", "exec")
    assert any(line.startswith("model = ") for line in lines)
    assert any("peft" in line for line in lines) is not merged


def test_an_unknown_task_has_none() -> None:
    assert loading_lines(replace(ORIGIN, task="telepathy"), HERE) == []
