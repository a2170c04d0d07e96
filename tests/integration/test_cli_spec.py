"""`raflora spec`: what a federation must know of a base model."""

import json
from pathlib import Path

import pytest

from cli.main import main

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers by an old name
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_spec_names_the_weights_the_modules_and_the_head(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spec.json"
    command = ["spec", str(model_folder), "--task", "image-classification", "--offline", "--out", str(out)]
    command += ["--target-modules", "all-linear", "--modules-to-save", "classifier", "--labels", "cat", "dog", "owl"]
    assert main(command) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())
    assert len(found["base_model_digest"]) == 64
    assert {"name": "classifier.weight", "shape": [3, 8]} in found["tensors"]
    assert {(m["out_features"], m["in_features"]) for m in found["modules"]} == {(8, 8), (16, 8), (8, 16)}
    assert str(out) in capsys.readouterr().out


def test_a_model_that_cannot_be_described_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["spec", str(tmp_path / "nothing"), "--task", "image-classification", "--offline"]
    assert main([*command, "--target-modules", "query"]) == 1
    shown = capsys.readouterr()
    assert "nothing" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
