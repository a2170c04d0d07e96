"""The commands that the documentation shows are commands that there are; nothing is run, only the words are parsed."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from cli.main import app
from common.settings import load_settings
from coordinator.config import CoordinatorConfig

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("plan", "probe", "export", "evaluate", "local")
_FENCE = re.compile(r"^ {0,3}```")
_VERB = re.compile(rf"(?:^|[\s/])raflora\s+(?=(?:{'|'.join(VERBS)})\b)")
_IN_A_TABLE = re.compile(r"`(raflora [^`]+)`")


def _pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line and words, from the verb on, of each command in a block or in a table; what explains it is cut off."""
    fenced, begun, so_far = False, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif line.startswith("|"):
            shown = [said for said in _IN_A_TABLE.findall(line) if len(said.split()) > 2]  # more than the verb's name
            yield from ((number, words) for said in shown for words in _words(said))
        elif fenced or line.startswith("    "):
            begun = begun or number
            so_far += f" {line.strip().removeprefix('$ ')}"
            if so_far.endswith("\\"):
                so_far = so_far[:-1].rstrip()
                continue
            yield from ((begun, words) for words in _words(so_far.strip()))
            begun, so_far = 0, ""


def _words(line: str) -> Iterator[list[str]]:
    found = _VERB.search(line)
    if found:
        # An explanation stands behind two spaces.
        command = re.split(r"\s{2,}", line[found.end() :].strip())[0]
        yield shlex.split(command, comments=True)


def complaint_about(words: list[str]) -> str:
    """Why the command line is not accepted; empty if it is."""
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return str(error) or type(error).__name__
    return ""


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_a_documented_command_is_accepted(page: Path) -> None:
    for number, words in commands_of(page.read_text(encoding="utf-8")):
        complaint = complaint_about(words)
        assert not complaint, f"{_name(page)}:{number}: raflora {shlex.join(words)}: {complaint}"


def test_every_verb_is_shown_somewhere() -> None:
    shown = {words[0] for page in _pages() for _, words in commands_of(page.read_text(encoding="utf-8"))}
    assert shown == set(VERBS)


def test_a_plan_says_where_the_shapes_are_from() -> None:
    plans = [
        (page, words)
        for page in [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
        for _, words in commands_of(page.read_text(encoding="utf-8"))
        if words[0] == "plan"
    ]
    assert plans
    for page, words in plans:
        beside = page.with_name("federation.toml")
        is_described = (
            beside.is_file() and load_settings(CoordinatorConfig, beside, environ={}).adapter.spec is not None
        )
        assert is_described or "--model" in words, f"{_name(page)}: raflora {shlex.join(words)}"
        # Its dtype, checkpointing and lengths are half of the memory: without it the plan is for another worker.
        assert page.name != "README.md" or page.parent == ROOT or "--worker" in words, f"{_name(page)}: --worker"


# --- the rules themselves: each can fail


def test_commands_are_found_where_people_look_for_them() -> None:
    text = """Prose with `raflora export --nonsense` in it.
| a | `raflora export A --rank 2` | `raflora probe` |

    $ raflora plan f.toml --sites 8x5   # what it costs
    sudo /opt/raflora/bin/raflora probe --config w.toml    what fits

```sh
raflora local f.toml \\
  a.toml b.toml
raflora status
```
"""
    assert list(commands_of(text)) == [
        (2, ["export", "A", "--rank", "2"]),
        (4, ["plan", "f.toml", "--sites", "8x5"]),
        (5, ["probe", "--config", "w.toml"]),
        (8, ["local", "f.toml", "a.toml", "b.toml"]),
    ]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("export adapter --rank 16", ""),
        ("export adapter --rank sixteen", "--rank"),
        ("export", "FOLDER"),
        ("evaluate adapter", "--tasks"),
        ("local federation.toml site-1.toml --log runs", "--log"),
    ],
)
def test_what_the_command_line_would_refuse_is_caught(command: str, complaint: str) -> None:
    found = complaint_about(command.split())
    assert complaint in found
    assert bool(found) is bool(complaint)
