"""This site's data: reads it, splits it, and has every record prepared as an example.

Data is read here and nowhere else, and nothing here sends anything. Every complaint names file, row and column.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

import numpy as np

from common.errors import RafloraError
from worker.config import DataConfig

Example: TypeAlias = Mapping[str, Any]  # what the task's collator takes
FILE_KINDS = (".jsonl", ".csv", ".parquet")
KEEP_BYTES = 1 << 30  # of prepared examples, where they are prepared on access
_PARQUET_BATCH_ROWS = 1024
_MAX_CELL_CHARACTERS = 16 << 20  # of a csv file; the module's own limit of 128 KiB is too small for long texts


class ClassName(str):
    """A class as the data set itself names it, where its files hold only the number; never read as a number."""

    __slots__ = ()


class DataError(RafloraError):
    """This site's data cannot be used as it is; the message says where and why."""

    code = "FAILED_PRECONDITION"
    reason = "data_error"


@dataclass(frozen=True)
class Row:
    """One record, and where it stands."""

    where: str  # "train.csv, line 7"
    folder: Path  # what a relative path in the record is relative to
    values: Mapping[str, Any]

    def __getitem__(self, column: str) -> Any:
        """The value in a column. Raises DataError that lists the columns there are."""
        value = self.values.get(column)
        if value is None:
            known = ", ".join(str(name) for name in self.values)
            problem = (
                "is empty" if column in self.values else f"does not exist; there are {known} (name yours in [data])"
            )
            raise DataError(f"{self.where}: column {column!r} {problem}")
        return value


@dataclass(frozen=True)
class Prepared:
    """What a task made of records."""

    examples: Sequence[Example]
    num_records: int  # that are in them: a task may leave some out, or make one example of several


class Prepares(Protocol):
    """What makes examples of records: the preparation of a task."""

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:
        """The records as examples, at least one. Raises DataError for the first that cannot be used."""
        ...


@dataclass(frozen=True)
class LocalData:
    """The examples of this site, ready for the model."""

    train: Sequence[Example]  # none at an evaluator
    test: Sequence[Example]
    test_rows: Sequence[Row] = ()  # what the test examples were made of, for answers that are generated or chosen
    num_packed: int = 0  # records in `train`, if an example holds several

    @property
    def num_examples(self) -> int:
        """Records that are trained on: this site's weight."""
        return self.num_packed or len(self.train)


class ExamplesOnAccess(Sequence[Example]):
    """Examples that are prepared when they are needed, and kept while there is room for them.

    `check` sees every record at once and cheaply; what only `prepare` can find is found when the example is needed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        check: Callable[[Row], None],
        prepare: Callable[[Row], Example],
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        for row in rows:
            check(row)
        self._rows = rows
        self._prepare = prepare
        self._room = keep_bytes
        self._kept: dict[int, Example] = {}

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """One example, or some. Raises DataError if a record turns out to be unusable."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # also what counts from the end, and IndexError
        if number in self._kept:
            return self._kept[number]
        example = self._prepare(self._rows[number])
        size = sum(getattr(value, "nbytes", 0) for value in example.values())
        if size <= self._room:
            self._room -= size
            self._kept[number] = example
        return example


def load_data(config: DataConfig, preparation: Prepares, *, seed: int, offline: bool) -> LocalData:
    """Reads everything and has it prepared. Without `config.test` a part is held out, chosen by `seed` alone.

    Without `config.train` there is nothing to train on. Raises DataError for the first row that cannot be used.
    """
    if not config.train and config.test is None:
        raise DataError("data.train and data.test: neither is set, so there is nothing to train or evaluate on")
    rows = read_source(config.train, config.subset, config.train_split, offline=offline) if config.train else []
    rows = _sample(rows, config.max_examples, seed)
    if config.test is not None:
        test = _sample(
            read_source(config.test, config.subset, config.test_split, offline=offline), config.max_examples, seed
        )
    else:
        rows, test = _hold_out(rows, config, seed)
    train = preparation.examples(rows, is_training=True) if rows else Prepared((), 0)
    packed = train.num_records if train.num_records != len(train.examples) else 0
    return LocalData(train.examples, preparation.examples(test, is_training=False).examples, test, packed)


def read_rows(path: Path) -> Iterator[Row]:
    """The records of a jsonl, csv or parquet file, in its order."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def read_source(source: str, subset: str | None, split: str, *, offline: bool) -> list[Row]:
    """The records of a file or of a hub data set's split, at least one. Raises DataError."""
    path = Path(source).expanduser()
    if path.suffix in FILE_KINDS:
        rows = list(read_rows(path))
    elif path.is_file():
        raise DataError(f"{path}: a file that ends in {', '.join(FILE_KINDS)} is expected")
    else:
        rows = _hub_rows(source, subset, split, offline)
    if not rows:
        raise DataError(
            f"{source}: holds no records, so there is nothing to train or evaluate on; put records into it, or name "
            "another file or data set with data.train and data.test"
        )
    return rows


def _sample(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    if most is None or len(rows) <= most:
        return rows
    # A sample, not the first ones: files are often sorted by label.
    return [rows[i] for i in np.sort(_permutation(len(rows), seed)[:most])]


def _hold_out(rows: list[Row], config: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    held = max(1, round(len(rows) * config.holdout))
    if held >= len(rows):
        raise DataError(
            f"{config.train}: {len(rows)} record(s) are too few to hold out {config.holdout:.0%} for evaluation; "
            "give more data or a test file"
        )
    order = _permutation(len(rows), seed)
    return [rows[i] for i in np.sort(order[held:])], [rows[i] for i in np.sort(order[:held])]


def _permutation(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            if not isinstance(values, dict):
                raise DataError(f"{where}: an object with columns as keys is expected, found {line.strip():.60}")
            yield Row(where, path.parent, values)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if None in values or None in values.values():
                    raise DataError(f"{where}: not as many cells as the header has columns")
                yield Row(where, path.parent, values)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # noqa: PLC0415 # half a second that jsonl and csv do not need
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = _class_names_in(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", path.parent, _named(values, names))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from None


def _class_names_in(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The classes' names by column, as `datasets` writes them into a parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # not written by `datasets`; numbers are then the federation's


def _named(values: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """The same record with the data set's own names of its classes: its numbers need not be the federation's."""
    named = dict(values)
    for column, known in names.items():
        number = values.get(column)
        if isinstance(number, int) and 0 <= number < len(known):
            named[column] = ClassName(known[number])
    return named


def _hub_rows(source: str, subset: str | None, split: str, offline: bool) -> list[Row]:
    import datasets  # noqa: PLC0415 # seconds that local files do not need

    if offline:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        found = datasets.load_dataset(source, name=subset, split=split)
    except Exception as error:
        # The library raises its own, the network's and plain errors; to the site all mean the same.
        raise DataError(
            f"{source}: neither a file that ends in {', '.join(FILE_KINDS)} nor a data set that can be loaded: {error}"
        ) from error
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):  # bytes, so that there is one way to decode an image
            found = found.cast_column(name, datasets.Image(decode=False))
    names = {n: f.names for n, f in found.features.items() if isinstance(f, datasets.ClassLabel) and f.names}
    where = f"{source} ({split})"
    return [Row(f"{where}, row {i}", Path(), _named(values, names)) for i, values in enumerate(found, start=1)]
