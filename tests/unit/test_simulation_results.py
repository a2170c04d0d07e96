"""Rows as CSV and parquet: what is read is what was written, to the last bit."""

import math
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_rows import a_run, an_experiment, key

from common.errors import ConfigError
from simulation.results import (
    AccuracyRow,
    PartitionRow,
    Results,
    RoundRow,
    RunKey,
    RunRow,
    header_of,
    read_results,
    read_rows,
    write_parquet,
    write_results,
    write_rows,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))
whole = st.integers(-(1 << 62), 1 << 62)
real = st.floats()


def _fields_of(kind: type) -> dict[str, st.SearchStrategy]:
    by_type = {str: texts, int: whole, float: real}
    return {field.name: by_type[get_type_hints(kind)[field.name]] for field in fields(kind)[1:]}


keys = st.builds(RunKey, texts, texts, real, texts, whole)
rows_of_a_kind = st.one_of(
    st.tuples(st.just(kind), st.lists(st.builds(kind, keys, **_fields_of(kind)), max_size=4))
    for kind in (RunRow, RoundRow, PartitionRow, AccuracyRow)
)


@settings(deadline=None)  # it writes files, on whatever disk
@given(rows_of_a_kind)
def test_rows_come_back_exactly(given_rows) -> None:
    kind, rows = given_rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_rows(path, kind, rows)
        # Written out, for nan differs from itself and 0.0 equals -0.0.
        assert repr(read_rows(path, kind)) == repr(tuple(rows))


def test_a_number_that_was_not_measured_stays_none(tmp_path: Path) -> None:
    row = AccuracyRow(key(), 1, "test", 4, math.nan, math.inf, 3)
    write_rows(tmp_path / "a.csv", AccuracyRow, [row])
    (found,) = read_rows(tmp_path / "a.csv", AccuracyRow)
    assert math.isnan(found.accuracy)
    assert found.loss == math.inf


def test_a_header_begins_with_the_run() -> None:
    assert header_of(AccuracyRow) == (
        *("stage", "arm", "learning_rate", "decay", "seed"),
        *("round", "split", "rank", "accuracy", "loss", "num_examples"),
    )


def test_a_folder_holds_four_tables(tmp_path: Path) -> None:
    results = an_experiment(rounds=2)
    write_results(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "rounds.csv", "partitions.csv", "accuracy.csv"}
    found = read_results(tmp_path)
    assert set(found.runs) == set(results.runs)
    assert len(found.accuracy) == len(results.accuracy)


def test_a_folder_without_tables_is_empty(tmp_path: Path) -> None:
    assert read_results(tmp_path) == Results()


def test_a_table_of_another_kind_is_refused_by_its_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "rounds.csv", AccuracyRow, [])
    with pytest.raises(ConfigError, match=r"rounds\.csv: its columns are stage, .*; expected stage, .*train_loss"):
        read_results(tmp_path)


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    write_rows(path, RunRow, a_run(key(), 0.5).runs)
    path.write_text(path.read_text(encoding="utf-8") + '"same","raflora",0.1\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"runs\.csv, line 3: not a row"):
        read_rows(path, RunRow)


def test_rows_of_one_run_can_be_shown_as_another_stage() -> None:
    results = a_run(key("raflora", 1), 0.5) + a_run(key("flexlora", 1), 0.4)
    other = key("raflora", 1, stage="best")
    shown = results.of_key(key("raflora", 1)).renamed(other)
    assert {row.key for row in (*shown.runs, *shown.rounds, *shown.partitions, *shown.accuracy)} == {other}
    assert len(shown.runs) == 1


def test_parquet_has_the_columns_and_types_of_the_csv(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(an_experiment(rounds=2), tmp_path)
    table = parquet.read_table(tmp_path / "accuracy.parquet")
    assert tuple(table.column_names) == header_of(AccuracyRow)
    assert str(table.schema.field("accuracy").type) == "double"
    assert table.num_rows == len(an_experiment(rounds=2).accuracy)


def test_an_empty_table_keeps_its_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(Results(), tmp_path)
    assert str(parquet.read_table(tmp_path / "runs.parquet").schema.field("seed").type) == "int64"
