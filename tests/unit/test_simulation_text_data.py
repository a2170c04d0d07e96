"""An experiment's rows: found in the right folder, labelled as a worker labels, the same part every time."""

import json
from pathlib import Path
from typing import Any

import pytest
from experiments import LABELS, TEST, TRAIN, experiment_of, write_rows, write_texts

from common.errors import ConfigError
from common.settings import DATA_VARIABLE
from simulation.digits import digits_task
from simulation.text_data import Corpus, DataPlace, read_test, read_train
from worker.trainer.data import DataError

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


def train_of(folder: Path, clients: Any = None, /, **data: Any) -> Corpus:
    experiment = experiment_of(data=data, clients=clients or {})
    return read_train(DataPlace(experiment.data, folder), experiment.clients, offline=True)


def test_rows_have_numbers_of_classes_whether_the_file_has_names_or_numbers(tmp_path: Path) -> None:
    write_texts(tmp_path)
    train = train_of(tmp_path)
    test = read_test(DataPlace(experiment_of().data, tmp_path), offline=True)
    assert train.class_names == test.class_names == LABELS
    assert train.texts("text") == [text for text, _ in TRAIN]
    assert train.labels.tolist() == [LABELS.index(label) for _, label in TRAIN]
    assert test.labels.tolist() == [LABELS.index(label) for _, label in TEST]
    assert train.groups is None
    assert len(test) == len(TEST)


def test_the_labels_may_stand_in_the_experiment(tmp_path: Path) -> None:
    write_texts(tmp_path)
    assert train_of(tmp_path, labels_file=None, labels=LABELS).labels.tolist() == train_of(tmp_path).labels.tolist()


def test_a_part_is_the_same_every_time_and_in_the_file_s_order(tmp_path: Path) -> None:
    write_texts(tmp_path)
    part = train_of(tmp_path, max_train=5)
    texts = [text for text, _ in TRAIN]
    positions = [texts.index(text) for text in part.texts("text")]
    assert positions == sorted(set(positions))
    assert len(positions) == 5
    assert positions != [0, 1, 2, 3, 4]
    assert train_of(tmp_path, max_train=5).texts("text") == part.texts("text")
    assert len(train_of(tmp_path, max_train=100)) == len(TRAIN)


def test_csv_is_read_too(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "train.csv").write_text("intent,said\nvery,the film\n0,good\n")
    corpus = train_of(tmp_path, train="train.csv", text_column="said", label_column="intent")
    assert (corpus.texts("said"), corpus.labels.tolist()) == (["the film", "good"], [2, 0])


def test_the_experiment_s_data_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("own", "film"), ("environment", "book")):
        write_texts(tmp_path / name)
        write_rows(tmp_path / name / "train.jsonl", [{"text": text, "label": 0}])
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "environment"))
    assert train_of(tmp_path, folder="own").texts("text") == ["film"]
    assert train_of(tmp_path).texts("text") == ["book"]


def test_what_the_environment_s_folder_lacks_may_lie_beside_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "elsewhere"))
    assert len(train_of(tmp_path)) == len(TRAIN)


def test_a_missing_file_names_the_setting_and_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "environment"))
    with pytest.raises(ConfigError) as refused:
        train_of(tmp_path, train="nowhere.jsonl")
    for part in ("data.train 'nowhere.jsonl'", "data.folder (not set)", DATA_VARIABLE, "environment", str(tmp_path)):
        assert part in str(refused.value)
    with pytest.raises(ConfigError, match=r"data\.labels_file 'gone\.json'.*data\.folder \(here\)"):
        train_of(tmp_path, folder="here", labels_file="gone.json")


@pytest.mark.parametrize("content", ["{", "{}", '["one"]', '["one", 2]'])
def test_a_labels_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    write_texts(tmp_path)
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.labels_file: .*(no JSON list|is not JSON)"):
        train_of(tmp_path)


def test_a_file_without_records_and_labels_of_nobody_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"data\.train: .* holds no records"):
        train_of(tmp_path, train="empty.jsonl")
    write_rows(tmp_path / "odd.jsonl", [{"text": "film", "label": "odd"}])
    with pytest.raises(DataError, match="'odd', which is none of the federation's 3 labels"):
        train_of(tmp_path, train="odd.jsonl")
    write_rows(tmp_path / "number.jsonl", [{"text": 7, "label": 0}])
    with pytest.raises(ConfigError, match="line 1: column 'text' holds 7; a text is expected"):
        train_of(tmp_path, train="number.jsonl").texts("text")


def test_groups_are_a_column(tmp_path: Path) -> None:
    write_texts(tmp_path)
    rows = [{"text": "film", "label": 0, "site": 3}, {"text": "book", "label": 1, "site": "north"}]
    write_rows(tmp_path / "train.jsonl", rows)
    natural = {"partition": "natural", "group_column": "site"}
    assert train_of(tmp_path, natural).groups == ("3", "north")
    assert train_of(tmp_path).groups is None
    with pytest.raises(DataError, match="column 'town' does not exist"):
        train_of(tmp_path, {**natural, "group_column": "town"})


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_groups_are_read_whoever_of_two_arms_comes_first(tmp_path: Path, partition: str) -> None:
    write_texts(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"text": "film", "label": 0, "site": 3}])
    assert train_of(tmp_path, {"partition": partition, "group_column": "site"}).groups == ("3",)
    (tmp_path / "groups.json").write_text(json.dumps({"art": ["good_film"]}))
    assert train_of(tmp_path, {"partition": partition, "groups_file": "groups.json"}).groups == ("art",)


def test_groups_are_a_file_of_labels(tmp_path: Path) -> None:
    write_texts(tmp_path)
    natural = {"partition": "natural", "groups_file": "groups.json"}
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"art": ["good_film", "bad_book"], "words": ["very"], "nothing": []}))
    words = {"very"}
    assert train_of(tmp_path, natural).groups == tuple("words" if label in words else "art" for _, label in TRAIN)
    path.write_text(json.dumps({"art": ["good_film", "bad_book"]}))
    with pytest.raises(ConfigError, match=r"no group holds the labels \['very'\]"):
        train_of(tmp_path, natural)
    path.write_text(json.dumps({"art": ["very"], "words": ["very"]}))
    with pytest.raises(ConfigError, match="the label 'very' in 'art' and 'words'"):
        train_of(tmp_path, natural)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object of group names"):
        train_of(tmp_path, natural)


def test_digits_come_from_the_demo() -> None:
    pytest.importorskip("sklearn")
    data = {"train": "digits", "test": "digits", "labels_file": None}
    train = train_of(Path(), **data, max_train=7)
    test = read_test(DataPlace(experiment_of(data=data).data, Path()), offline=True)
    assert (len(train), len(test)) == (7, len(digits_task().test.labels))
    assert test.labels.tolist() == digits_task().test.labels.tolist()
    assert test.rows[3]["image"] == digits_task().test.images[3].tolist()
    with pytest.raises(ConfigError, match="both or none"):
        train_of(Path(), **{**data, "test": "test.jsonl"})
