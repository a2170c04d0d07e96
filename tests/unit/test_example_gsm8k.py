"""The GSM8K example's preparation: records as the data set has them, and every one at one site."""

import importlib.util
import json
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gsm8k-llama" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_gsm8k", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_separator_within_a_text_ends_no_record(prepare: ModuleType, tmp_path: Path) -> None:
    # GSM8K's own training file holds one.
    records = [{"question": "one\u2028more", "answer": "#### 1"}, {"question": "two", "answer": "#### 2"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert prepare._read(path) == records


def test_every_problem_lies_at_one_site_and_most_where_the_gpus_are_small(prepare: ModuleType) -> None:
    problems = list(prepare._problems(600))
    parts = prepare._parts(problems)
    assert [len(part) for part in parts] == [300, 120, 60, 60, 60]
    assert sorted(map(str, chain(*parts))) == sorted(map(str, problems))
    for problem in problems[:50]:
        step, _, answer = problem["answer"].partition("\n#### ")
        calculation = step.partition("<<")[2].partition(">>")[0]
        left, _, right = calculation.partition("=")
        signed = left.replace("-", "+-").split("+")
        assert sum(map(int, signed)) == int(right) == int(answer)
