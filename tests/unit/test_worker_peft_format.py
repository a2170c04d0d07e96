"""PEFT's names and files, without PEFT; that stock PEFT agrees is shown in test_worker_model.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.errors import AdapterMismatch
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE, adapter_config, from_state, to_state, write_peft_folder

SPEC = AdapterSpec((ModuleShape("layer.0.query", 3, 4),), (TensorShape("classifier.weight", (2, 3)),))
ADAPTER = Adapter(
    {"layer.0.query": Factors(np.ones((2, 4), np.float32), np.full((3, 2), 2, np.float32))},
    {"classifier.weight": np.full((2, 3), 3, np.float32)},
)


def config(**changes: Any) -> dict[str, object]:
    given: dict[str, Any] = {
        "scaling": 1.0,
        "base_model": "org/model",
        "task": "image-classification",
        "modules_to_save": ["classifier"],
    }
    return adapter_config(ADAPTER, **{**given, **changes})


def test_an_adapter_has_pefts_keys() -> None:
    assert {key: array.shape for key, array in to_state(ADAPTER).items()} == {
        "base_model.model.layer.0.query.lora_A.weight": (2, 4),
        "base_model.model.layer.0.query.lora_B.weight": (3, 2),
        "base_model.model.classifier.weight": (2, 3),
    }


def test_a_state_that_lacks_a_key_or_has_one_too_many_is_refused() -> None:
    state = to_state(ADAPTER)
    factor = state.pop("base_model.model.layer.0.query.lora_B.weight")
    with pytest.raises(AdapterMismatch, match=r"missing \['base_model.model.layer.0.query.lora_B.weight'\]"):
        from_state(state, SPEC)
    state["base_model.model.layer.0.query.lora_B.bias"] = factor
    with pytest.raises(AdapterMismatch, match=r"unexpected \['base_model.model.layer.0.query.lora_B.bias'\]"):
        from_state(state, SPEC)


@pytest.mark.parametrize(("scaling", "alpha"), [(1.0, 2), (0.5, 1), (2.0, 4), (0.3, 0.6)])
def test_lora_alpha_is_scaling_times_rank(scaling: float, alpha: float) -> None:
    assert config(scaling=scaling)["lora_alpha"] == alpha


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("/home/ada/models/vit", "vit"),
        ("./models/vit", "vit"),
        ("~/vit", "vit"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
    ],
)
def test_no_path_of_this_machine_leaves_with_the_folder(given: str, public: str) -> None:
    assert config(base_model=given)["base_model_name_or_path"] == public


def test_the_folder_holds_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "adapter"
    write_peft_folder(folder, ADAPTER, scaling=1.0, base_model="m", task="t", modules_to_save=["classifier"])
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert json.loads((folder / CONFIG_FILE).read_text())["target_modules"] == ["layer.0.query"]
    assert load_file(folder / WEIGHTS_FILE).keys() == to_state(ADAPTER).keys()
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read the one may read the other


def test_a_tensor_of_no_saved_module_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(AdapterMismatch, match=r"classifier\.weight"):
        write_peft_folder(folder, ADAPTER, scaling=1.0, base_model="m", task="t", modules_to_save=["score"])
    assert not folder.exists()
