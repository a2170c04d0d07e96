"""How a round's cost grows with clients, ranks and modules. `python -m benchmarks.load.growth`

Every client has a TCP connection of its own and numbers of its own (made at random, nobody trains); the coordinator is
a process. A round is played once unmeasured and then a few times: all clients download their slice, send their update,
submit it and poll until the next round's task is there. Three sweeps leave from one case; a case that would begin
after the time is up is not begun, and is named. What the clients cost on the same machine is told beside.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.load.growth_cases import Case, Sweep, sweeps
from benchmarks.load.growth_rounds import Row, measure
from benchmarks.machine import setting
from benchmarks.report import with_tables
from common.memory import keep_memory_flat

ROUNDS = 3
_SAYS = Console(stderr=True)
_PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
_COLUMNS = (
    "clients",
    "global rank",
    "modules",
    "MB each way",
    "round s",
    "of it merging s",
    "coordinator CPU s",
    "CPU ms a client",
    "peak MiB",
    "without mapped files",
    "clients' own CPU s",
)


@dataclass(frozen=True)
class Grown:
    """What was measured of one sweep."""

    sweep: Sweep
    rows: tuple[Row, ...]
    left_out: tuple[Case, ...]  # because the time was up


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and tells."""
    given = _parser().parse_args(arguments)
    os.nice(5)
    keep_memory_flat()  # of this process, which plays all clients
    where = setting()
    grown = list(_measured(sweeps(given.clients, given.ranks, given.modules), given.seconds))
    if given.format == "json":
        print(json.dumps({"setting": where, "sweeps": [asdict(one) for one in grown]}, indent=1))
    else:
        for one in grown:
            _print(one)
        _SAYS.print("; ".join(f"{name} {value}" for name, value in where.items()), markup=False, highlight=False)
    if given.docs:
        _PAGE.write_text(with_tables(_PAGE.read_text(encoding="utf-8"), {"growth": page_of(where, grown)}), "utf-8")


def page_of(where: Mapping[str, str], grown: Sequence[Grown]) -> str:
    """All of it for docs/scaling.md."""
    said = ", ".join(f"{name} {value}" for name, value in where.items())
    return "\n\n".join([f"Measured on {said}; times are medians of {ROUNDS} rounds:", *map(markdown_of, grown)])


def markdown_of(grown: Grown) -> str:
    """A sweep as a table for a page."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(cells_of(row))} |" for row in grown.rows]
    return "\n".join([*lines, *([f"\n{sentence_of(grown)}"] if grown.left_out else [])])


def sentence_of(grown: Grown) -> str:
    """What was left out, and why."""
    left_out = ", ".join(f"{getattr(case, grown.sweep.name):,}" for case in grown.left_out)
    return f"Not begun, the time was up: {left_out} {grown.sweep.name}."


def cells_of(row: Row) -> list[str]:
    """One case, in the order of the columns."""
    case = row.case
    return [
        f"{case.clients:,}",
        str(case.global_rank),
        str(case.modules),
        f"{case.bytes_each_way / 1e6:,.1f}",
        f"{row.seconds:,.2f}",
        f"{row.merge_seconds:,.2f}",
        f"{row.coordinator_cpu_seconds:,.2f}",
        f"{1e3 * row.coordinator_cpu_seconds / case.clients:.1f}",
        f"{row.peak_mib:,.0f}",
        f"{row.own_mib:,.0f}",
        f"{row.clients_cpu_seconds:,.2f}",
    ]


def _print(grown: Grown) -> None:
    table = Table(title=grown.sweep.name, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for row in grown.rows:
        table.add_row(*cells_of(row))
    console = Console()
    console.print(table)
    if grown.left_out:
        console.print(sentence_of(grown))


def _measured(asked: Sequence[Sweep], seconds: float) -> Iterator[Grown]:
    """The sweeps; what two of them share is measured once."""
    ends_at = time.monotonic() + seconds
    known: dict[Case, Row] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_SAYS, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(sweep.cases) for sweep in asked))
        for sweep in asked:
            for case in sweep.cases:
                progress.update(bar, description=f"{sweep.name} {getattr(case, sweep.name):,}", advance=1)
                if case not in known and time.monotonic() < ends_at:
                    with tempfile.TemporaryDirectory(prefix="raflora-growth-") as folder:
                        known[case] = asyncio.run(measure(Path(folder), case, ROUNDS))
            rows = tuple(known[case] for case in sweep.cases if case in known)
            yield Grown(sweep, rows, tuple(case for case in sweep.cases if case not in known))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1000, 2000], help="(10 100 1000 2000)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32, 64], help="global ranks (8 16 32 64)")
    parser.add_argument("--modules", type=int, nargs="*", default=[1, 4, 16, 32], help="adapted layers (1 4 16 32)")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which no further case begins (900)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="on standard output (text)")
    parser.add_argument("--docs", action="store_true", help="also write the tables of docs/scaling.md")
    return parser


if __name__ == "__main__":
    main()
