"""Theorem 4.4 against the product's own aggregation: where it holds to rounding, and where it overstates.

`python -m benchmarks.theorem --format markdown --figure docs/images/theorem.png`

The theorem: under a rank-agnostic average 1 - rho(t) <= C gamma^t, with rho the energy share within the smallest rank.
Three parts: clients that train as it assumes, all of them or a draw of them in a round; clients that add signal by a
known rule; clients that descend a gradient. Each table has what theory says beside what was measured, and its spread
where there is chance. Ranks are the paper's, 8 to 64. About a minute and a half on one core.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from threadpoolctl import threadpool_limits

from benchmarks import theorem_picture
from benchmarks.theorem_runs import descents, full_participation, overstated, sampling
from benchmarks.theorem_tables import Cell, Findings, Table, tables_of

CONSOLE = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, draw the figure if one is asked for."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error("at least 1 seed is needed")
    with threadpool_limits(limits=1):
        findings = measure(given.seeds)
    tables = tables_of(findings)
    if given.format == "json":
        print(json.dumps([_plain(table) for table in tables], indent=2))
    elif given.format == "markdown":
        print("\n\n".join(markdown(table) for table in tables))
    else:
        _print(tables)
    if given.figure:
        given.figure.parent.mkdir(parents=True, exist_ok=True)
        theorem_picture.draw(findings, given.figure)
        CONSOLE.print(str(given.figure))


def measure(seeds: int) -> Findings:
    """Everything; `seeds` are the regressions'."""
    with CONSOLE.status("all clients take part"):
        cases = full_participation()
    with CONSOLE.status("10 of 100 clients are drawn"):
        drawn = sampling()
    with CONSOLE.status("clients that add signal"):
        regimes = overstated()
    with CONSOLE.status("gradient descent"):
        return Findings(cases, drawn, regimes, descents(seeds))


def markdown(table: Table) -> str:
    """The table as it stands on docs/results.md."""
    lines = [f"**{table.title}.** {table.note}.", "", _line(table.columns), _line(["---"] * len(table.columns))]
    return "\n".join(lines + [_line([_text(cell) for cell in row]) for row in table.rows])


def _print(tables: Sequence[Table]) -> None:
    console = Console()
    for table in tables:
        drawn = RichTable(title=table.title, caption=table.note)
        for column in table.columns:
            drawn.add_column(column, justify="right")
        for row in table.rows:
            drawn.add_row(*(_text(cell) for cell in row))
        console.print(drawn)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.strip() for cell in cells)} |"


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell)


def _plain(table: Table) -> dict[str, Any]:
    # JSON has neither NaN nor infinity.
    rows = [
        [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in table.rows
    ]
    return {**asdict(table), "rows": rows}


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theorem", description=summary)
    parser.add_argument("--format", choices=("table", "markdown", "json"), default="table")
    parser.add_argument("--figure", type=Path, help="a picture to write, .png or .svg")
    parser.add_argument("--seeds", type=int, default=5, help="of the regressions (5)")
    return parser


if __name__ == "__main__":
    main()
