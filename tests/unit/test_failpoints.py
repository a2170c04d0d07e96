"""Failpoints: what a plan says, and that a process does exactly that."""

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.failpoints import Plan, Point, arm, arm_as_planned, parse_plan, reach

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "coordinator", "worker", "cli")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm(None)


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("kill@137", Point(137)),
        ("kill@file.renamed", Point(1, "file.renamed")),
        ("kill@file.renamed:2", Point(2, "file.renamed")),
        ("fail@bytes.syncing=EIO", Point(1, "bytes.syncing", error=errno.EIO)),
        ("fail@file.writing:3+=ENOSPC", Point(3, "file.writing", onwards=True, error=errno.ENOSPC)),
    ],
)
def test_a_plan_says_what_happens_where(text: str, point: Point) -> None:
    assert parse_plan(text) == Plan((point,))


def test_a_plan_may_hold_several_things() -> None:
    assert parse_plan("kill@9,trace=/tmp/x,fail@4=EIO") == Plan((Point(9), Point(4, error=errno.EIO)), "/tmp/x")


@pytest.mark.parametrize(
    "text",
    [
        *("", "kill", "kill@", "kill@0", "kill@renamed", "kill@file.renamed=EIO", "fail@file.renamed", "fail@1=NOPE"),
        *("fail@file.renamed:0=EIO", "trace=", "kill@1,", "die@1", "kill@1 ", "KILL@1"),
    ],
)
def test_a_plan_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="failpoints: "):
        parse_plan(text)


def test_an_unarmed_process_goes_on() -> None:
    arm_as_planned("")
    reach("file.renamed")


def test_a_step_fails_once_or_from_then_on() -> None:
    arm_as_planned("fail@disk.once:2=EIO,fail@disk.always:2+=ENOSPC")
    assert [_errno_at("disk.once") for _ in range(4)] == [0, errno.EIO, 0, 0]
    assert [_errno_at("disk.always") for _ in range(4)] == [0, errno.ENOSPC, errno.ENOSPC, errno.ENOSPC]


def test_steps_are_counted_together_where_none_is_named() -> None:
    arm_as_planned("fail@3=EIO")
    assert [_errno_at(step) for step in ("a.a", "b.b", "a.a", "b.b")] == [0, 0, errno.EIO, 0]


def test_the_trace_ends_with_the_step_at_which_the_process_was_killed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    program = "from common.failpoints import *; arm_as_planned(sys.argv[1]); [reach(s) for s in ('a.a', 'b.b', 'c.c')]"
    plan = f"kill@b.b,trace={trace}"
    ended = subprocess.run([sys.executable, "-c", "import sys; " + program, plan], cwd=ROOT, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert trace.read_text() == "1 a.a\n2 b.b\n"


def test_a_process_says_which_planned_step_it_never_came_to() -> None:
    program = "import sys; from common.failpoints import *; arm_as_planned(sys.argv[1]); reach('file.renamed')"
    plan = "fail@file.renamd=EIO,fail@file.renamed:2=EIO,fail@9=EIO"
    ended = subprocess.run(
        [sys.executable, "-c", program, plan], cwd=ROOT, check=True, timeout=60, capture_output=True, text=True
    )
    assert ended.stderr == "failpoints: this process never came to file.renamd\n"


def test_the_table_in_the_docs_names_every_step_of_the_source_and_no_other() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(listed)), "a step is listed twice"
    assert set(listed) == steps_in_the_source()


def test_a_step_is_always_a_literal_so_that_it_can_be_found() -> None:
    calls = [call for text in _sources() for call in re.findall(r"\breach\((.*)\)", text)]
    assert [call for call in calls if not re.fullmatch(r'"[a-z_]+\.[a-z_]+"', call)] == []


def steps_in_the_source() -> set[str]:
    return {step for text in _sources() for step in re.findall(r'\breach\("([^"]+)"\)', text)}


def _sources() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
    return [text for text in texts if "from common.failpoints import reach" in text]  # cli has another function "reach"


def _errno_at(step: str) -> int:
    try:
        reach(step)
    except OSError as error:
        return error.errno or -1
    return 0
