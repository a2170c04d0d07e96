"""The documentation holds: links lead somewhere, settings in it are accepted, generated pages are current.

The settings of examples/ must be whole; a block in a page may be a part of a file.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.settings import Section, load_settings
from coordinator.config import CoordinatorConfig
from worker.config import WorkerConfig

ROOT = Path(__file__).resolve().parent.parent
MODELS: tuple[type[Section], ...] = (CoordinatorConfig, WorkerConfig)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_FENCE = re.compile(r"^ {0,3}```(\w*)\s*$")


def _pages() -> list[Path]:
    folders = ("docs", "examples", "benchmarks", "tests")
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and content of every fenced block."""
    begun, language, content = 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and begun:
            yield begun, language, "\n".join(content)
            begun = 0
        elif fence:
            begun, language, content = number, fence[1], []
        elif begun:
            content.append(line)


def links_of(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link that is not in a fenced block and does not leave the repository."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            for target in _LINK.findall(re.sub(r"`[^`]*`", "", line)):
                if not re.match(r"[a-z]+:", target):
                    yield number, target


def anchors_of(text: str) -> set[str]:
    """What `#...` may name: every heading as code hosts spell it."""
    fenced, anchors = False, set()
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        heading = re.match(r"#+\s+(.*)", line)
        if heading and not fenced:
            words = re.sub(r"[^\w\- ]", "", heading[1].strip().lower())
            anchors.add(words.replace(" ", "-"))
    return anchors


def complaints_about(toml: str, models: tuple[type[Section], ...] = MODELS) -> list[str]:
    """Why no role takes this part of a settings file, one line a role; empty if one does."""
    content = tomllib.loads(toml)
    complaints = []
    for model in models:
        try:
            model.model_validate(content)
        except ValidationError as error:
            # What is missing may stand in the part that is not shown.
            problems = [p for p in error.errors(include_url=False) if p["type"] != "missing"]
            if problems:
                where = ".".join(str(part) for part in problems[0]["loc"])
                complaints.append(f"{model.__name__}: {where}: {problems[0]['msg']}")
                continue
        return []
    return complaints


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for number, target in links_of(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{_name(page)}:{number}: {target} does not exist"
        if anchor and file.suffix == ".md":
            known = anchors_of(file.read_text(encoding="utf-8"))
            assert anchor in known, f"{_name(page)}:{number}: {target}: no such heading"


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_settings_in_a_page_are_accepted(page: Path) -> None:
    for number, language, content in blocks_of(page.read_text(encoding="utf-8")):
        if language == "toml":
            complaints = complaints_about(content)
            assert not complaints, f"{_name(page)}:{number}: " + "; ".join(complaints)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=_name)
def test_an_example_is_a_whole_settings_file(path: Path) -> None:
    role = WorkerConfig if "worker" in path.name else CoordinatorConfig
    load_settings(role, path, environ={})


def test_generated_pages_are_current() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the rules themselves: each can fail


def test_a_link_in_a_block_is_no_link_and_an_address_is_not_followed() -> None:
    text = '[a](x.md)\n```\n[b](y.md)\n```\n[c](https://example.org) `[d](z.md)` ![e](p.png "t")\n'
    assert list(links_of(text)) == [(1, "x.md"), (5, "p.png")]


def test_anchors_are_spelt_as_code_hosts_spell_them() -> None:
    assert anchors_of("## What it is, and isn't\n```\n# no\n```\n") == {"what-it-is-and-isnt"}


def test_blocks_have_a_line_a_language_and_a_content() -> None:
    assert list(blocks_of("a\n```toml\nx = 1\ny = 2\n```\n```\nz\n```\n")) == [
        (2, "toml", "x = 1\ny = 2"),
        (6, "", "z"),
    ]


@pytest.mark.parametrize(
    ("toml", "accepted"),
    [
        ("[rounds]\nnum_rounds = 3\n", True),
        ("rank = 8\n[policy]\nmax_rank = 16\n", True),
        ("[rounds]\nnum_round = 3\n", False),
        ("rank = 0\n", False),
    ],
)
def test_a_part_of_a_settings_file_is_accepted_by_its_role_or_nobody(toml: str, accepted: bool) -> None:
    assert (not complaints_about(toml)) is accepted
