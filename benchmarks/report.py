"""What `make bench` says: figures with their goals as a table, as JSON and as Markdown, and what fell short in words.

A figure that could not be measured has no number (NaN) and a note that says why; it stands in every report.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.interleaved import Figure, Goal, Spread
from benchmarks.recorded import Change

NOT_MEASURED = Spread(math.nan, math.nan, math.nan)
_BEGIN, _END = "<!-- bench:{part}: begin; measured, not written by hand -->", "<!-- bench:{part}: end -->"


@dataclass(frozen=True)
class Report:
    """One run."""

    setting: Mapping[str, str]
    figures: tuple[Figure, ...]
    changes: tuple[Change, ...] = ()  # against the recorded figures, for the worse

    @property
    def parts(self) -> Mapping[str, list[Figure]]:
        """The figures by part, in the order in which they were measured."""
        parts: dict[str, list[Figure]] = {}
        for figure in self.figures:
            parts.setdefault(figure.part, []).append(figure)
        return parts


def is_measured(figure: Figure) -> bool:
    """Whether there is a number."""
    return not math.isnan(figure.value.median)


def verdict_of(figure: Figure) -> str:
    """'goal', 'bar', 'below', 'not measured', or nothing where nothing was promised."""
    if not is_measured(figure):
        return "not measured"
    return figure.goal.says(figure.value.median) if figure.goal else ""


def sentences_of(report: Report) -> list[str]:
    """What a reader must not overlook: what is below its bar, what was not measured, what became worse."""
    said = []
    for figure in report.figures:
        name = f"{figure.part}: {figure.name}"
        if not is_measured(figure):
            said.append(f"Not measured: {name}. {figure.note}")
        elif figure.goal and verdict_of(figure) == "below":
            value = f"{number(figure.value.median)} {figure.unit}".rstrip()
            said.append(f"Below the bar: {name} is {value}; {limit(figure.goal, figure.goal.bar)} was asked.")
    return said + [f"Worse than recorded: {change.sentence}" for change in report.changes]


def json_of(report: Report) -> str:
    """The whole run for a program."""
    content = {
        "setting": dict(report.setting),
        "figures": [_plain(figure) for figure in report.figures],
        "said": sentences_of(report),
    }
    return json.dumps(content, indent=1)


def show(report: Report, console: Console) -> None:
    """The tables, then the sentences, then when and where."""
    for part, figures in report.parts.items():
        table = Table(title=part, title_justify="left")
        table.add_column("figure", overflow="fold")
        for column in ("median", "lowest to highest", "bar", "goal", "reached"):
            table.add_column(column, justify="right")
        for figure in figures:
            table.add_row(figure.name, *_cells(figure))
        console.print(table)
    for sentence in sentences_of(report):
        console.print(sentence, markup=False, highlight=False)
    console.print("; ".join(f"{name} {value}" for name, value in report.setting.items()), markup=False, highlight=False)


def markdown_of(report: Report, part: str) -> str:
    """One part for a page: the setting, a table, and the notes that say what was compared."""
    figures = report.parts[part]
    setting = ", ".join(f"{name} {value}" for name, value in report.setting.items())
    lines = [f"Measured on {setting}:", ""]
    lines += ["| | median | lowest to highest | bar | goal | reached |", "|---|---|---|---|---|---|"]
    lines += [f"| {figure.name} | {' | '.join(_cells(figure))} |" for figure in figures]
    notes: dict[str, list[str]] = {}
    for figure in figures:
        if figure.note:
            notes.setdefault(figure.note.rstrip("."), []).append(figure.name)
    if notes:
        lines += ["", *(f"- {'; '.join(names)}: {note}." for note, names in notes.items())]
    return "\n".join(lines)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with these parts' tables between their markers. Raises ValueError where a marker is missing."""
    for part, table in tables.items():
        begin, end = _BEGIN.format(part=part), _END.format(part=part)
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no place for {part}: {begin!r} and {end!r} are needed")
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return page


def number(value: float) -> str:
    """Three digits that matter, thousands with commas."""
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1e}"


def limit(goal: Goal, value: float) -> str:
    """'at least 60' or 'at most 5'."""
    return f"at {'least' if goal.at_least else 'most'} {number(value)}"


def _cells(figure: Figure) -> Sequence[str]:
    goal, value = figure.goal, figure.value
    limits = (limit(goal, goal.bar), limit(goal, goal.goal)) if goal else ("", "")
    if not is_measured(figure):
        return ("", "", *limits, verdict_of(figure))
    unit = f" {figure.unit}".rstrip()
    # A quantity that was taken once, such as an error, has no spread.
    spread = f"{number(value.low)} to {number(value.high)}" if value.low != value.high else ""
    return (f"{number(value.median)}{unit}", spread, *limits, verdict_of(figure))


def _plain(figure: Figure) -> dict[str, Any]:
    value, goal = figure.value, figure.goal
    numbers = {"median": value.median, "low": value.low, "high": value.high}
    return {
        "part": figure.part,
        "name": figure.name,
        "unit": figure.unit,
        "value": numbers if is_measured(figure) else None,
        "goal": {"bar": goal.bar, "goal": goal.goal, "at_least": goal.at_least} if goal else None,
        "reached": verdict_of(figure),
        "note": figure.note,
    }


def missing(part: str, why: str, figures: Iterable[Figure]) -> list[Figure]:
    """The same figures without numbers."""
    return [Figure(part, figure.name, NOT_MEASURED, figure.unit, figure.goal, why) for figure in figures]
