"""The results of simulated runs as tidy rows: one observation a row, one kind of row a file.

Every row begins with the run it belongs to. Nothing here trains or draws.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from common.errors import ConfigError
from common.transfer import write_durably


@dataclass(frozen=True, order=True)
class RunKey:
    """One federation of an experiment."""

    stage: str  # "same": the experiment's own rate; "tuning": the grid; "best": the arm's own best rate
    arm: str
    learning_rate: float
    decay: str
    seed: int


@dataclass(frozen=True)
class RunRow:
    """How a run ended."""

    key: RunKey
    method: str
    status: str  # "finished"; "diverged: ..." if numbers were finite no more; "stopped: ..." if too few answered
    rounds: int  # published
    smallest_rank: int
    global_rank: int
    download_bytes: int  # to all clients, over all rounds
    upload_bytes: int
    forecast_factor: float  # of the energy above the smallest rank, per round, under a rank-agnostic average
    initial_energy_ratio: float  # the theorem's C, of the first round with energy: (1 - rho) / rho
    seconds: float


@dataclass(frozen=True)
class RoundRow:
    """One published round."""

    key: RunKey
    round: int
    learning_rate_now: float
    train_loss: float  # mean over the round's clients, weighted by num_examples
    contributors: int
    rho: float
    effective_rank: float
    rank_99: int
    energy: float
    norm: float
    energy_lost: float
    download_bytes: int
    upload_bytes: int


@dataclass(frozen=True)
class PartitionRow:
    """One rank partition after one round."""

    key: RunKey
    round: int
    low: int
    high: int
    energy_share: float
    contributors: int
    effective_contributors: float


@dataclass(frozen=True)
class AccuracyRow:
    """One evaluation of the global adapter, cut to a rank."""

    key: RunKey
    round: int
    split: str  # "validation": the clients' held-out parts together; "test"
    rank: int
    accuracy: float
    loss: float
    num_examples: int


Row = RunRow | RoundRow | PartitionRow | AccuracyRow
AnyRow = TypeVar("AnyRow", RunRow, RoundRow, PartitionRow, AccuracyRow)


@dataclass(frozen=True)
class Results:
    """Everything that was measured: a folder of results, or one run's part of it."""

    runs: tuple[RunRow, ...] = ()
    rounds: tuple[RoundRow, ...] = ()
    partitions: tuple[PartitionRow, ...] = ()
    accuracy: tuple[AccuracyRow, ...] = ()

    def __add__(self, other: "Results") -> "Results":
        return Results(
            self.runs + other.runs,
            self.rounds + other.rounds,
            self.partitions + other.partitions,
            self.accuracy + other.accuracy,
        )

    def of_stage(self, stage: str) -> "Results":
        """The rows of one stage."""
        return self._kept(lambda key: key.stage == stage)

    def of_key(self, key: RunKey) -> "Results":
        """The rows of one run."""
        return self._kept(lambda other: other == key)

    def renamed(self, key: RunKey) -> "Results":
        """The same rows as another run's."""
        return Results(
            tuple(replace(row, key=key) for row in self.runs),
            tuple(replace(row, key=key) for row in self.rounds),
            tuple(replace(row, key=key) for row in self.partitions),
            tuple(replace(row, key=key) for row in self.accuracy),
        )

    def _kept(self, wanted: Callable[[RunKey], bool]) -> "Results":
        return Results(
            tuple(row for row in self.runs if wanted(row.key)),
            tuple(row for row in self.rounds if wanted(row.key)),
            tuple(row for row in self.partitions if wanted(row.key)),
            tuple(row for row in self.accuracy if wanted(row.key)),
        )


FILE_NAMES: Mapping[type[Row], str] = {
    RunRow: "runs.csv",
    RoundRow: "rounds.csv",
    PartitionRow: "partitions.csv",
    AccuracyRow: "accuracy.csv",
}


def header_of(kind: type[Row]) -> tuple[str, ...]:
    """The columns of a kind of row: the run's key, then the rest, in the order of the fields."""
    return tuple(name for name, _ in _columns(kind))


def values_of(row: Row) -> tuple[str | int | float, ...]:
    """One row's values in the order of its header."""
    key = tuple(getattr(row.key, field.name) for field in fields(RunKey))
    return key + tuple(getattr(row, field.name) for field in fields(row)[1:])


def write_rows(path: Path, kind: type[AnyRow], rows: Iterable[AnyRow]) -> None:
    """Writes a CSV file durably; what read_rows returns is equal, to the last bit of every float."""
    text = io.StringIO(newline="")
    # Strings are quoted whatever they hold, so that a reason with a line break in it stays one field.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(header_of(kind))
    writer.writerows(values_of(row) for row in rows)
    write_durably(path, text.getvalue().encode())


def read_rows(path: Path, kind: type[AnyRow]) -> tuple[AnyRow, ...]:
    """The rows of a CSV file; none if there is no such file. Raises ConfigError if it holds something else."""
    if not path.is_file():
        return ()
    columns = _columns(kind)
    names = [name for name, _ in columns]
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        found = next(reader, [])
        if found != names:
            raise ConfigError(f"{path}: its columns are {', '.join(found) or 'none'}; expected {', '.join(names)}")
        for texts in reader:
            try:
                values = [convert(text) for (_, convert), text in zip(columns, texts, strict=True)]
            except ValueError:
                raise ConfigError(f"{path}, line {reader.line_num}: not a row of {', '.join(names)}") from None
            rows.append(_row_of(kind, values))
    return tuple(rows)


def read_results(folder: Path) -> Results:
    """What the CSV files of a folder hold; a missing file is an empty one."""
    return Results(
        runs=read_rows(folder / FILE_NAMES[RunRow], RunRow),
        rounds=read_rows(folder / FILE_NAMES[RoundRow], RoundRow),
        partitions=read_rows(folder / FILE_NAMES[PartitionRow], PartitionRow),
        accuracy=read_rows(folder / FILE_NAMES[AccuracyRow], AccuracyRow),
    )


def write_results(results: Results, folder: Path) -> None:
    """Writes runs.csv, rounds.csv, partitions.csv and accuracy.csv, ordered by run."""
    write_rows(folder / FILE_NAMES[RunRow], RunRow, sorted(results.runs, key=_by_key))
    write_rows(folder / FILE_NAMES[RoundRow], RoundRow, sorted(results.rounds, key=_by_key))
    write_rows(folder / FILE_NAMES[PartitionRow], PartitionRow, sorted(results.partitions, key=_by_key))
    write_rows(folder / FILE_NAMES[AccuracyRow], AccuracyRow, sorted(results.accuracy, key=_by_key))


def write_parquet(results: Results, folder: Path) -> None:
    """The same four tables as parquet. Needs pyarrow; raises ModuleNotFoundError without it."""
    import pyarrow  # noqa: PLC0415 - an extra, and only for who asks
    import pyarrow.parquet  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    arrow_types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    tables: tuple[tuple[type[Row], tuple[Row, ...]], ...] = (
        (RunRow, results.runs),
        (RoundRow, results.rounds),
        (PartitionRow, results.partitions),
        (AccuracyRow, results.accuracy),
    )
    for kind, rows in tables:
        schema = pyarrow.schema([(name, arrow_types[convert]) for name, convert in _columns(kind)])
        ordered = [values_of(row) for row in sorted(rows, key=_by_key)]
        columns = [[values[index] for values in ordered] for index in range(len(schema))]
        table = pyarrow.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
        pyarrow.parquet.write_table(table, folder / FILE_NAMES[kind].replace(".csv", ".parquet"))


def _by_key(row: Row) -> RunKey:
    return row.key


def _columns(kind: type[Row]) -> tuple[tuple[str, type], ...]:
    """Names and types (str, int or float) of a flat row."""
    types = get_type_hints(RunKey) | get_type_hints(kind)
    names = [field.name for field in (*fields(RunKey), *fields(kind)[1:])]
    return tuple((name, types[name]) for name in names)


def _row_of(kind: type[AnyRow], values: Sequence[Any]) -> AnyRow:
    width = len(fields(RunKey))
    return kind(RunKey(*values[:width]), *values[width:])
