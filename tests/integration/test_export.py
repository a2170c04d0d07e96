"""What `raflora export` writes, loaded back: every kind of folder of four kinds of model says what the federation says.

The printed lines run in a Python of their own that cannot import raflora and, for merged models, cannot import PEFT.
"""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canned_coordinator import serving
from exporting import KINDS, RANK, TWO_TEXTS, Trained, first, printed_lines, trained
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_models import EOS, MOODS
from transformers import LlamaConfig, LlamaForCausalLM

from cli.main import main
from common.adapter import Adapter, Factors
from common.errors import AdapterMismatch
from worker.config import ModelConfig
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder
from worker.trainer import merge
from worker.trainer.base_model import digest_of_weights
from worker.trainer.task import ModelError

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]  # twenty models are made and loaded
LOAD_ELSEWHERE = Path(__file__).resolve().parents[1] / "load_elsewhere.py"
CUT = 2
FLAGS: dict[str, tuple[str, ...]] = {
    "adapter": (),
    "cut": ("--rank", str(CUT)),
    "padded": ("--pad-to", "7"),
    "merged": ("--merged",),
    "merged-cut": ("--merged", "--rank", str(CUT)),
}
Case = tuple[str, str]  # model, form
CASES = [(name, form) for name in KINDS for form in FLAGS]


@dataclass(frozen=True)
class Made:
    """Every export of every model: folders, what was printed, and what each folder answered elsewhere."""

    models: dict[str, Trained]
    folders: dict[Case, Path]
    told: dict[Case, str]
    answers: dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    around = tmp_path_factory.mktemp("models")
    models = {name: trained(kind, around) for name, kind in KINDS.items()}
    folders = {(name, form): around / f"{name}-{form}" for name, form in CASES}
    told = {}
    for name, form in CASES:
        # All but the first are made of the first's folder, when no coordinator runs any more.
        source: tuple[object, ...] = ("--from", folders[name, "adapter"])
        base: tuple[object, ...] = ("--model", models[name].base, "--offline") if "--merged" in FLAGS[form] else ()
        if form == "adapter":
            with serving(models[name].canned) as address:
                told[name, form] = export(folders[name, form], "--coordinator", address)
        else:
            told[name, form] = export(folders[name, form], *source, *FLAGS[form], *base)
    answers = elsewhere(around, models, told)
    return Made(models, folders, told, answers)


def export(folder: Path, *flags: object) -> str:
    """What a successful export printed."""
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["export", str(folder), *map(str, flags)]) == 0
    return said.getvalue()


def elsewhere(around: Path, models: dict[str, Trained], told: dict[Case, str]) -> dict[Case, dict[str, Any]]:
    """What the models that the printed lines load answer there; base models are named relative to `around`."""
    cases = sorted(told, key=lambda case: "merged" not in case[1])  # PEFT cannot be hidden once it is loaded
    jobs = [
        {
            "lines": printed_lines(told[case]),
            "inputs": {name: tensor.tolist() for name, tensor in models[case[0]].kind.inputs.items()},
            "hidden": ["peft"] if "merged" in case[1] else [],
        }
        for case in cases
    ]
    asked = {"jobs": jobs}
    ended = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", str(LOAD_ELSEWHERE)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=around,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["found"] == []
    return dict(zip(cases, said["answers"], strict=True))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_printed_lines_load_what_the_federation_has(name: str, form: str, made: Made) -> None:
    expected = made.models[name].logits(CUT if "cut" in form else RANK)
    np.testing.assert_allclose(made.answers[name, form]["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_cut_and_the_base_alone_say_something_else(name: str, made: Made) -> None:
    """Or the test above could not fail."""
    model = made.models[name]
    whole, cut = model.logits(), model.logits(CUT)
    none = replace(model, adapter=model.without_update()).logits()
    assert np.abs(whole - cut).max() > 0.01
    assert np.abs(cut - none).max() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_cut_is_the_base_plus_the_truncated_product(name: str, made: Made) -> None:
    model = made.models[name]
    auto_class = model.model.task.auto_class
    base, merged = (
        auto_class.from_pretrained(at, **labelled(model)) for at in (model.base, made.folders[name, "merged-cut"])
    )
    for module, factors in first(model.adapter, CUT).modules.items():
        update = model.kind.scaling * factors.lora_B @ factors.lora_A
        before, after = (each.get_submodule(module).weight.detach().numpy() for each in (base, merged))
        lies_across = name.startswith("gpt2")  # Conv1D
        np.testing.assert_allclose(after, before + (update.T if lies_across else update), rtol=1e-5, atol=1e-6)


def labelled(model: Trained) -> dict[str, Any]:
    labels = model.kind.order.labels
    return {"num_labels": len(labels), "local_files_only": True} if labels else {"local_files_only": True}


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2-classifier"])
@pytest.mark.parametrize("form", ["merged", "merged-cut"])
def test_a_merged_classifier_knows_its_classes(name: str, form: str, made: Made) -> None:
    assert made.answers[name, form]["labels"] == list(KINDS[name].order.labels)


@pytest.mark.parametrize("form", FLAGS)
def test_a_classifier_that_was_made_to_write_pads_as_in_training(form: str, made: Made) -> None:
    assert made.answers["gpt2-classifier", form]["padding"] == EOS
    assert np.shape(made.answers["gpt2-classifier", form]["logits"]) == (len(TWO_TEXTS), len(MOODS))


def test_tokenizer_processor_and_chat_template_come_along(made: Made) -> None:
    assert made.answers["llama", "merged"]["chat_template"]
    assert "Tokenizer" in made.answers["bert", "merged"]["processor"]
    assert "ImageProcessor" in made.answers["vit", "merged"]["processor"]
    assert (made.folders["llama", "merged"] / "generation_config.json").is_file()


@pytest.mark.parametrize("name", KINDS)
def test_padding_writes_zeros_and_the_same_scaling(name: str, made: Made) -> None:
    config = json.loads((made.folders[name, "padded"] / CONFIG_FILE).read_text())
    assert config["r"] == 7
    divisor = 7**0.5 if config["use_rslora"] else 7
    assert config["lora_alpha"] / divisor == pytest.approx(KINDS[name].scaling, rel=4e-16)
    state = load_file(made.folders[name, "padded"] / WEIGHTS_FILE)
    for key, array in state.items():
        if "lora_A" in key:
            assert not array[RANK:].any()
        if "lora_B" in key:
            assert not array[:, RANK:].any()


def test_every_folder_has_a_card_and_a_record_and_nothing_else_of_ours(made: Made) -> None:
    common = {"README.md", "raflora.json"}
    assert names_in(made.folders["llama", "adapter"]) == common | {CONFIG_FILE, WEIGHTS_FILE}
    merged = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    modes = {path.stat().st_mode for path in made.folders["llama", "merged"].iterdir()}
    assert len(modes) == 1  # whoever may read the one may read the other
    assert names_in(made.folders["llama", "merged"]) == common | merged | {"chat_template.jinja"}
    assert not [path for path in made.folders["llama", "merged"].parent.iterdir() if path.name.startswith(".")]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_card_tells_the_story_and_names_nobody(made: Made) -> None:
    for form in ("adapter", "merged-cut"):
        folder = made.folders["bert", form]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "Trained by 2 clients" in card
        assert "| round | 2 of 2 |" in card
        assert "| 2 | 1 | 200 | 2 |" in card  # rank, clients, examples of the last round, updates
        assert "| clients' own data | 70.0 % | 0.250 |" in card
        assert made.models["bert"].model.base_model_digest in card
        assert "hospital" not in card
        assert "hospital" not in (folder / "raflora.json").read_text()
        assert str(folder.parent) not in card


def test_clients_are_named_when_asked_for(made: Made, tmp_path: Path) -> None:
    with serving(made.models["bert"].canned) as address:
        export(tmp_path / "named", "--coordinator", address, "--with-client-names")
    assert "| hospital-nord | 2 | 200 | 2 |" in (tmp_path / "named" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_a_merged_model_can_be_chosen(dtype: str, made: Made, tmp_path: Path) -> None:
    model = made.models["llama"]
    flags = ("--from", made.folders["llama", "adapter"], "--merged", "--model", model.base, "--dtype", dtype)
    assert dtype in export(tmp_path / "merged", *flags)
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16" if dtype == "bfloat16" else "F16"}  # noqa: SIM118
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_a_base_of_other_weights_is_refused_with_both_digests(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made.models["gpt2"].model.base_model_digest
    flags = ("--from", made.folders["llama", "adapter"], "--merged", "--model", made.models["gpt2"].base)
    assert main(["export", str(tmp_path / "merged"), *map(str, flags)]) == 2
    said = capsys.readouterr().err
    assert other in said
    assert made.models["llama"].model.base_model_digest in said
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((made.models["llama"].base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    flags = ("--from", made.folders["llama", "adapter"], "--merged", "--model", base)
    assert main(["export", str(tmp_path / "merged"), *map(str, flags)]) == 2
    assert "its weights are quantised" in capsys.readouterr().err


def test_an_adapter_may_take_the_place_of_a_merged_model(made: Made, tmp_path: Path) -> None:
    folder, source = tmp_path / "model", made.folders["llama", "adapter"]
    export(folder, "--from", source, "--merged", "--model", made.models["llama"].base)
    (folder / "mine.txt").write_text("mine")
    export(folder, "--from", source, "--overwrite")
    # A config.json beside an adapter would be loaded as a model without it.
    left = names_in(folder)
    assert {"mine.txt", CONFIG_FILE, WEIGHTS_FILE} <= left
    assert not left & {"config.json", "model.safetensors", "generation_config.json"}


def test_shards_are_written_and_replaced_by_one_file(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = made.models["llama"], tmp_path / "merged"
    flags = ("--from", made.folders["llama", "adapter"], "--merged", "--model", model.base)
    with monkeypatch.context() as patched:
        patched.setattr(merge, "MAX_SHARD_SIZE", "40KB")
        export(folder, *flags)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = model.model.task.auto_class.from_pretrained(folder, local_files_only=True).eval()
    np.testing.assert_allclose(
        loaded(**model.kind.inputs).logits.detach().numpy(), model.logits(), rtol=1e-4, atol=1e-5
    )
    export(folder, *flags, "--overwrite")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_layer_that_shares_its_weights_is_not_merged_into(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    factors = Factors(np.ones((2, 8), np.float32), np.ones((16, 2), np.float32))
    write_peft_folder(
        tmp_path / "adapter", Adapter({"lm_head": factors}, {}), scaling=1.0, base_model="b", task="causal-lm",
        modules_to_save=[],
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one and the same tensor"
    ):
        merge.merge(order_of(base, tmp_path / "adapter"), tmp_path)


def order_of(base: Path, adapter: Path) -> merge.MergeOrder:
    return merge.MergeOrder(
        model=ModelConfig(path=str(base), device="cpu"),
        adapter=adapter,
        base_model_digest=digest_of_weights(base),
        task="causal-lm",
        labels=(),
        modules_to_save=(),
    )


def test_an_adapter_of_which_peft_takes_a_part_is_not_merged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    factors = Factors(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32))
    here, absent = (f"model.layers.{number}.self_attn.q_proj" for number in (0, 1))
    write_peft_folder(
        tmp_path / "adapter", Adapter({here: factors, absent: factors}, {}), scaling=1.0, base_model="b",
        task="causal-lm", modules_to_save=[],
    )  # fmt: skip
    into = tmp_path / "merged"
    into.mkdir()
    with pytest.raises(AdapterMismatch, match=rf"left out \['{absent}'\]"):
        merge.merge(order_of(base, tmp_path / "adapter"), into)
    assert list(into.iterdir()) == []


def test_vllm_is_told_how(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = export(
        tmp_path / "served", "--from", made.folders["llama", "adapter"], "--for", "vllm", "--model", "org/llama"
    )
    folder = tmp_path / "served"
    assert f"vllm serve org/llama --enable-lora --max-lora-rank 8 --lora-modules served={folder}\n" in said
    assert "padded to 8" in said
    assert json.loads((folder / CONFIG_FILE).read_text())["r"] == 8
    assert main(["export", str(tmp_path / "x"), "--from", str(made.folders["bert", "adapter"]), "--for", "vllm"]) == 1
    assert "'sequence-classification'" in capsys.readouterr().err


def test_a_rank_that_the_folder_lacks_is_refused(made: Made, tmp_path: Path) -> None:
    for source in ("adapter", "padded"):  # zeros are no directions
        flags = ["--from", str(made.folders["bert", source]), "--rank", "5"]
        assert main(["export", str(tmp_path / "cut"), *flags]) == 3
