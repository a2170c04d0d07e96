"""Settings: which source wins, and what a mistake is answered with."""

from pathlib import Path

import pytest
from pydantic import Field, model_validator

from common.errors import ConfigError
from common.settings import Section, environment_with, load_settings


class Rounds(Section):
    quorum: int = Field(default=2, ge=1)
    deadline_seconds: float = Field(default=600.0, gt=0)


class Toy(Section):
    name: str
    paused: bool = False
    ranks: tuple[int, ...] = ()
    rounds: Rounds = Rounds()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "federation.toml"
    file.write_text('name = "from file"\n[rounds]\nquorum = 3\ndeadline_seconds = 60\n')
    return file


def load(file: Path | None, *overrides: str, **environ: str) -> Toy:
    return load_settings(Toy, file, overrides=overrides, environ=environ)


def test_the_file_fills_in_what_it_says_and_defaults_the_rest(file: Path) -> None:
    assert load(file) == Toy(name="from file", rounds=Rounds(quorum=3, deadline_seconds=60.0))


def test_the_environment_beats_the_file_and_set_beats_both(file: Path) -> None:
    environ = {"RAFLORA__ROUNDS__QUORUM": "4", "RAFLORA__ROUNDS__DEADLINE_SECONDS": "7", "OTHER__NAME": "x"}
    found = load(file, "rounds.quorum=5", **environ)
    assert found == Toy(name="from file", rounds=Rounds(quorum=5, deadline_seconds=7.0))


def test_no_file_is_needed() -> None:
    assert load(None, "name=lab").name == "lab"
    assert load(None, RAFLORA__NAME="lab").name == "lab"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("paused=true", "paused", True),
        ("ranks=[2, 4, 8]", "ranks", (2, 4, 8)),
        ("name=two words", "name", "two words"),
        ('name="3"', "name", "3"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("name=#1", "name", "#1"),
        ("rounds={quorum = 9}", "rounds", Rounds(quorum=9)),
        ("rounds.deadline_seconds=1e3", "rounds", Rounds(quorum=3, deadline_seconds=1000.0)),
    ],
)
def test_set_reads_toml_values_and_takes_the_rest_as_text(file: Path, override: str, key: str, value: object) -> None:
    assert getattr(load(file, override), key) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('name = "a"\nquorum = 3', "quorum: there is no such key; known: "),
        ('name = "a"\n[rounds]\nqorum = 3', "rounds.qorum: there is no such key; did you mean quorum?"),
        ("", "name: is required and not given"),
        ("name = 3", "name: Input should be a valid string, found 3"),
        ('name = "a"\n[rounds]\nquorum = 0', "rounds.quorum: Input should be greater than or equal to 1, found 0"),
        ('name = "a"\n[rounds]\ndeadline_seconds = nan', "rounds.deadline_seconds: "),
        ('name = "a"\nranks = [2, "x"]', "ranks.1: .*found 'x'"),
        ("name = ", "not valid TOML"),
        ('name = "a"\nname = "b"', "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_answered_with_file_key_and_expectation(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"^{file}: {message}"):
        load(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds.quorum=many", "--set rounds.quorum: rounds.quorum: .*found 'many'"),
        ("rounds.qorum=3", "--set rounds.qorum: rounds.qorum: there is no such key; did you mean quorum?"),
        ("ranks=[2, true, 'x']", "--set ranks: ranks.2: .*found 'x'"),
        ("rounds={quorum = 0}", "--set rounds: rounds.quorum: "),
        ("name.first=ada", "--set name.first: name is a value, not a section"),
        ("quorum", "--set quorum: expected KEY=VALUE"),
        ("=3", "--set : "),
    ],
)
def test_a_mistake_in_set_is_answered_with_set(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(file, override)


def test_a_mistake_in_the_environment_is_answered_with_the_variable(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment variable RAFLORA__ROUNDS__QUORUM: rounds\.quorum: .*'two'"):
        load(file, RAFLORA__ROUNDS__QUORUM="two")


def test_every_mistake_is_listed_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, "rounds.quorum=0", "colour=red")
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.toml: there is no such file"):
        load(tmp_path / "none.toml")


def test_a_folder_and_a_picture_are_no_settings_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "photo.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "photo.toml")


def test_settings_cannot_be_changed_afterwards(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(file).rounds.quorum = 1


class _Pair(Section):
    least: int = 1
    most: int = 2

    @model_validator(mode="after")
    def _in_order(self) -> "_Pair":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        return self


def test_a_mistake_across_two_keys_names_them_and_does_not_print_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "pair.toml"
    path.write_text("least = 3\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(_Pair, path, environ={})
    assert str(caught.value) == f"{path}: least 3 is above most 2"


def test_what_we_start_is_told_none_of_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFLORA__COORDINATOR__JOIN_TOKEN", "secret")
    monkeypatch.setenv("RAFLORA__STORE__JOURNAL", "postgresql://user:secret@db/raflora")
    monkeypatch.setenv("RAFLORA_IDENTITY", "/secret")
    monkeypatch.setenv("HF_HOME", "/models")
    environment = environment_with(OMP_NUM_THREADS="1")
    assert "secret" not in " ".join(environment.values())
    assert (environment["HF_HOME"], environment["OMP_NUM_THREADS"]) == ("/models", "1")
