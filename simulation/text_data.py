"""An experiment's examples: rows with labels, and the group of each where clients are divided by groups.

Read as a worker reads its site's data, through worker.trainer.data; nothing here is tokenized, and nothing is divided
among clients. The parts that are taken of large files are the same for every seed of an experiment.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.settings import DATA_VARIABLE, data_folder
from simulation import digits
from simulation.experiment import ClientsSection, DataSection
from worker.trainer.data import FILE_KINDS, Row, read_rows, read_source
from worker.trainer.tasks import LabelColumn

DIGITS = "digits"
_PART_SEED = 77  # of the one choice of max_train and max_test


@dataclass(frozen=True)
class Corpus:
    """The rows of a file, or the part of them that is used."""

    rows: tuple[Row, ...]
    labels: NDArray[np.int64]  # [rows], the classes' numbers
    groups: tuple[str, ...] | None  # of each row, for clients that are divided by groups
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, column: str) -> list[str]:
        """A column of texts. Raises ConfigError for the first that is none."""
        return [_text_in(row, column) for row in self.rows]


@dataclass(frozen=True)
class DataPlace:
    """Where an experiment's files may lie."""

    data: DataSection
    experiment_folder: Path

    def find(self, name: Path, setting: str) -> Path:
        """The file of that name. Raises ConfigError that tells where it was looked for."""
        name = name.expanduser()
        own, environment = self.data.folder, data_folder()
        if own is not None:
            candidates = [self.experiment_folder / own.expanduser()]
        else:
            candidates = [folder for folder in (environment, self.experiment_folder) if folder is not None]
        for folder in candidates:
            if (folder / name).is_file():
                return folder / name
        raise ConfigError(
            f"{setting} {str(name)!r}: there is no such file. A relative path begins in data.folder "
            f"({own or 'not set'}), or else in the folder that the environment's {DATA_VARIABLE} names "
            f"({environment or 'not set'}), or else in the experiment's own folder ({self.experiment_folder})"
        )


def read_train(place: DataPlace, clients: ClientsSection, *, offline: bool) -> Corpus:
    """What is divided among the clients. Raises ConfigError or DataError."""
    rows, names = _rows_and_names(place, place.data.train, "train", offline)
    corpus = _corpus(_part(rows, place.data.max_train), names, place.data.label_column)
    return Corpus(corpus.rows, corpus.labels, _groups(corpus, place, clients), names)


def read_test(place: DataPlace, *, offline: bool) -> Corpus:
    """What is evaluated on. Raises ConfigError or DataError."""
    rows, names = _rows_and_names(place, place.data.test, "test", offline)
    return _corpus(_part(rows, place.data.max_test), names, place.data.label_column)


def _rows_and_names(place: DataPlace, source: str, part: str, offline: bool) -> tuple[Sequence[Row], tuple[str, ...]]:
    """All rows of the training ("train") or test data ("test"), and the classes' names."""
    data = place.data
    if (data.train == DIGITS) != (data.test == DIGITS):
        raise ConfigError(f"data.train {data.train!r} and data.test {data.test!r}: {DIGITS!r} is both or none of them")
    if source == DIGITS:
        task = digits.digits_task()
        return _digit_rows(task.sites if part == "train" else task.test, data), digits.LABELS
    names = _class_names(place)
    if Path(source).suffix in FILE_KINDS:
        path = place.find(Path(source), f"data.{part}")
        rows = list(read_rows(path))
        if not rows:
            raise ConfigError(f"data.{part}: {path} holds no records")
        return rows, names
    return read_source(source, None, part, offline=offline), names


def _digit_rows(found: digits.Digits, data: DataSection) -> list[Row]:
    pairs = zip(found.images.tolist(), found.labels.tolist(), strict=True)
    return [
        Row(f"{DIGITS}, row {number}", Path(), {data.image_column: image, data.label_column: label})
        for number, (image, label) in enumerate(pairs, start=1)
    ]


def _class_names(place: DataPlace) -> tuple[str, ...]:
    if place.data.labels_file is None:
        return place.data.labels
    path = place.find(place.data.labels_file, "data.labels_file")
    names = _json_in(path, "data.labels_file")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"data.labels_file: {path} holds no JSON list of at least two names")
    return tuple(names)


def _json_in(path: Path, setting: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {path} is not JSON: {error}") from None


def _part(rows: Sequence[Row], most: int) -> tuple[Row, ...]:
    if not most or len(rows) <= most:
        return tuple(rows)
    chosen = np.random.Generator(np.random.PCG64(_PART_SEED)).permutation(len(rows))[:most]
    return tuple(rows[number] for number in np.sort(chosen))


def _corpus(rows: tuple[Row, ...], names: tuple[str, ...], label_column: str) -> Corpus:
    column = LabelColumn(label_column, names)
    labels = np.asarray([column.number(row) for row in rows], dtype=np.int64)
    return Corpus(rows, labels, None, names)


def _groups(corpus: Corpus, place: DataPlace, clients: ClientsSection) -> tuple[str, ...] | None:
    """The group of each row, if the settings name any: also for an arm that divides its clients otherwise.

    Arms that differ only in how they divide the same data share what is read here.
    """
    if clients.groups_file is None:
        if not clients.group_column:
            return None
        return tuple(str(row[clients.group_column]) for row in corpus.rows)
    group_of = _group_of_label(place.find(clients.groups_file, "clients.groups_file"))
    groupless = sorted({corpus.class_names[label] for label in corpus.labels} - group_of.keys())
    if groupless:
        raise ConfigError(f"clients.groups_file: no group holds the labels {groupless[:5]}")
    return tuple(group_of[corpus.class_names[label]] for label in corpus.labels)


def _group_of_label(path: Path) -> dict[str, str]:
    groups = _json_in(path, "clients.groups_file")
    if not isinstance(groups, dict) or not all(isinstance(labels, list) for labels in groups.values()):
        raise ConfigError(f"clients.groups_file: {path} holds no JSON object of group names to lists of labels")
    group_of: dict[str, str] = {}
    for group, labels in groups.items():
        for label in labels:
            other = group_of.setdefault(str(label), group)
            if other != group:
                raise ConfigError(f"clients.groups_file: {path} has the label {label!r} in {other!r} and {group!r}")
    return group_of


def _text_in(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise ConfigError(f"{row.where}: column {column!r} holds {text!r:.60}; a text is expected")
    return text
