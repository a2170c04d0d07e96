"""What `raflora simulate` shows while it runs, and how it finds an experiment."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from simulated_rows import a_run, an_experiment, key, run_row

from cli.experiments import Wanted, built_in_names, check_files, choose, jobs_for, number_of_runs, rough_seconds
from cli.main import main
from cli.simulation_screen import SimulationScreen
from cli.simulation_tables import findings_screen, outcome_json, outcome_screen
from common.errors import ConfigError
from simulation.experiment import ExperimentConfig
from simulation.results import Results
from simulation.run import Progress
from simulation.runner import Outcome
from simulation.schedule import first_plans

SETTINGS = """
name = "tiny"
[model]
path = "digits"
task = "image-classification"
[data]
train = "digits"
test = "digits"
[clients]
count = 4
ranks = [4, 8, 16]
per_round = 2
[rounds]
num_rounds = 3
[training]
learning_rate = 0.005
[[arms]]
name = "raflora"
[[arms]]
name = "flexlora"
method = "flexlora"
"""


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return str(path)


def printed(*renderables: object, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    for each in renderables:
        console.print(each)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_built_in_experiment_can_be_read() -> None:
    assert {"digits", "rank-collapse", "methods"} <= set(built_in_names())
    for name in built_in_names():
        config = choose(name).config
        assert config.name == name
        assert config.description
        assert rough_seconds(config) > 0


def test_the_command_line_narrows_an_experiment(settings: str, tmp_path: Path) -> None:
    wanted = Wanted((7,), ("flexlora",), tmp_path, ("rounds.num_rounds=5",))
    chosen = choose(settings, wanted)
    assert chosen.config.seeds == (7,)
    assert [arm.name for arm in chosen.config.arms] == ["flexlora"]
    assert chosen.config.rounds.num_rounds == 5
    assert chosen.config.data.folder == tmp_path
    assert chosen.folder == tmp_path
    assert number_of_runs(chosen.config) == 1


def test_the_environment_overrides_an_experiment(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFLORA__ROUNDS__NUM_ROUNDS", "9")
    assert choose(settings).config.rounds.num_rounds == 9


def test_an_unknown_experiment_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"nothing: there is no such file, .*digits.*rank-collapse"):
        choose("nothing")


def test_an_unknown_arm_is_told_which_there_are(settings: str) -> None:
    with pytest.raises(ConfigError, match="--arms flora: the arms of tiny are raflora, flexlora"):
        choose(settings, Wanted(arms=("flora",)))


@pytest.mark.parametrize("setting", ["clients.nothing", "nothing.alpha", "clients.count"])
def test_an_arm_with_an_impossible_setting_is_a_sentence(settings: str, tmp_path: Path, setting: str) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(SETTINGS + f'set = {{"{setting}" = -1}}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=setting.partition(".")[0]):
        choose(str(broken))


def test_a_machine_without_a_gpu_gets_the_variant_unless_the_command_line_decides(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_text(f'without_gpu = {{"rounds.num_rounds" = 2, "clients.count" = 3}}\n{SETTINGS}', encoding="utf-8")
    assert choose(str(path)).config.rounds.num_rounds == 3
    assert choose(str(path)).on_cpu.config.rounds.num_rounds == 2
    decided = choose(str(path), Wanted(overrides=("rounds.num_rounds=7",))).on_cpu.config
    assert (decided.rounds.num_rounds, decided.clients.count) == (7, 3)


def test_the_list_shows_names_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--list"]) == 0
    out = capsys.readouterr().out
    assert "rank-collapse" in out
    assert "min" in out


@pytest.mark.parametrize("arguments", [["simulate", "--list"], ["simulate", "--help"], ["compare", "--help"]])
def test_help_and_list_load_neither_torch_nor_matplotlib(arguments: list[str]) -> None:
    code = (
        "import sys; from cli.main import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'sqlalchemy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate"], "name an experiment"),
        (["simulate", "nothing"], "there is no such file"),
        (["compare"], "name a results folder"),
        (["compare", "digits", "--baseline", "nobody"], "--baseline nobody: the arms of digits are raflora"),
        (["compare", "a", "b", "--out", "c.html"], "2 are named"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_a_terminal_every_finished_run_is_a_line(settings: str) -> None:
    plans = first_plans(choose(settings, Wanted((0,))).config)
    console = Console(file=io.StringIO(), width=100)
    with SimulationScreen(console) as screen:
        screen.planned(plans, already=0)
        screen.preparing(0, 0)
        screen.preparing(50, 100)
        screen.started(plans[0])
        screen.moved(plans[0], Progress(1, 3, 0, 2, math.nan))
        screen.finished(plans[0], run_row(plans[0].key), 0.5)
        screen.started(plans[1])
        screen.failed(plans[1], "no\x1b such data")
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "2 runs",
        "... preparing model and data",
        "... encoding texts, 50 of 100",
        "[1/2] raflora, seed 0: accuracy 50.0 %, 3 rounds in 2.0 s",
        "flexlora, seed 0: failed: no\N{REPLACEMENT CHARACTER} such data",
    ]


def test_on_a_terminal_a_running_run_shows_how_far_it_is(settings: str) -> None:
    plans = first_plans(choose(settings, Wanted((0,))).config)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with SimulationScreen(console) as screen:
        screen.planned(plans, already=0)
        screen.started(plans[0])
        screen.moved(plans[0], Progress(2, 3, 1, 2, 0.25))
    assert "round 2/3" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "accuracy 25.0 %" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_outcome_is_a_table_and_the_same_as_json(settings: str) -> None:
    experiment: ExperimentConfig = choose(settings).config
    outcome = Outcome(an_experiment(), (), ())
    shown = printed(outcome_screen(experiment, outcome), findings_screen(experiment, outcome))
    assert "86.8 ± 0.4 (3)" in shown
    assert "+8.3 ± 0.8 (3)" in shown
    assert "! Above raflora: flora (+0.5 points)." in shown
    found = outcome_json(experiment, outcome)
    (stage,) = found["stages"]
    (group,) = stage["groups"]
    assert group["baseline"] == "flexlora"
    assert stage["arms"][0]["accuracy"]["mean"] == pytest.approx(0.868)
    assert found["missing"] == []


def test_at_80_columns_names_and_numbers_stay_whole() -> None:
    experiment = choose("when-not").config
    results = Results()
    for seed in range(3):
        for arm in experiment.arms:
            results += a_run(key(arm.name, seed), 0.123, method=arm.method)
    lines = printed(outcome_screen(experiment, Outcome(results, (), ())), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    for arm in experiment.arms:
        (row,) = [line for line in lines if line.startswith(f"{arm.name}  ")]
        assert "12.3 ± 0.0 (3)" in row
        assert row.rstrip().endswith(" 3")
    assert any(line.startswith("no room for: effective rank") for line in lines)
    # Arms of one setting stand together, under it.
    assert "Arms with training.batch_size = 2" in lines


def test_a_wide_terminal_shows_everything(settings: str) -> None:
    shown = printed(outcome_screen(choose(settings).config, Outcome(an_experiment(), (), ())), width=200)
    assert "no room for" not in shown
    assert "KiB" in shown


def test_only_tuning_rows_are_no_comparison_yet(settings: str) -> None:
    experiment = choose(settings).config
    outcome = Outcome(a_run(key("raflora", stage="tuning"), 0.5), (), ())
    assert "Only tuning runs are finished" in printed(outcome_screen(experiment, outcome))
    assert not printed(findings_screen(experiment, outcome)).strip()
    assert outcome_json(experiment, outcome)["stages"] == []


def test_a_screen_shows_a_dozen_findings_at_most() -> None:
    experiment = choose("methods").config
    results = Results()
    for seed in range(3):
        for index, arm in enumerate(experiment.arms):
            reached = 0.5 + index / 100 + seed * (index % 3) / 200
            results += a_run(key(arm.name, seed), reached, method=arm.method)
    lines = printed(findings_screen(experiment, Outcome(results, (), ())), width=10_000).splitlines()
    assert len(lines) <= 2 + 12 + 1
    assert "more on the page" in lines[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": "[0, 0]"}, "seeds: 0 is named twice"),
        ({"tuning.learning_rates": "[0.1]", "tuning.seeds": "[1]"}, "seed 1 is both in seeds and in tuning.seeds"),
        ({"tuning.learning_rates": "[0.1, 0.1]"}, r"tuning\.learning_rates: 0\.1 is named twice"),
        ({"tuning.learning_rates": "[0.1]", "data.validation": "0.0"}, r"set data\.validation above 0"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once(settings: str, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(settings, Wanted(overrides=tuple(f"{name}={value}" for name, value in changes.items())))


@pytest.mark.parametrize("line", ['method = "nothing"', "kappa = 2.0"])
def test_an_arm_whose_method_cannot_be_made_is_refused_at_once(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(f'{SETTINGS}[[arms]]\nname = "third"\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="arm 'third': "):
        choose(str(path))


def test_data_that_is_not_there_is_said_before_anything_runs(settings: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data .*nowhere: there is no such folder"):
        choose(settings, Wanted(data=tmp_path / "nowhere"))
    chosen = choose("rank-collapse", Wanted(data=tmp_path))
    with pytest.raises(ConfigError, match=r"train\.jsonl.* name the folder with --data"):
        check_files(chosen)


def test_the_environment_wins_over_the_variant_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.toml"
    path.write_text(f'without_gpu = {{"rounds.num_rounds" = 2}}\n{SETTINGS}', encoding="utf-8")
    monkeypatch.setenv("RAFLORA__ROUNDS__NUM_ROUNDS", "9")
    assert choose(str(path)).on_cpu.config.rounds.num_rounds == 9


def test_one_process_a_core_and_none_without_a_run(settings: str) -> None:
    cores = len(os.sched_getaffinity(0))
    assert jobs_for(choose("methods").config) == cores
    assert jobs_for(choose(settings, Wanted((0,), ("raflora",))).config) == 1


def test_a_results_folder_takes_no_options_of_a_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for option in (["--jobs", "2"], ["--data", str(tmp_path)], ["--cache", "x"], ["--results", "y"], ["--seeds", "1"]):
        assert main(["compare", str(tmp_path), *option]) == 2
        assert "are for what is to be simulated" in capsys.readouterr().err


def test_json_says_null_for_what_was_not_measured(settings: str) -> None:
    experiment = choose(settings).config
    results = an_experiment()
    outcome = Outcome(type(results)(runs=(run_row(key("raflora")),)), (), ())
    (stage,) = outcome_json(experiment, outcome)["stages"]
    assert stage["arms"][0]["accuracy"] == {"mean": None, "sd": None, "n": 0}
    assert "flexlora, seed 2" in outcome_json(experiment, outcome)["missing"]
