"""docs/fault-matrix.md holds: every fault names a test that exists, or says that it is not tested, and why."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fault-matrix.md"
FAULTS = 28  # rows; one that is dropped must be dropped here too
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_NOT_TESTED = re.compile(r"^not tested: \S.{10,}")


def rows(text: str) -> list[tuple[str, str]]:
    """Fault and tests of every row of the tables of faults."""
    found, is_matrix = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_matrix = False
        elif cells[0] == "Fault":
            is_matrix = True
        elif is_matrix and not cells[0].startswith("---"):
            found.append((cells[0], cells[2]))
    return found


def complaint(tests: str) -> str:
    """What is wrong with a row's last cell; nothing if it holds."""
    named = _TEST.findall(tests)
    if not named:
        return "" if _NOT_TESTED.match(tests) else "names no test, and does not say why"
    missing = [f"{file}::{name}" for file, name in named if name not in _names_in(ROOT / file)]
    return f"there is no {', '.join(missing)}" if missing else ""


def _names_in(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    # A state machine's test is a name that is given to a class.
    return names | {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if _is_name(t)}


def _is_name(target: ast.expr) -> bool:
    return isinstance(target, ast.Name)


MATRIX = rows(PAGE.read_text(encoding="utf-8"))


def test_every_fault_is_in_the_matrix_once() -> None:
    faults = [fault for fault, _ in MATRIX]
    assert len(faults) == len(set(faults)) == FAULTS


@pytest.mark.parametrize(("fault", "tests"), MATRIX, ids=[fault for fault, _ in MATRIX])
def test_a_fault_names_its_tests(fault: str, tests: str) -> None:
    assert not complaint(tests), f"{fault}: {complaint(tests)}"


@pytest.mark.parametrize(
    ("tests", "wrong"),
    [
        ("", "names no test"),
        ("not tested", "names no test"),
        ("`tests/test_fault_matrix.py::test_that_nobody_wrote`", "there is no"),
        ("`tests/no_such_file.py::test_a`", "there is no"),
        ("`tests/test_fault_matrix.py::test_a_fault_names_its_tests`", ""),
        ("not tested: a disk that lies needs a machine of its own", ""),
    ],
)
def test_a_row_without_a_test_is_caught(tests: str, wrong: str) -> None:
    assert complaint(tests).startswith(wrong)
    assert bool(complaint(tests)) == bool(wrong)
