"""The examples as a newcomer runs them: the tiny variants end to end, and their adapters in stock PEFT."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SITES = 5


def run(*command: str, cwd: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto"))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=350, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def federate(folder: Path, example: str, *options: str) -> str:
    """What `raflora local` printed, after exactly the command that the preparation tells."""
    told = run(str(EXAMPLES / example / "prepare.py"), "fed", "--tiny", *options, cwd=folder)
    command = next(line for line in told.splitlines() if line.strip().startswith("raflora local")).split()
    words = [str(p) for word in command[1:] for p in (sorted(folder.glob(word)) if "*" in word else [word])]
    return run("-m", "cli.main", *words, cwd=folder)


def loss_of(logs: Path, event: str, key: str) -> list[float]:
    lines = (line for log in sorted(logs.glob("site-1.log")) for line in log.read_text().splitlines())
    return [
        float(found[1]) for line in lines if f"] {event} " in line and (found := re.search(rf"{key}=([\d.]+)", line))
    ]


def test_gsm8k_with_a_tiny_llama(tmp_path: Path) -> None:
    screen = federate(tmp_path, "gsm8k-llama")
    assert len(re.findall(r"^round \d/3  5/5 workers  exact match", screen, re.MULTILINE)) == 3
    losses = loss_of(tmp_path / "fed" / "logs", "evaluated", "eval_loss")
    assert len(losses) == 3
    # The base has read no answer: for an even guess among its tokens the loss would be ln 512.
    assert losses[-1] < losses[0] < math.log(512)
    assert losses[-1] < losses[0] - 0.1
    assert answers_of(tmp_path / "fed")


def answers_of(folder: Path) -> bool:
    """Whether stock transformers and PEFT load model and adapter, and the adapter changes what the model says."""
    import torch  # noqa: PLC0415
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    record = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    asked = tokenizer(f"Question: {record['question']}\nAnswer: ", return_tensors="pt").input_ids
    answer = tokenizer(record["answer"], return_tensors="pt").input_ids
    both = torch.cat([asked, answer], dim=1)
    wanted = both.clone()
    wanted[:, : asked.shape[1]] = -100
    with torch.no_grad():
        before = model(input_ids=both, labels=wanted).loss
        after = PeftModel.from_pretrained(model, folder / "adapter")(input_ids=both, labels=wanted).loss
    return bool(after < before - 1.0)


def test_cifar100_with_a_tiny_vit(tmp_path: Path) -> None:
    screen = federate(tmp_path, "vit-cifar100")
    accuracies = [float(found) for found in re.findall(r"accuracy ([\d.]+) %", screen)]
    assert len(accuracies) >= 5  # it may stop early: patience 4
    assert accuracies[-1] > 40  # of ten classes that are about as frequent
    names = json.loads((tmp_path / "fed" / "adapter" / "adapter_config.json").read_text())
    assert names["modules_to_save"] == ["classifier"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_edge_service_is_a_unit_that_systemd_understands(tmp_path: Path) -> None:
    text = (EXAMPLES / "edge" / "raflora-worker.service").read_text(encoding="utf-8")
    # Neither the program nor its user is on this machine.
    here = (
        text.replace("/opt/raflora/bin/raflora", sys.executable)
        .replace("User=raflora\n", "")
        .replace("Group=raflora\n", "")
    )
    unit = tmp_path / "raflora-worker.service"
    unit.write_text(here, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "/etc/raflora/worker.toml" in text
