"""`raflora simulate` and `raflora compare` from the command line to the page, with a real model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from cli.main import main
from simulation.results import read_results

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = """
name = "tiny"
seeds = [0]
[model]
path = "digits"
task = "image-classification"
[data]
train = "digits"
test = "digits"
max_train = 200
max_test = 50
validation = 0.2
[clients]
count = 3
alpha = 10.0
ranks = [2, 4]
per_round = 2
[rounds]
num_rounds = 2
[training]
learning_rate = 4e-3
local_steps = 1
batch_size = 8
[tuning]
learning_rates = [4e-3]
[[arms]]
name = "raflora"
[[arms]]
name = "too many clients"
method = "flexlora"
set = { "clients.count" = 150 }
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


def test_an_experiment_from_its_file_to_its_page(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    arguments = ["simulate", str(settings), "--out", str(out), "--cache", str(tmp_path / "cache")]
    # One arm cannot divide the data so: it is named, and the other's runs are all there.
    assert main([*arguments, "--format", "json"]) == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert {failure["run"] for failure in told["failures"]} == {
        "too many clients, seed 0",
        "too many clients, seed 100, rate 0.004 linear (tuning)",
    }
    assert "too many clients, seed 0: failed: " in printed.err
    results = read_results(out)
    assert {run.key.stage for run in results.runs} == {"same", "tuning", "best"}
    # "best" equals "same": it is shown twice and was run once.
    assert not (out / "runs" / "best").exists()
    same, best = results.of_stage("same"), results.of_stage("best")
    assert [row.accuracy for row in same.accuracy] == [row.accuracy for row in best.accuracy]
    assert {row.split for row in same.accuracy} == {"test"}
    # Comparing tries what failed anew, shows the rest, and ends as a failure.
    again = ["compare", str(settings), "--results", str(out), "--cache", str(tmp_path / "cache")]
    assert main(again) == 1
    assert "2 runs failed" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    # The same command again runs nothing of what is finished.
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/raflora*/finished")}
    assert main([*arguments, "--arms", "raflora"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/raflora*/finished")} == before
    shown = capsys.readouterr().out
    assert "2 runs, 2 of them finished before" in shown
    assert "will hold this selection alone" in shown

    assert main(["compare", str(out)]) == 0
    shown = capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    reached = f"{100 * same.accuracy[-1].accuracy:.1f} (1)"
    assert reached in shown
    assert reached in page
    assert {path.name for path in (out / "pictures").glob("same-*.png")} >= {"same-accuracy.png", "same-norm.png"}


def test_results_of_other_settings_are_not_mixed(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(settings), "--out", str(tmp_path / "out"), "--arms", "raflora"]
    assert main([*arguments, "--set", "tuning.learning_rates=[]"]) == 0
    assert main([*arguments, "--set", "tuning.learning_rates=[]", "--set", "training.batch_size=4"]) == 2
    assert "training.batch_size was 8, now it is 4" in capsys.readouterr().err


def test_data_that_is_not_there_is_a_sentence(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(settings), "--out", str(tmp_path / "out"), "--set", "data.train=nowhere.jsonl"]
    assert main([*arguments, "--set", 'data.labels=["a", "b"]']) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _players_of(pid: int) -> list[int]:
    """The processes that play runs; multiprocessing has one more of its own, which ends after its parent."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["simulate", str(settings), "--out", str(out), "--arms", "raflora", "--set", "rounds.num_rounds=100000"]
    code = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        journal = out / "runs" / "same" / "raflora_0.004_linear_0" / "journal.sqlite"
        deadline = time.monotonic() + 200
        while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        children = _players_of(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=60)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert process.returncode == 130, complaint
    assert "the same command again goes on from there" in printed
    assert "Traceback" not in complaint
