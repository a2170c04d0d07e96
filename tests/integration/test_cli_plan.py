"""`raflora plan`: a census and a settings file in, figures out; what it says of a model against the model itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from coordinators import to_toml
from rich.console import Console

from cli import plan_tables
from cli.main import main
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout, WireDtype
from coordinator.planning import Site
from worker.measurement import Line, Measurement, Probe, Proposal

GIB = 1 << 30
RANKS = (8, 16, 32, 48, 64)
SPEC = AdapterSpec(
    tuple(
        ModuleShape(f"model.layers.{i}.self_attn.{name}", out, 3072)
        for i in range(28)
        for name, out in (("q_proj", 3072), ("v_proj", 1024))
    )
)
BASE: Mapping[str, Any] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "parameters": 3_212_749_824,
    "linear_parameters": 2_818_572_288,
    "hidden_size": 3072,
    "layers": 28,
    "vocabulary": 128_256,
    "tokens": 0,
}


def write_spec(folder: Path, **changes: Any) -> Path:
    """A spec file as `raflora spec` writes it."""
    modules = [{"name": m.name, "out_features": m.out_features, "in_features": m.in_features} for m in SPEC.modules]
    file = folder / "spec.json"
    content = {"base_model_digest": "0" * 64, "base": BASE, "modules": modules, "tensors": [], **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def write_federation(folder: Path, spec: Path | None, **changes: Any) -> Path:
    """A federation.toml of the paper's setting."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"base_model": "meta-llama/Llama-3.2-3B", "task": "causal-lm"},
        "adapter": {"target_modules": ["q_proj", "v_proj"], "global_rank": 64},
        "rounds": {"num_rounds": 50, "min_clients": 5},
        "ranks": {"policy": "hardware", "levels": list(RANKS)},
        "training": {"learning_rate": 2e-4, "batch_size": 8, "local_steps": 100},
    }
    if spec is not None:
        settings["adapter"]["spec"] = str(spec)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    file = folder / "federation.toml"
    file.write_text(f'name = "gsm8k"\n{to_toml(settings)}')
    return file


def write_probe(folder: Path, site: str, memory_bytes: int, base_bytes: int, **changes: Any) -> Path:
    """What `raflora probe` leaves at a site."""
    speeds = {8: 0.5, 64: 1.0}
    line = Line(base_bytes=base_bytes, bytes_per_rank=6 << 20, deviation=0.0)
    probe = Probe(
        base_model_digest="0" * 64,
        task="causal-lm",
        target_modules=("q_proj", "v_proj"),
        modules_to_save=(),
        lora_dropout=0.0,
        batch_size=8,
        max_length=256,
        dtype="auto",
        memory_batch=None,
        device="cuda",
        memory_bytes=memory_bytes,
        memory_share=0.9,
        measurements=tuple(
            Measurement(lora_rank=rank, peak_bytes=line.peak_bytes(rank), seconds_per_step=seconds, micro_batch=8)
            for rank, seconds in speeds.items()
        ),
        proposal=Proposal(lora_rank=64, examples_per_second=8.0, line=line, micro_batch=8),
    )
    file = folder / site / "probe.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**probe.model_dump(mode="json"), **changes}))
    return file


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    return write_federation(tmp_path, write_spec(tmp_path))


def planned(capsys: pytest.CaptureFixture[str], *command: str | Path) -> Mapping[str, Any]:
    """The plan as a script sees it."""
    code = main(["plan", *map(str, command), "--format", "json"])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    found: Mapping[str, Any] = json.loads(shown.out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """The one line that a wrong command line is answered with."""
    assert main(["plan", *map(str, command)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


def test_the_paper_s_setting_from_its_shapes_alone(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, federation, "--sites", "8x5,16x3,32x2,48x1,64x1")
    assert [level["lora_rank"] for level in found["levels"]] == list(RANKS)
    assert [len(level["sites"]) for level in found["levels"]] == [5, 3, 2, 1, 1]
    sizes = [Layout(SPEC, rank, WireDtype.FLOAT32).size_bytes for rank in RANKS]
    assert [level["exact"]["slice_bytes"] for level in found["levels"]] == sizes
    assert [round(size / 1e6, 1) for size in sizes] == [9.2, 18.4, 36.7, 55.1, 73.4]
    assert {level["exact"]["base_bytes"] for level in found["levels"]} == {2 * BASE["parameters"]}
    total = found["totals"]
    assert total["exact"]["up_bytes_round"] == 5 * sizes[0] + 3 * sizes[1] + 2 * sizes[2] + sizes[3] + sizes[4]
    assert total["exact"]["up_bytes"] == 50 * total["exact"]["up_bytes_round"]
    assert total["exact"]["down_bytes"] == 51 * total["exact"]["down_bytes_round"]
    assert (total["time"]["seconds"], total["time"]["basis"]) == (None, "estimated")
    assert [p["sites"] for p in found["partitions"]] == [12, 7, 4, 2, 1]
    assert found["warnings"][0].startswith("ranks 49-64: one site alone trains them")


def test_every_row_says_how_sure_it_is_and_fits_80_columns(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(screen: Any) -> None:
        Console(width=80, markup=False, highlight=False, emoji=False).print(screen)

    monkeypatch.setattr("cli.plan.print_screen", narrow)
    assert main(["plan", str(federation), "--sites", "8x5,16x3,32x2,48x1,64x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {" ".join(line.split()) for line in lines}
    assert "upload a round 8.8 MiB 17.5 MiB 35.0 MiB 52.5 MiB 70.0 MiB exact" in rows
    by_word = {word: [line for line in lines if line.rstrip().endswith(word)] for word in ("exact", "estimated")}
    assert any(line.startswith("LoRA parameters") for line in by_word["exact"])
    assert any(line.startswith("activations") for line in by_word["estimated"])
    assert not any("…" in line for line in lines)


def test_probes_are_granted_ranks_by_the_policy_and_say_how_long_a_round_takes(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 90 % of 24 GiB is 21.6 GiB, all levels fit; of 12 GiB 10.8 GiB is left, so rank 16.
    probes = [
        write_probe(tmp_path, "hospital", 24 * GIB, 17 * GIB),
        write_probe(tmp_path, "clinic", 12 * GIB, 10_900 << 20),
    ]
    found = planned(
        capsys, federation, "--probe", *probes, "--site", "hospital=64:9000", "--site", "clinic=64:3000",
        "--set", "rounds.min_clients=2",
    )  # fmt: skip
    sites = {site["name"]: site for site in found["sites"]}
    assert (sites["hospital"]["lora_rank"], sites["clinic"]["lora_rank"]) == (64, 16)
    assert sites["clinic"]["rank_reason"] == (
        "hardware: 16 of 8, 16, 32, 48, 64 is the largest that fits 90 % of 12.0 GiB "
        "(measured 10.6 GiB + 6.0 MiB a rank)"
    )
    low, high = (level["measured"] for level in found["levels"])
    assert (low["memory_bytes"], high["memory_bytes"]) == ((10_900 + 16 * 6) << 20, (17 * 1024 + 64 * 6) << 20)
    # 100 steps of 8; at rank 16 the next larger rank that was measured took a second a step.
    assert (low["training_seconds"], high["training_seconds"]) == (100.0, 100.0)
    assert found["totals"]["time"]["seconds_round"] > 100.0
    assert found["partitions"][-1]["share"] == 0.75


def test_a_site_s_settings_say_how_it_trains_and_options_have_precedence(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"path": "llama", "quantization": "4bit", "gradient_checkpointing": True}
    data = {"train": "a.jsonl", "max_length": 64}
    (tmp_path / "worker.toml").write_text(to_toml({"rank": 8, "batch_size": 2, "model": model, "data": data}))

    def assumed(*options: str | Path) -> list[Any]:
        return list(planned(capsys, federation, "--sites", "8x5", *options)["assumed"].values())[:5]

    assert assumed() == [8, 256, "bfloat16", "none", False]
    assert assumed(*(worker := ["--worker", tmp_path / "worker.toml"])) == [2, 64, "bfloat16", "4bit", True]
    other = "--micro-batch 4 --max-length 32 --dtype float32 --quantization none --no-gradient-checkpointing"
    assert assumed(*worker, *other.split()) == [4, 32, "float32", "none", False]
    assert "there is no such file" in refused(capsys, federation, "--worker", tmp_path / "none.toml")


def test_the_policy_of_the_settings_decides(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycle = write_federation(tmp_path, tmp_path / "spec.json", ranks__policy="cycle", ranks__levels=[8, 32])
    found = planned(capsys, cycle, "--sites", "64x3,16x1")
    assert [site["lora_rank"] for site in found["sites"]] == [8, 32, 8, 16]
    assert found["sites"][3]["rank_reason"] == (
        "cycle: number 4 to join gets 32 of 8, 32, but never above what it declares (16)"
    )


def test_without_a_census_it_says_what_it_assumes(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, federation)
    assert [site["lora_rank"] for site in found["sites"]] == list(RANKS)
    assert found["assumed"]["notes"][0].startswith("No census was given: 5 sites are assumed")


def test_a_spec_of_an_older_version_gives_bytes_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = write_federation(tmp_path, write_spec(tmp_path, base=None))
    (level,) = planned(capsys, federation, "--sites", "8x5")["levels"]
    assert level["exact"]["slice_bytes"] == Layout(SPEC, 8).size_bytes
    assert (level["exact"]["base_bytes"], level["estimated"]["memory_bytes"]) == (None, None)
    assert main(["plan", str(federation), "--sites", "8x5"]) == 0
    assert "The base model's size is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["--sites", "8x5;16x3"], "--sites: '8x5;16x3'; RANKxCOUNT is expected"),
        (["--sites", "0x5"], "--sites: '0x5'; RANKxCOUNT is expected"),
        (["--sites", "8x200000"], "at most 100000 sites can be planned for"),
        (["--site", "clinic"], "--site: 'clinic'; NAME=RANK or NAME=RANK:EXAMPLES is expected"),
        (["--site", "clinic=8:0"], "--site: 'clinic=8:0'; NAME=RANK"),
        (["--site", "a=8", "--site", "a=16"], "--site: a name stands twice"),
        (["--site", "site-1=8", "--sites", "8x2"], "the census has two sites of one name"),
        (["--probe", "nowhere/probe.json"], "nowhere/probe.json; give what `raflora probe` left at a site"),
    ],
)
def test_what_is_wrong_with_a_census_is_said(
    federation: Path, command: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, federation, *command)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --model FOLDER_OR_ID" in refused(capsys, write_federation(tmp_path, None), "--sites", "8x5")
    broken = write_federation(tmp_path, write_spec(tmp_path, base={"layers": "many"}))
    assert "base.layers is 'many'; a whole number is expected" in refused(capsys, broken)
    broken = write_federation(tmp_path, write_spec(tmp_path, base=[1]))
    assert "base is no object; write it anew with `raflora spec`" in refused(capsys, broken)
    federation = write_federation(tmp_path, write_spec(tmp_path))
    newer = write_probe(tmp_path, "newer", 24 * GIB, GIB, schema_version=2)
    assert "schema_version 2, expected 1" in refused(capsys, federation, "--probe", newer)
    full = write_probe(tmp_path, "full", 24 * GIB, GIB, proposal=None)
    assert "found nothing that fits" in refused(capsys, federation, "--probe", full)
    assert "same site's name" in refused(capsys, federation, "--probe", full, full)
    wide = write_federation(tmp_path, tmp_path / "spec.json", adapter__global_rank=2048)
    assert "adapter.global_rank" in refused(capsys, wide)


def test_a_name_from_a_file_steers_no_terminal(tmp_path: Path) -> None:
    console = Console(width=80, record=True, markup=False)
    site = Site("\x1b[31mred", 8, "a\nb", profile=None)  # type: ignore[arg-type]
    console.print(plan_tables._sites_table([site]))
    assert "\x1b[31m" not in console.export_text(styles=False)


# ---------------------------------------------------------------- against the models themselves


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    pytest.importorskip("peft")
    import tiny_models  # noqa: PLC0415
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    # The shape of LLaMA-3.2-3B: a configuration and no weights.
    LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128_256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder / "llama-3.2-3b")
    return {
        "bert": tiny_models.save_bert(folder / "bert", layers=2),
        "vit": tiny_models.save_vit(folder / "vit"),
        "gpt2": folder / "gpt2",
        "llama-3.2-3b": folder / "llama-3.2-3b",
    }


def order_of(task: str, *targets: str, saved: tuple[str, ...] = (), labels: tuple[str, ...] = (), rank: int = 4) -> Any:
    from worker.trainer_protocol import ModelOrder  # noqa: PLC0415

    return ModelOrder(task, labels, targets, saved, lora_rank=rank, seed=1)


MOODS = ("sad", "happy", "neither")
ORDERS: Mapping[str, tuple[Any, ...]] = {
    "bert": ("sequence-classification", ("query", "value"), ("classifier",), MOODS),
    "bert, all linear": ("sequence-classification", ("all-linear",), ("classifier",), MOODS),
    "vit": ("image-classification", ("q_proj", "v_proj"), (), ("left", "right")),
    "gpt2": ("causal-lm", ("c_attn", "c_proj"), (), ()),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_shapes_of_a_configuration_are_those_of_the_loaded_model(folders: Mapping[str, Path], case: str) -> None:
    from worker.config import ModelConfig  # noqa: PLC0415
    from worker.trainer.model import load_model  # noqa: PLC0415
    from worker.trainer.shapes import shapes_of  # noqa: PLC0415

    task, targets, saved, labels = ORDERS[case]
    name = case.partition(",")[0]
    config = ModelConfig(path=str(folders[name]), device="cpu", offline=True)
    order = order_of(task, *targets, saved=saved, labels=labels)
    shapes, loaded = shapes_of(config, order), load_model(config, order)
    assert shapes.spec == loaded.spec
    own = [p for key, p in loaded.base.named_parameters() if "lora_" not in key and "modules_to_save" not in key]
    assert shapes.base["parameters"] == sum(parameter.numel() for parameter in own)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_predicted_of_factors_gradients_and_adam_is_what_torch_holds(folders: Mapping[str, Path]) -> None:
    import torch  # noqa: PLC0415

    from coordinator.footprint import BaseFacts, StepSetting, footprint_of  # noqa: PLC0415
    from worker.config import ModelConfig  # noqa: PLC0415
    from worker.trainer.model import load_model  # noqa: PLC0415

    config = ModelConfig(path=str(folders["bert"]), device="cpu", offline=True)
    order = order_of("sequence-classification", "all-linear", saved=("classifier",), labels=MOODS)
    model = load_model(config, order)
    trained = [parameter for parameter in model.live.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.live(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    footprint = footprint_of(model.spec, 4, BaseFacts(), StepSetting(micro_batch=1, tokens=3))
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert footprint.factors_bytes == size(trained)
    assert footprint.gradient_bytes == size(parameter.grad for parameter in trained)
    assert footprint.adam_bytes == size(moments)


@pytest.mark.torch
def test_a_model_of_three_billion_parameters_is_planned_from_its_configuration(
    folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = write_federation(tmp_path, None, adapter__target_modules=["all-linear"])
    model = ["--model", str(folders["llama-3.2-3b"]), "--offline"]
    found = planned(capsys, federation, *model, "--sites", "8x1,16x1,32x1,48x1,64x2")
    sizes = [level["exact"]["slice_bytes"] / 1e6 for level in found["levels"]]
    assert sizes == pytest.approx([48.6, 97.3, 195, 292, 389], rel=5e-3)
    assert {level["exact"]["base_bytes"] for level in found["levels"]} == {2 * BASE["parameters"]}
    assert found["assumed"]["dtype"] == "bfloat16"


@pytest.mark.torch
def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federation = write_federation(tmp_path, None)
    assert main(["plan", str(federation), "--model", str(tmp_path), "--offline"]) == 1
    shown = capsys.readouterr()
    assert "no config.json that causal-lm can use" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_spec_writes_is_what_plan_and_coordinator_read(
    folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coordinator.manifest import read_spec_file  # noqa: PLC0415

    out = tmp_path / "written.json"
    command = ["spec", str(folders["gpt2"]), "--task", "causal-lm", "--target-modules", "c_attn", "--offline"]
    assert main([*command, "--out", str(out)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    base = json.loads(out.read_text())["base"]
    assert (base["model_type"], base["hidden_size"], base["layers"], base["vocabulary"]) == ("gpt2", 16, 2, 40)
    assert len(read_spec_file(out)[0].modules) == 2
    federation = write_federation(
        tmp_path, out, adapter__target_modules=["c_attn"], adapter__global_rank=8, ranks__levels=[2, 8]
    )
    (level,) = planned(capsys, federation, "--sites", "8x5")["levels"]
    assert level["exact"]["base_bytes"] == 4 * base["parameters"]
    assert level["estimated"]["memory_bytes"] > 0
