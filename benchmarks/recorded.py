"""The last figures that were recorded, and what became worse since. It tells; it never decides.

A ratio moves with the machine, and by chance: a change counts once the median has left the recorded spread and is more
than TOLERANCE away from the recorded median.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.interleaved import Figure, Spread

RECORDED = Path(__file__).parent / "recorded.json"
TOLERANCE = 0.15

Recorded = Mapping[str, Spread]  # by part and name


@dataclass(frozen=True)
class Change:
    """One figure that became worse."""

    figure: Figure
    recorded: Spread

    @property
    def sentence(self) -> str:
        """In words."""
        figure, before = self.figure, self.recorded
        return (
            f"{figure.part}: {figure.name} is {figure.value.median:.3g} {figure.unit}".rstrip()
            + f"; recorded was {before.median:.3g} ({before.low:.3g} to {before.high:.3g})."
        )


def worse(figures: Iterable[Figure], recorded: Recorded) -> list[Change]:
    """The figures whose value is worse than the recorded one. Those that were never recorded are not worse."""
    changes = []
    for figure in figures:
        before = recorded.get(_key(figure))
        if before is not None and more_is_better(figure) is not None and _is_worse(figure, before):
            changes.append(Change(figure, before))
    return changes


def more_is_better(figure: Figure) -> bool | None:
    """As its goal says; without a goal a ratio should be large, and of anything else nobody knows (None)."""
    if figure.goal is not None:
        return figure.goal.at_least
    return True if figure.unit == "x" else None


def read(path: Path = RECORDED) -> Recorded:
    """What was recorded; nothing if nothing was."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: Spread(**value) for key, value in content["figures"].items()}


def write(figures: Iterable[Figure], setting: Mapping[str, str], path: Path = RECORDED) -> None:
    """Records these figures, and with each part when and where it was measured last; other parts stay as they are."""
    measured = [figure for figure in figures if not math.isnan(figure.value.median)]
    known = {**read(path), **{_key(figure): figure.value for figure in measured}}
    plain = {key: {"median": s.median, "low": s.low, "high": s.high} for key, s in sorted(known.items())}
    settings = {**settings_of(path), **{figure.part: dict(setting) for figure in measured}}
    content = {"settings": dict(sorted(settings.items())), "figures": plain}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def settings_of(path: Path = RECORDED) -> dict[str, dict[str, str]]:
    """By part, when, where and with what it was recorded last."""
    if not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])


def _key(figure: Figure) -> str:
    return f"{figure.part}/{figure.name}"


def _is_worse(figure: Figure, before: Spread) -> bool:
    now = figure.value.median
    if more_is_better(figure):
        return now < before.low and now < before.median * (1 - TOLERANCE)
    return now > before.high and now > before.median * (1 + TOLERANCE)
