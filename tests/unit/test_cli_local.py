"""`raflora local` but for its processes: settings that cannot be run together, and what is told of the last round."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from canned_coordinator import summary
from coordinators import config_of, settings_of, to_toml
from raflora.v1 import status_pb2
from rich.console import Console

from cli.errors import ExitCode
from cli.local import Places, as_json, lacks_evaluations, metrics_table
from cli.local_federation import Story
from cli.local_screen import LocalScreen
from cli.main import main


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        path = tmp_path / "federation.toml"
        path.write_text(to_toml(settings_of(tmp_path / "c", **changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., Path]:
    def write(file: str, name: str, state: str) -> Path:
        path = tmp_path / file
        path.write_text(
            f'name = "{name}"\nrank = 2\nstate_dir = "{tmp_path / state}"\n'
            '[model]\npath = "m"\n[data]\ntrain = "t.csv"\ntest = "t.csv"\n',
            encoding="utf-8",
        )
        return path

    return write


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["local", *map(str, words)]) == ExitCode.USAGE
    return capsys.readouterr().err


def test_two_workers_of_one_name_or_one_folder_are_refused(
    federation: Callable[..., Path], worker: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = worker("a.toml", "ada", "a")
    assert "b.toml: has the name or the state_dir of" in complaint(
        capsys, federation(), one, worker("b.toml", "ada", "b")
    )
    assert "b.toml: has the name or the state_dir of" in complaint(
        capsys, federation(), one, worker("b.toml", "bob", "a")
    )
    assert "a name is needed" in complaint(capsys, federation(), worker("b.toml", "", "b"))


def test_too_few_workers_are_refused_before_anything_starts(
    federation: Callable[..., Path], worker: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = complaint(capsys, federation(), worker("a.toml", "ada", "a"))
    assert "1 workers that train, but rounds.min_clients is 3" in said
    assert not (tmp_path / "c" / "state").exists()


def test_a_federation_with_certificates_is_told_to_leave_them_out(
    federation: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = federation()
    path.write_text(path.read_text() + f'\n[server.identity]\nfolder = "{tmp_path}/authority"\n')
    assert "take [server.identity] out" in complaint(capsys, path)


def test_without_workers_it_says_what_to_give(
    federation: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give a worker.toml for each site" in complaint(capsys, federation())


def test_a_setting_of_the_federation_can_be_overridden(
    federation: Callable[..., Path], worker: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, federation(), worker("a.toml", "ada", "a"), "--set", "rounds.min_clients=7")
    assert "1 workers that train, but rounds.min_clients is 7" in said


def told() -> status_pb2.RoundSummary:
    found = summary(3)
    del found.evaluations[:]
    for name, rank in (("bob", 8), ("ada", 2)):
        metrics = {"accuracy_norm": 0.5, "eval_loss": 1.25, "token_accuracy": rank / 10}
        found.evaluations.add(client_id=name, lora_rank=rank, num_examples=40, metrics=metrics)
    return found


def test_metrics_are_written_as_on_every_screen() -> None:
    shown = StringIO()
    Console(file=shown, width=80).print(metrics_table(told()))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert lines == [
        "site rank examples accuracy_norm eval_loss token_accuracy",
        "ada 2 40 50.0 % 1.250 20.0 %",
        "bob 8 40 50.0 % 1.250 80.0 %",
    ]


def test_a_script_gets_the_last_round_s_metrics_and_energies() -> None:
    story = Story("raflora", rounds=[summary(2), told()], total_seconds=12.34)
    found = json.loads(json.dumps(as_json("moods", story, Places(Path("logs"), Path("made"))), allow_nan=False))
    assert (found["federation"], found["rounds"], found["last_round"], found["seconds"]) == ("moods", 2, 3, 12.3)
    assert [(site["site"], site["rank"]) for site in found["sites"]] == [("ada", 2), ("bob", 8)]
    assert found["sites"][0]["metrics"]["eval_loss"] == 1.25
    assert sum(partition["energy_share"] for partition in found["energies"]) == pytest.approx(1.0)
    assert (found["logs"], found["adapter"]) == ("logs", "made")


def test_a_federation_that_was_over_already_has_no_round_to_tell() -> None:
    found = as_json("moods", Story("raflora"), Places(Path("logs"), None))
    assert (found["rounds"], found["sites"], found["energies"], found["adapter"]) == (0, [], [], None)


def test_a_metric_that_is_no_number_is_null() -> None:
    story = Story("raflora", rounds=[told()])
    story.rounds[0].evaluations[0].metrics["eval_loss"] = float("nan")
    sites = {site["site"]: site["metrics"] for site in as_json("moods", story, Places(Path("logs"), None))["sites"]}
    assert (sites["bob"]["eval_loss"], sites["ada"]["eval_loss"]) == (None, 1.25)


@pytest.mark.parametrize(
    ("every", "rounds", "evaluated", "lacks"),
    [
        (1, [1, 2, 3], [], True),
        (1, [1, 2, 3], [1], False),
        (2, [1], [], False),  # none was due yet
        (2, [1, 2], [], True),
        (5, [1, 2, 3], [], True),  # the last round always is
        (0, [1, 2, 3], [], False),
    ],
)
def test_it_is_said_if_evaluations_were_due_and_none_succeeded(
    every: int, rounds: list[int], evaluated: list[int], lacks: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, rounds__num_rounds=3, rounds__evaluate_every=every)
    story = Story("raflora", rounds=[status_pb2.RoundSummary(round=number) for number in rounds])
    for one in story.rounds:
        if one.round in evaluated:
            one.evaluations.add(client_id="ada")
    assert lacks_evaluations(config, story) is lacks


def test_a_task_that_failed_is_shown_with_the_log_that_says_more(tmp_path: Path) -> None:
    shown = StringIO()
    screen = LocalScreen(Console(file=shown, width=200), tmp_path / "logs")
    screen.failed(status_pb2.AssignmentStatus(client_id="ada", last_failure="wrong_method: set evaluation.match"))
    assert (
        f"ada could not do its task: wrong_method: set evaluation.match ({tmp_path}/logs/ada.log)" in shown.getvalue()
    )
