"""Local data: every way to write it, every way to get it wrong, and a split that is always the same."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tiny_models import MOODS, SIDES, save_bert, save_vit, side_images
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from worker.config import DataConfig
from worker.trainer.data import (
    ClassName,
    DataError,
    Example,
    LocalData,
    Prepared,
    Row,
    load_data,
    read_rows,
)
from worker.trainer.task import Preparation
from worker.trainer.tasks import ImageClassification, LabelColumn, SequenceClassification

TEXTS = [{"text": "good film", "label": "happy"}, {"text": "bad book", "label": "sad"}] * 10


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_it_is(row: Row) -> Example:
    return dict(row.values)


class OneByOne:
    """A preparation of one function."""

    def __init__(self, prepare: Callable[[Row], Example]) -> None:
        self._prepare = prepare

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:  # noqa: ARG002
        return Prepared([self._prepare(row) for row in rows], len(rows))


def load(prepare: Callable[[Row], Example] = as_it_is, seed: int = 0, **config: Any) -> LocalData:
    return load_data(DataConfig(**config), OneByOne(prepare), seed=seed, offline=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Preparation]:
    folder = save_bert(tmp_path_factory.mktemp("bert"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return lambda **config: SequenceClassification().prepare(folder, model, MOODS, DataConfig(train="-", **config))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    folder = save_vit(tmp_path_factory.mktemp("vit"))
    model = AutoModelForImageClassification.from_pretrained(folder)
    return ImageClassification().prepare(folder, model, SIDES, DataConfig(train="-"))


# --- files


@pytest.mark.parametrize(
    ("write", "name"), [(write_jsonl, "a.jsonl"), (write_csv, "a.csv"), (write_parquet, "a.parquet")]
)
def test_the_three_kinds_of_files_hold_the_same_records(tmp_path: Path, write: Any, name: str) -> None:
    rows = list(read_rows(write(tmp_path / name, TEXTS)))
    assert [row.values for row in rows] == TEXTS
    assert rows[0].where.startswith(str(tmp_path / name))


def test_a_part_is_held_out_and_the_same_one_each_time(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ({"n": n} for n in range(50))))
    data = load(train=path, holdout=0.2)
    assert (len(data.train), len(data.test)) == (40, 10)
    assert {row["n"] for row in (*data.train, *data.test)} == set(range(50))
    assert load(train=path, holdout=0.2) == data
    assert load(train=path, holdout=0.2, seed=1) != data


def test_a_test_file_leaves_the_training_file_whole(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ({"n": n} for n in range(5)))
    test = write_jsonl(tmp_path / "test.jsonl", ({"n": n} for n in range(3)))
    data = load(train=str(train), test=str(test))
    assert (len(data.train), len(data.test)) == (5, 3)


def test_max_examples_takes_a_sample_and_not_the_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ({"n": n} for n in range(1000)))
    data = load(train=str(path), test=str(path), max_examples=10)
    assert len(data.train) == 10
    assert max(row["n"] for row in data.train) > 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"n": 1}\n{"n": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl, line 1: an object with columns as keys is expected"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.csv", "text,label\ngood,1\nbad\n", "a.csv, line 3: not as many cells"),
        ("a.csv", "text,label\ngood,1,2\n", "a.csv, line 2: not as many cells"),
        ("a.csv", 'text,label\n"good,1\n', "a.csv, line 2: not CSV"),
        ("a.csv", "text,label\n", "holds no records"),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.xlsx", "", "a file that ends in .jsonl, .csv, .parquet is expected"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(train=str(tmp_path / name))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read: No such file"):
        load(train=str(tmp_path / "no.jsonl"))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8"):
        load(train=str(tmp_path / "a.csv"))


def test_one_record_is_too_few_to_hold_some_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to hold out 10%"):
        load(train=str(write_jsonl(tmp_path / "a.jsonl", [{"n": 1}])))


# --- labels


def label(value: Any, labels: tuple[str, ...] = MOODS) -> int:
    return LabelColumn("label", labels).number(Row("a.csv, line 7", Path(), {"label": value}))


@pytest.mark.parametrize("value", ["happy", " happy ", 1, "1", 1.0, np.int64(1)])
def test_a_label_is_a_name_or_a_number(value: Any) -> None:
    assert label(value) == 1


@pytest.mark.parametrize("value", ["1", 1, 1.0, np.int64(1), "1.0"])
def test_a_name_wins_over_a_number_however_a_file_spells_it(value: Any) -> None:
    assert label(value, labels=("1", "2", "3")) == 0


def test_a_data_sets_own_name_is_never_a_number() -> None:
    assert label(ClassName("happy")) == 1
    with pytest.raises(DataError, match="holds '1', which is none of"):
        label(ClassName("1"))


@pytest.mark.parametrize("value", ["angry", 3, -1, 1.5, "1.5", True, [1], {"a": 1}, "nan", float("inf")])
def test_a_bad_label_names_file_line_column_and_value(value: Any) -> None:
    with pytest.raises(
        DataError, match=r"a.csv, line 7: column 'label' holds .* none of the federation's 3 labels \(sad"
    ):
        label(value)


def test_a_csv_with_a_bad_label_names_the_row(tmp_path: Path, texts: Callable[..., Preparation]) -> None:
    path = write_csv(tmp_path / "train.csv", [*TEXTS, {"text": "a film", "label": "angry"}])
    with pytest.raises(DataError, match=r"train.csv, line 22: column 'label' holds 'angry'"):
        load(texts().example, train=str(path), test=str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "good", "label": 0}, "column 'text' does not exist; there are body, label"),
        ({"text": None, "label": 0}, "column 'text' is empty"),
        ({"text": 7, "label": 0}, "column 'text' holds 7; a text is expected"),
    ],
)
def test_a_bad_text_says_what_is_wrong(texts: Callable[..., Preparation], row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"here: {message}"):
        texts().example(Row("here", Path(), row))


# --- examples


def test_texts_become_tokens_of_at_most_the_models_length(texts: Callable[..., Preparation]) -> None:
    example = texts(max_length=8).example(Row("here", Path(), {"text": "very " * 30, "label": 2}))
    assert (len(example["input_ids"]), example["labels"]) == (8, 2)


def test_a_pair_of_texts_is_one_example(texts: Callable[..., Preparation]) -> None:
    row = Row("here", Path(), {"text": "good film", "reply": "bad book", "label": 0})
    assert len(texts(text_pair_column="reply").example(row)["input_ids"]) == 4


def test_a_batch_of_texts_is_padded(texts: Callable[..., Preparation]) -> None:
    preparation = texts()
    rows = [Row("here", Path(), {"text": text, "label": 0}) for text in ("good", "very good film")]
    assert preparation.collator([preparation.example(row) for row in rows])["input_ids"].shape == (2, 3)


def png(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 51, np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        np.full((8, 8), 51).tolist(),
        np.full((8, 8), 51.0).tolist(),
        png("L"),
        png("RGB"),
        {"bytes": png("L"), "path": None},
        {"bytes": None, "path": "grey.png"},
        "grey.png",
    ],
)
def test_an_image_is_the_same_however_it_is_written(tmp_path: Path, images: Preparation, value: Any) -> None:
    (tmp_path / "grey.png").write_bytes(png("L"))
    pixels = images.example(Row("here", tmp_path, {"image": value, "label": "left"}))["pixel_values"]
    assert pixels.shape == (1, 8, 8)
    assert pixels.unique().tolist() == pytest.approx([51 / 255 * 2 - 1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"GIF89a", "no PNG or JPEG"),
        (png("L")[:40], "no PNG or JPEG"),
        ("missing.png", "cannot be read: No such file"),
        ([[0, 256]], "whole numbers from 0 to 255"),
        ([[0.5, 0.25]], "whole numbers from 0 to 255"),
        ([[float("nan")]], "whole numbers from 0 to 255"),
        ([[1, 2], [3]], "rows of grey values are expected"),
        ([1, 2, 3], "rows of grey values are expected"),
        (7, "rows of grey values are expected"),
    ],
)
def test_a_bad_image_says_where_and_why(tmp_path: Path, images: Preparation, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 3: column 'image' .*{message}"):
        images.example(Row("a.jsonl, line 3", tmp_path, {"image": value, "label": 0}))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(images: Preparation) -> None:
    levels = np.linspace(0, 65_535, 64).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16)).save(buffer, "PNG")
    pixels = images.example(Row("here", Path(), {"image": buffer.getvalue(), "label": 0}))["pixel_values"][0]
    np.testing.assert_allclose(pixels.numpy(), levels / 65_535 * 2 - 1, atol=1 / 127)


def test_an_image_is_turned_as_its_camera_says(images: Preparation) -> None:
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8)
    turned, exif, buffer = Image.fromarray(np.rot90(upright)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it upright
    turned.save(buffer, "PNG", exif=exif)
    found, expected = (
        images.example(Row("here", Path(), {"image": image, "label": 0}))["pixel_values"]
        for image in (buffer.getvalue(), upright.tolist())
    )
    assert (found == expected).all()


def test_images_of_a_parquet_file_are_read_as_data_sets_write_them(tmp_path: Path, images: Preparation) -> None:
    rows = [{"image": {"bytes": png("L"), "path": "x.png"}, "label": n % 2} for n in range(4)]
    data = load(images.example, train=str(write_parquet(tmp_path / "a.parquet", rows)))
    assert len(data.train) == 3
    assert data.train[0]["pixel_values"].shape == (1, 8, 8)


def test_rows_of_grey_values_survive_a_jsonl_file(tmp_path: Path, images: Preparation) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", side_images(6))
    data = load(images.example, train=str(path), test=str(path))
    assert [example["labels"] for example in data.train] == [0, 1, 0, 1, 0, 1]


# --- data sets


def test_a_data_set_is_read_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Preparation
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SIDES))})
    rows = {"image": [{"bytes": png("L"), "path": None}] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    data = load(images.example, train=str(folder))
    assert sorted(example["labels"] for example in (*data.train, *data.test)) == [0, 0, 1, 1]


def save_moods(folder: Path, names: list[str], numbers: list[int]) -> Path:
    """A data set of texts as `datasets` writes it: numbers, and names in an order of its own."""
    folder.mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"a {names[number]} film" for number in numbers], "label": numbers}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def happy_as(row: Row) -> Example:
    return {"text": row["text"], "labels": LabelColumn("label", MOODS).number(row)}


@pytest.mark.parametrize("source", ["", "train.parquet"], ids=["through datasets", "the file alone"])
def test_a_data_sets_numbers_mean_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = save_moods(tmp_path / "set", ["happy", "neither", "sad"], [0, 1, 2] * 4)
    data = load(happy_as, train=str(folder / source))
    for example in (*data.train, *data.test):
        assert MOODS[example["labels"]] in example["text"]


@pytest.mark.parametrize("source", ["", "train.parquet"], ids=["through datasets", "the file alone"])
def test_a_data_set_with_other_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = save_moods(tmp_path / "set", ["cheerful", "gloomy"], [0, 1] * 4)
    with pytest.raises(DataError, match="holds 'cheerful', which is none of the federation's 3 labels"):
        load(happy_as, train=str(folder / source))


def test_a_data_set_that_is_nowhere_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: neither a file that ends in .* nor a data set"):
        load(train="nobody/nothing")


# ---------------------------------------------------------------- images that are prepared when they are needed


def test_a_label_or_a_header_that_is_wrong_is_found_before_any_training(images: Preparation, tmp_path: Path) -> None:
    good = {"image": np.zeros((8, 8)).tolist(), "label": 0}
    for bad in ({**good, "label": "up"}, {**good, "image": "missing.png"}, {**good, "image": "broken.png"}):
        (tmp_path / "broken.png").write_bytes(b"no image")
        path = write_jsonl(tmp_path / "a.jsonl", [good, bad])
        with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
            load_data(DataConfig(train=str(path), test=str(path)), images, seed=0, offline=True)


def test_an_image_that_is_broken_behind_its_header_is_told_when_it_is_needed(
    images: Preparation, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8)).astype(np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-30])
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "cut.png", "label": 0}] * 2)
    data = load_data(DataConfig(train=str(path), test=str(path)), images, seed=0, offline=True)
    with pytest.raises(DataError, match=r"line 1: column 'image' is no PNG or JPEG that can be decoded"):
        _ = data.train[0]


def test_an_empty_text_in_a_csv_is_refused_by_file_line_and_column(
    texts: Callable[..., Preparation], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood film,happy\n ,sad\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: column 'text' is empty; fill it or remove the record"):
        load_data(DataConfig(train=str(path), test=str(path)), texts(), seed=0, offline=True)
