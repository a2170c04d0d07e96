"""A run's folder: whose it is, when it counts as finished, and what damage is answered with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from numpy_site import CONTENTS, NumpyWork, material_on, run_plan

from common.errors import ConfigError, CorruptStore, StateInUse
from coordinator.manifest import Manifest
from simulation.contents import CONTENTS_FILE, Contents, claim_contents, digest_of_examples
from simulation.federation import Setup, found
from simulation.population import make_population
from simulation.results import FILE_NAMES, Results, read_results
from simulation.run import coordinator_config, play_on
from simulation.run_store import FINISHED_FILE, SETTINGS_FILE, RunStore

PLAN = run_plan()


def played(folder: Path, work: NumpyWork | None = None) -> Results:
    play_on(PLAN, material_on(work or NumpyWork()), folder)
    return read_results(folder)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("name", FILE_NAMES.values())
@pytest.mark.parametrize("damage", [Path.unlink, cut_in_half, cut_a_line])
def test_rows_that_are_not_whole_are_brought_back_by_the_journal(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    before = played(tmp_path)
    damage(tmp_path / name)
    work = NumpyWork()
    assert played(tmp_path, work) == before
    assert work.trained == [], "nothing is trained again"


def test_a_mark_that_is_damaged_counts_for_nothing(tmp_path: Path) -> None:
    before = played(tmp_path)
    (tmp_path / FINISHED_FILE).write_bytes(b"")
    assert played(tmp_path) == before
    assert (tmp_path / FINISHED_FILE).read_bytes() != b""


def test_two_processes_cannot_play_one_run(tmp_path: Path) -> None:
    with RunStore(tmp_path, "points", {"one": 1}):
        with pytest.raises(StateInUse, match=f"{tmp_path}: another process plays this run"):
            RunStore(tmp_path, "points", {"one": 1})
        with pytest.raises(StateInUse):
            RunStore(tmp_path, "points", {"one": 2})
    with RunStore(tmp_path, "points", {"one": 1}):
        pass


def test_a_refused_folder_is_not_held(tmp_path: Path) -> None:
    with RunStore(tmp_path, "points", {"one": 1}):
        pass
    with pytest.raises(ConfigError, match="one was 1, now it is 2"):
        RunStore(tmp_path, "points", {"one": 2})
    with RunStore(tmp_path, "points", {"one": 1}):
        pass


def lose_the_adapter(folder: Path) -> None:
    for blob in (folder / "blobs").glob("??/*"):
        blob.unlink()


def spoil_the_adapter(folder: Path) -> None:
    for blob in (folder / "blobs").glob("??/*"):
        blob.write_bytes(b"something else")


def spoil_the_journal(folder: Path) -> None:
    (folder / "journal.sqlite").write_bytes(b"no database at all, but long enough to look at" * 100)


@pytest.mark.parametrize("damage", [lose_the_adapter, spoil_the_adapter, spoil_the_journal])
def test_damage_is_answered_with_what_to_do(damage: Callable[[Path], None], tmp_path: Path) -> None:
    played(tmp_path)
    (tmp_path / FINISHED_FILE).unlink()
    damage(tmp_path)
    with pytest.raises(CorruptStore, match=f"delete {tmp_path} and run again"):
        played(tmp_path)


def test_what_is_committed_before_anything_was_read_is_found_again(tmp_path: Path) -> None:
    work = NumpyWork()
    population = make_population(work.train_labels, None, PLAN.experiment.clients, validation=0.2, seed=3)
    manifest = Manifest.of(coordinator_config(PLAN, material_on(work), population), work.spec, work.base_model_digest)
    founded = found(Setup(manifest, population, work))
    with RunStore(tmp_path, manifest.federation, {}) as store:
        store.commit(founded)
    with RunStore(tmp_path, manifest.federation, {}) as store:
        standing = store.standing(manifest)
    assert standing is not None
    assert standing.state == founded.standing.state


# ------------------------------------------------------------ what it was computed with


@pytest.mark.parametrize("name", ["train_examples", "test_examples", "base_model"])
def test_a_run_on_other_data_under_the_same_settings_is_refused(name: str, tmp_path: Path) -> None:
    played(tmp_path)
    settings = json.loads((tmp_path / SETTINGS_FILE).read_bytes())
    settings["population"][name] = "0dd5" * 16
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"population\.{name} was .*; name another folder for the results"):
        played(tmp_path)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("train_examples", "data.train"), ("test_examples", "data.test"), ("base_model", "model.path")],
)
def test_a_results_folder_keeps_to_its_contents(name: str, setting: str, tmp_path: Path) -> None:
    file = tmp_path / CONTENTS_FILE
    claim_contents(file, CONTENTS)
    claim_contents(file, CONTENTS)
    other = Contents(**{**CONTENTS.__dict__, name: "0dd5" * 16})
    with pytest.raises(ConfigError, match=f"{setting}: not what earlier runs .* name another folder"):
        claim_contents(file, other)
    file.write_text("[7]")
    with pytest.raises(ConfigError, match="not what raflora wrote"):
        claim_contents(file, CONTENTS)


def test_every_value_of_every_example_counts() -> None:
    examples = [{"text": "a good film", "label": 1}, {"tokens": [1, 2, 3], "label": 0}]
    others = [
        [{"text": "a good filn", "label": 1}, examples[1]],
        [{"text": "a good film", "label": 2}, examples[1]],
        [examples[0], {"tokens": [1, 23], "label": 0}],
        [examples[1], examples[0]],
        examples[:1],
    ]
    digests = {digest_of_examples(each) for each in [examples, *others]}
    assert len(digests) == 1 + len(others)
    assert digest_of_examples(examples) == digest_of_examples([dict(each) for each in examples])
