"""The documentation holds: links lead somewhere, settings in it are accepted, generated pages are current.

The settings of examples/ must be whole; a block in a page is a part of the file that its first line names.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.settings import Section, load_settings
from coordinator.config import CoordinatorConfig
from simulation.experiment import ExperimentConfig
from worker.config import SitePolicy, WorkerConfig

ROOT = Path(__file__).resolve().parent.parent
# What a settings file of each role must at least hold; a block in a page is a part that is put on top of it.
ROLES: dict[str, tuple[type[Section], str]] = {
    "federation.toml": (
        CoordinatorConfig,
        """
        model = { base_model = "base", task = "sequence-classification", labels = ["no", "yes"] }
        adapter = { target_modules = ["query"], global_rank = 8 }
        rounds = { num_rounds = 1 }
        training = { learning_rate = 1e-3 }
        """,
    ),
    "experiment.toml": (
        ExperimentConfig,
        """
        name = "some"
        model = { path = "base", task = "sequence-classification" }
        data = { train = "train.jsonl", test = "test.jsonl", labels = ["no", "yes"] }
        clients = { count = 4, ranks = [2, 4], per_round = 4 }
        rounds = { num_rounds = 1 }
        training = { learning_rate = 1e-3 }
        arms = [{ name = "raflora" }]
        """,
    ),
    "policy.toml": (SitePolicy, ""),
    "worker.toml": (WorkerConfig, 'rank = 4\nmodel = { path = "base" }\ndata = { train = "train.jsonl" }'),
}
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


def complaint_about(fragment: str) -> str:
    """Why this part of a settings file is not accepted; empty if it is. Its first line names the file."""
    role = fragment.partition("\n")[0].removeprefix("#").strip()
    if role not in ROLES:
        return f"the first line names no file: {' or '.join(f'# {name}' for name in ROLES)} is expected"
    model, rest = ROLES[role]
    try:
        model.model_validate(merged(tomllib.loads(rest), tomllib.loads(fragment)))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        return str(error)
    return ""


def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of the part in them; sections are merged, everything else is replaced."""
    both = dict(whole)
    for key, value in part.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for number, target in links_of(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{_name(page)}:{number}: {target} does not exist"
        if anchor and file.suffix == ".md":
            known = anchors_of(file.read_text(encoding="utf-8"))
            assert anchor in known, f"{_name(page)}:{number}: {target}: no such heading"


def test_settings_in_a_page_are_accepted() -> None:
    found = [
        (f"{_name(page)}:{number}", complaint_about(content))
        for page in _pages()
        for number, language, content in blocks_of(page.read_text(encoding="utf-8"))
        if language == "toml"
    ]
    assert found, "no page shows settings as ```toml any more"
    assert [where for where, complaint in found if complaint] == [], "\n".join(f"{w}: {c}" for w, c in found if c)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=_name)
def test_an_example_is_a_whole_settings_file(path: Path) -> None:
    role = WorkerConfig if "worker" in path.name else CoordinatorConfig
    load_settings(role, path, environ={})


@pytest.mark.parametrize("name", ["federation.toml", "worker.toml"])
def test_the_page_to_follow_shows_whole_settings_files(name: str) -> None:
    page = (ROOT / "docs" / "try-it.md").read_text(encoding="utf-8")
    (shown,) = (content for _, _, content in blocks_of(page) if content.startswith(f"# {name}\n"))
    settings = ROLES[name][0].model_validate(tomllib.loads(shown))
    if isinstance(settings, CoordinatorConfig):
        assert settings.server.identity is not None
        assert settings.adapter.spec == Path("spec.json"), "what the page lets `raflora spec` write"
    # Every file that the settings name is one that a command of the page writes or names.
    for path in re.findall(r'"((?:fed|example)/[^"]+)"', shown):
        assert f"{path.partition('/')[0]}" in page.partition("```toml")[0]


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
    ("fragment", "complaint"),
    [
        ("# federation.toml\n[rounds]\nnum_rounds = 3\n", ""),
        ("# worker.toml\nrank = 8\n[policy]\nmax_rank = 16\n", ""),
        ("[rounds]\nnum_rounds = 3\n", "the first line names no file"),
        ("# worker.toml\n[rounds]\nnum_rounds = 3\n", "rounds"),
        ("# federation.toml\n[rounds]\nnum_round = 3\n", "rounds.num_round"),
        ("# federation.toml\n[server.tls]\ncertificate_file = 'a.pem'\n", "server.tls.key_file"),
        ("# worker.toml\nrank = 0\n", ""),  # what the probe proposed
        ("# worker.toml\nrank = -1\n", "rank"),
        ("# worker.toml\nrank = \n", "Invalid value"),
    ],
)
def test_a_part_of_a_settings_file_is_accepted_by_its_own_role_alone(fragment: str, complaint: str) -> None:
    found = complaint_about(fragment)
    assert complaint in found
    assert bool(found) is bool(complaint)


def test_a_part_replaces_values_and_keeps_what_it_does_not_name() -> None:
    assert merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}, "c": 5}) == {"a": {"x": 1, "y": 4}, "b": 3, "c": 5}
