"""`raflora digits`: the example's files are what a worker reads, and one flag says for whom."""

import json
from pathlib import Path

import pytest

from cli.example import digits
from common.errors import ConfigError
from simulation.digits import LABELS

pytest.importorskip("sklearn", reason="the extra `demo` is not installed")


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_worker_gets_its_own_data_the_common_test_and_the_base_model(tmp_path: Path) -> None:
    for name in ("ada", "bob"):
        digits(tmp_path / name, sample_for=name)
    ada, bob = _rows(tmp_path / "ada/train.jsonl"), _rows(tmp_path / "bob/train.jsonl")
    assert ada != bob
    assert {row["label"] for row in ada} <= set(range(len(LABELS)))
    assert (tmp_path / "ada/test.jsonl").read_bytes() == (tmp_path / "bob/test.jsonl").read_bytes()
    assert (tmp_path / "ada/base-model/config.json").is_file()


def test_the_same_name_gets_the_same_data_after_a_restart(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        digits(tmp_path / folder, sample_for="ada")
    assert (tmp_path / "first/train.jsonl").read_bytes() == (tmp_path / "second/train.jsonl").read_bytes()


def test_several_workers_share_no_example(tmp_path: Path) -> None:
    digits(tmp_path, clients=3)
    parts = [_rows(tmp_path / f"worker-{number}/train.jsonl") for number in (1, 2, 3)]
    lines = [json.dumps(row) for part in parts for row in part]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("choice", [{}, {"sample_for": "ada", "clients": 2}])
def test_one_flag_says_for_whom(tmp_path: Path, choice: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        digits(tmp_path, **choice)  # type: ignore[arg-type] # what a command line could hold
