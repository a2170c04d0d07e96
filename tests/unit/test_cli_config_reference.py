"""The reference of all settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cli.config_reference import reference
from common.settings import Section
from worker.config import WorkerConfig


class Inner(Section):
    """A part."""

    ranks: dict[str, int] = Field(default_factory=dict)
    """By client."""
    names: tuple[str, ...] = ("a", "b")
    """Whom."""


class Whole(Section):
    """All of it."""

    quorum: int = Field(ge=1, le=9)
    """How many | at least."""
    mode: Literal["one", "two"] = "one"
    """Which."""
    file: Path | None = None
    """Where."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """How much."""
    inner: Inner | None = None


def test_every_key_has_its_type_default_and_meaning() -> None:
    text = reference(Whole)
    assert "| `quorum` | integer, >= 1, <= 9 | **required** | How many \\| at least. |" in text
    assert '| `mode` | `"one"`, `"two"` | `"one"` | Which. |' in text
    assert "| `file` | path | unset | Where. |" in text
    assert "| `share` | number, > 0, < 1 | `0.5` | How much. |" in text


def test_a_section_inside_is_a_table_of_its_own() -> None:
    _, inner = reference(Whole).split("### `[inner]`")
    assert "A part." in inner
    assert "| `ranks` | table of integers | `{}` | By client. |" in inner
    assert '| `names` | list of strings | `["a", "b"]` | Whom. |' in inner


def test_no_setting_of_a_worker_is_without_a_meaning() -> None:
    rows = [line for line in reference(WorkerConfig).splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    assert not [row for row in rows if row.endswith("|  |")]
