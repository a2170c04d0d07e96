"""`raflora evaluate`: a tiny model with a PEFT folder through the real lm-eval, on tasks of a folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from origins import ORIGIN
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_ORDER, random_adapter, tiny_llama

from cli.export_origin import RECORD_FILE, write_origin
from cli.main import main
from common.adapter import Adapter, initial_adapter
from worker.config import ModelConfig
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder
from worker.trainer.generation import Prompted, log_likelihoods
from worker.trainer.merge import MergeOrder, merge
from worker.trainer.model import AdaptedModel, load_model, write_adapter
from worker.trainer.task import tokenizer_in

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

SCALING = 0.5
ROWS = [{"question": f"Ada has {n} apples.", "answer": f" {n + 1} books", "choices": ["a", "b"]} for n in range(6)]
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
_LIKELIHOOD = """
output_type: loglikelihood
doc_to_target: "{{answer}}"
metric_list:
  - {metric: perplexity, aggregation: mean, higher_is_better: true}
"""
_GENERATION = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
# Several commands in one process of their own: lm-eval and torch are loaded once.
_DRIVER = """
import contextlib, io, json, sys
from cli.export_origin import RECORD_FILE, write_origin
from cli.main import main
told = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    told.append([code, out.getvalue(), err.getvalue()])
sys.__stdout__.write(json.dumps(told))
"""


@dataclass(frozen=True)
class Site:
    folder: Path
    model: AdaptedModel
    adapter: Adapter

    def command(
        self, *more: str, folder: str = "adapter", tasks: str = "tiny_likelihood", device: str = "cpu"
    ) -> list[str]:
        own = str(self.folder / "tasks")
        fixed = ["--include-path", own, "--device", device, "--offline", "--dtype", "float32"]
        return ["evaluate", str(self.folder / folder), "--tasks", tasks, *fixed, *more]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_llama(folder / "base")
    model = load_model(ModelConfig(path=str(folder / "base"), device="cpu", offline=True), LLAMA_ORDER)
    adapter = random_adapter(model.spec, 4)
    write_peft_folder(
        folder / "adapter", adapter, scaling=SCALING, base_model="tiny", task="causal-lm", modules_to_save=[]
    )
    base = ModelConfig(path=str(folder / "base"), device="cpu", offline=True)
    write_origin(
        folder / "adapter",
        replace(ORIGIN, base_model=base.path, base_model_digest=model.base_model_digest, task="causal-lm"),
    )
    (folder / "merged").mkdir()
    merge(MergeOrder(base, folder / "adapter", model.base_model_digest, "causal-lm", (), ()), folder / "merged")
    other_weights(folder / "base", folder / "other")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    for name, rest in (("tiny_likelihood", _LIKELIHOOD), ("tiny_generation", _GENERATION)):
        text = _TASK.format(name=name, file=folder / "rows.jsonl") + rest
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    far_away = _TASK.format(name="far_away", file="test.jsonl").replace("dataset_path: json", "dataset_path: a/b")
    (folder / "tasks" / "far_away.yaml").write_text(far_away + _GENERATION)
    return Site(folder, model, adapter)


def other_weights(base: Path, into: Path) -> None:
    """A model of the same shape, which PEFT would put the adapter on without a word."""
    shutil.copytree(base, into)
    weights = load_file(into / "model.safetensors")
    save_file({name: torch.flip(one, [0]) for name, one in weights.items()}, into / "model.safetensors")


@pytest.fixture(scope="module")
def told(site: Site) -> dict[str, tuple[int, str, str]]:
    """Exit code, standard output and standard error of each command."""
    commands = {
        "json": site.command(
            *("--model", str(site.folder / "base"), "--format", "json", "--limit", "4"),
            *("--out", str(site.folder / "made" / "scores.json")),
            tasks="tiny_likelihood,tiny_generation",
        ),
        "table": site.command("--batch-size", "3"),
        "merged": site.command("--format", "json", folder="merged"),
        "other": site.command("--model", str(site.folder / "other")),
        "device": site.command(device="cuda:7"),
        "download": site.command(tasks="far_away"),
    }
    return dict(zip(commands, run(site, *commands.values()), strict=True))


def run(site: Site, *commands: list[str]) -> list[tuple[int, str, str]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(site.folder / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def likelihood_of(site: Site, adapter: Adapter, count: int) -> float:
    """What the worker's own model finds of the same answers, in the mean."""
    write_adapter(site.model, adapter, scaling=SCALING)
    tokenizer = tokenizer_in(site.folder / "base")
    given = []
    for row in ROWS[:count]:
        prompt = tokenizer(row["question"])["input_ids"]
        whole = tokenizer(f"{row['question']}{row['answer']}")["input_ids"]
        given.append(Prompted(prompt, whole[len(prompt) :]))
    found = log_likelihoods(site.model, given, batch=2, report=lambda *_: None)
    return sum(found) / count


def test_the_scores_are_those_of_the_base_model_with_the_adapter(
    site: Site, told: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = told["json"]
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert report == json.loads((site.folder / "made" / "scores.json").read_text())
    likelihood, generation = report["scores"]
    assert (likelihood["task"], likelihood["metric"], likelihood["num_examples"]) == (
        "tiny_likelihood",
        "perplexity",
        4,
    )
    expected = likelihood_of(site, site.adapter, 4)
    assert likelihood["value"] == pytest.approx(expected, rel=1e-3)
    without = likelihood_of(site, initial_adapter(site.model.spec, 4, seed=1), 4)
    assert abs(without - expected) > 0.1, "without the adapter it would be another figure"
    assert (generation["metric"], generation["filter"], generation["num_fewshot"]) == ("exact_match", "none", 0)
    assert 0.0 <= generation["value"] <= 1.0
    assert (report["limit"], report["base_model"]) == (4, str(site.folder / "base"))
    assert report["base_model_digest"] == site.model.base_model_digest


def test_another_model_of_the_same_shape_is_refused(site: Site, told: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = told["other"]
    assert (code, out) == (2, "")
    assert f"--model {site.folder / 'other'}: its weights have the digest" in err
    assert f"was trained on {site.model.base_model_digest}; name that very model" in err


def test_a_merged_model_needs_no_base(site: Site, told: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = told["merged"]
    assert code == 0, err
    report = json.loads(out)
    assert report["base_model"] is None
    assert report["scores"][0]["value"] == pytest.approx(likelihood_of(site, site.adapter, 6), rel=1e-3)


def test_people_get_a_table_and_the_records_base_model(site: Site, told: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = told["table"]
    assert code == 0, err
    line = next(line for line in out.splitlines() if "tiny_likelihood" in line)
    value, few_shot, examples = (line.split("│")[number].strip() for number in (4, 6, 7))
    assert float(value) == pytest.approx(likelihood_of(site, site.adapter, 6), rel=1e-3)
    assert (few_shot, examples) == ("0", "6")


def test_a_device_that_is_not_there_is_refused(told: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = told["device"]
    assert code == 2
    assert "--device cuda:7: torch sees 0 GPU(s) here" in err


@pytest.mark.slow  # lm-eval reads the descriptions of all its tasks
def test_a_mistyped_task_names_what_is_close(site: Site) -> None:
    ((code, out, err),) = run(site, site.command(tasks="tiny_likelihod"))
    assert (code, out) == (2, "")
    assert "--tasks tiny_likelihod: lm-eval knows no such task; close to it: tiny_likelihood" in err


def test_a_task_that_needs_a_download_says_so_offline(told: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = told["download"]
    assert code == 1
    assert "--tasks far_away: with --offline its data set must be on this machine: run once without it" in err


def test_a_folder_that_is_no_adapter_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    command = ["evaluate", str(tmp_path), "--model", "base", "--tasks", "gsm8k"]
    assert main(command) == 2
    assert f"{tmp_path}: neither an adapter ({WEIGHTS_FILE} missing) nor a merged model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({"base_model": "/far/away"}, (), "was trained on '/far/away', which is neither a folder here nor a hub id"),
        ({"task": "image-classification"}, (), "its task is 'image-classification', and lm-eval evaluates language"),
        (None, (), f"has no {RECORD_FILE} that names the base model; give --model BASE"),
        ({"merged": True}, ("--model", "base"), "leave --model and --revision out"),
    ],
)
def test_a_record_that_does_not_lead_to_a_base_model_is_told(
    changes: dict[str, Any] | None,
    flags: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {"task": "causal-lm", **(changes or {})}
    names = ["config.json"] if fields.pop("merged", False) else [CONFIG_FILE, WEIGHTS_FILE]
    for name in names:
        (tmp_path / name).touch()
    if changes is not None:
        write_origin(tmp_path, replace(ORIGIN, **fields))
    assert main(["evaluate", str(tmp_path), "--tasks", "gsm8k", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("cli.evaluate.find_spec", lambda name: None if name == "lm_eval" else found(name))
    assert main(site.command()) == 1
    told = capsys.readouterr()
    assert told.err == '`raflora evaluate` needs lm-eval; install it with: pip install "raflora[evaluation]"\n'
    assert told.out == ""


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--tasks", ","], "--tasks: name at least one task of lm-eval, such as gsm8k"),
        (["--tasks", "gsm8k", "--include-path", "nowhere"], "--include-path nowhere: is no folder"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit"),
    ],
)
def test_a_wrong_command_line_says_what_is_expected(
    more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "adapter", "--model", "base", *more]) == 2
    assert sentence in capsys.readouterr().err
