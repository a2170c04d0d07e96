"""`raflora demo`: real processes, real gRPC, and what becomes of them when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from canned_coordinator import client, finished, summary, training
from raflora.v1 import status_pb2
from rich.console import Console

from benchmarks import collapse_picture
from cli.demo import Wishes, run_demo
from cli.demo_results import Check
from cli.demo_setting import MARKER, Setting, Site, prepare, write_settings
from cli.errors import Failed
from cli.local_federation import run_federation
from cli.local_processes import output_of
from cli.local_screen import LocalScreen
from cli.main import main

# Everything here writes scikit-learn's digits or starts a trainer.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

SECONDS = 120


def screen_into(file: StringIO, *, terminal: bool = False) -> LocalScreen:
    return LocalScreen(
        Console(file=file, width=120, height=60, force_terminal=terminal, markup=False, highlight=False, emoji=False)
    )


def one_site(folder: Path) -> Setting:
    return Setting(folder, rounds=1, seed=0, sites=(Site("site-a", 2),))


def processes_that_name(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has just ended
        if any(text in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.mark.slow
async def test_two_federations_end_with_a_folder_that_peft_loads(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "demo", rounds=2, seed=0, sites=(Site("site-a", 2), Site("site-b", 4)))
    shown = StringIO()
    with screen_into(shown) as screen:
        check = await run_demo(setting, Wishes(), screen)
    assert check.agrees
    results = json.loads(setting.results.read_text(encoding="utf-8"))
    assert [federation["method"] for federation in results["federations"]] == ["raflora", "flexlora"]
    for federation in results["federations"]:
        assert [(each["round"], each["updates"]) for each in federation["rounds"]] == [(1, 2), (2, 2)]
        for each in federation["rounds"]:
            assert sum(partition["energy_share"] for partition in each["partitions"]) == pytest.approx(1.0)
            assert set(each["accuracies"]) == {"site-a", "site-b"}
    assert {path.name for path in setting.adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    text = shown.getvalue()
    for sentence in ("site-b joined: rank 4", "round 2/2  2/2 workers", "under a rank-agnostic average", "OK"):
        assert sentence in text
    assert not list(setting.folder.glob("*/*-state"))
    assert not processes_that_name(str(tmp_path))
    collapse_picture.main([str(setting.results), str(tmp_path / "energy.svg")])
    assert "ranks 1-2" in (tmp_path / "energy.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kinds", "status"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 1), ([signal.SIGINT, signal.SIGINT], 130)],
    ids=["ctrl-c", "sigterm", "impatient ctrl-c"],
)
def test_a_demo_that_is_told_to_end_takes_its_processes_along(
    tmp_path: Path, kinds: list[signal.Signals], status: int
) -> None:
    command = [sys.executable, "-m", "cli.main", "demo", "--out", str(tmp_path / "demo")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while "still loading" not in (line := process.stdout.readline()):
            assert line, process.communicate(timeout=SECONDS)
        assert len(processes_that_name(f"{tmp_path}/demo/")) == 6
        for kind in kinds:
            process.send_signal(kind)
        _, complaint = process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert "Traceback" not in complaint
    assert not processes_that_name(str(tmp_path))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("site-a", "worker site-a ended with exit code 2"),
        ("coordinator", "the coordinator ended with exit code 2 before it listened"),
    ],
)
async def test_a_process_that_fails_ends_the_demo_with_its_last_words(
    tmp_path: Path, broken: str, sentence: str
) -> None:
    setting = one_site(tmp_path / "demo")
    prepare(setting)
    files = write_settings(setting, "raflora")
    with (files.folder / f"{broken}.toml").open("a", encoding="utf-8") as settings:
        settings.write('\nno_such_key = "x"\n')
    with screen_into(StringIO()) as screen, pytest.raises(Failed) as caught:
        await run_federation("raflora", files, screen)
    first, *last_words = str(caught.value).splitlines()
    assert first == f"{sentence}; the end of its log ({files.folder / broken}.log):"
    assert any("no_such_key" in line for line in last_words)
    assert not processes_that_name(str(tmp_path))


async def test_a_check_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"^the check took longer than 0\.5 s; the end of its log"):
        await output_of(
            "the check",
            "-c",
            "import time; time.sleep(600)",
            log=tmp_path / "check.log",
            seconds=0.5,
        )


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds files of something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_folder_of_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    setting = one_site(tmp_path / "demo")
    prepare(setting)
    (setting.folder / "results.json").write_text("{}", encoding="utf-8")
    prepare(setting)
    assert {path.name for path in setting.folder.iterdir()} == {MARKER, "base-model", "data"}


def test_two_methods_get_the_same_settings(tmp_path: Path) -> None:
    setting = one_site(tmp_path / "demo")
    prepare(setting)
    ours, rivals = (write_settings(setting, method) for method in ("raflora", "flexlora"))
    for path in (ours.coordinator, ours.workers["site-a"]):
        rival = (rivals.folder / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8").replace("raflora", "flexlora") == rival


@pytest.mark.parametrize(("loaded", "agrees"), [(0.887, True), (0.887 + 1e-7, True), (0.887 + 1 / 300, False)])
def test_one_example_named_otherwise_is_a_mismatch(loaded: float, agrees: bool) -> None:
    check = Check(
        reported_accuracy=0.887, loaded_accuracy=loaded, base_accuracy=0.1, num_examples=300, load=("base", "model")
    )
    assert check.agrees is agrees


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"exact_match": 0.25, "eval_loss": 2.5}, "exact match 25.0 % loss 2.500"),
        ({"accuracy": 0.25, "eval_loss": 2.5}, "accuracy 25.0 %"),
        ({"eval_loss": 2.5, "token_accuracy": 0.5}, "loss 2.500"),
        ({}, ""),
    ],
)
def test_a_round_tells_what_was_measured(metrics: dict[str, float], told: str) -> None:
    shown = StringIO()
    with screen_into(shown) as screen:
        screen.round_ended(status_pb2.RoundSummary(round=1, federated_metrics=metrics), finished())
    line = " ".join(shown.getvalue().splitlines()[0].split())
    assert line == f"round 1/20 0/2 workers {told} up 0 B down 0 B 0.0 s".replace("  ", " ")


def test_an_evaluator_is_no_worker_that_is_missing_and_its_scores_have_a_line() -> None:
    shown = StringIO()
    with screen_into(shown) as screen:
        screen.joined(status_pb2.ClientSummary(client_id="judge", evaluates_only=True))
        screen.round_ended(status_pb2.RoundSummary(round=1, central_metrics={"accuracy": 0.75}), finished())
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert "round 1/20 0/1 worker" in lines[1]
    assert lines[2] == "central accuracy 75.0 %"


def test_without_a_terminal_every_round_is_two_lines() -> None:
    shown = StringIO()
    with screen_into(shown) as screen:
        screen.waiting("2 of 2 workers are still loading")
        screen.waiting("1 of 2 workers are still loading")
        screen.joined(client("ada", 2))
        screen.moves(training())
        late = training().assignments[1]
        late.last_failure = "trainer_died: signal SIGKILL"
        screen.failed(late)
        screen.round_ended(summary(3), finished())
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert lines == [
        "... 2 of 2 workers are still loading",
        "ada joined: rank 2, 312 examples, adapter 1.5 KiB, cpu",
        "bob could not do its task: trainer_died: signal SIGKILL",
        "round 3/20 0/2 workers accuracy 50.0 % up 1.5 KiB down 3.0 MiB 13.0 s",
        "energy in ranks 1-2 ███████ 90% 3-4 █ 10%",
    ]


def test_a_terminal_shows_the_open_round_and_the_newest_energies() -> None:
    shown = StringIO()
    with screen_into(shown, terminal=True) as screen:
        screen.round_ended(summary(1), training())
        screen.moves(training())
    text = shown.getvalue()
    assert "round 2/20" in text
    assert "1 of 2 workers done" in text
    assert "90.0 %" in text
