"""`raflora local` before anything is started: settings that cannot be run together on one machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
from coordinators import settings_of, to_toml

from cli.errors import ExitCode
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
