"""What a load test says: figures with their bounds, as a table or as JSON, and an exit status that a script can use."""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from os import cpu_count, getloadavg, sysconf

from rich.console import Console
from rich.table import Table

MIB = float(1 << 20)


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    bound: float | None = None  # at most so much; None: nothing was promised

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.bound is None or self.value <= self.bound


@dataclass(frozen=True)
class Report:
    """One test's figures."""

    title: str
    setting: dict[str, object]
    figures: tuple[Figure, ...]

    @property
    def holds(self) -> bool:
        """Whether every figure is within its bound."""
        return all(figure.holds for figure in self.figures)


def setting_of(**more: object) -> dict[str, object]:
    """When and where this was measured."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu_count()} cores, {sysconf('SC_PAGE_SIZE') * sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "load": f"{getloadavg()[0]:.1f} at the end",
        "python": platform.python_version(),
        **more,
    }


def percentiles(name: str, seconds: Sequence[float], *, bound_ms: float | None = None) -> tuple[Figure, ...]:
    """Median, 99th percentile and largest, in milliseconds; the bound is the 99th percentile's."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return (
        Figure(f"{name}, median", statistics.median(ordered) * 1000, "ms"),
        Figure(f"{name}, 99th percentile", p99 * 1000, "ms", bound_ms),
        Figure(f"{name}, largest of {len(ordered)}", ordered[-1] * 1000, "ms"),
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """--format text|json."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="on standard output (text)")


def tell(report: Report, output_format: str) -> None:
    """Prints the report; ends the process with 1 if a bound was broken."""
    if output_format == "json":
        figures = [asdict(figure) | {"holds": figure.holds} for figure in report.figures]
        text = {"title": report.title, "setting": report.setting, "figures": figures, "holds": report.holds}
        print(json.dumps(text, indent=1))
    else:
        _print(report)
    sys.exit(0 if report.holds else 1)


def _print(report: Report) -> None:
    table = Table(title=report.title)
    table.add_column("figure")
    for column in ("value", "unit", "at most", "verdict"):
        table.add_column(column, justify="right")
    for figure in report.figures:
        bound = "" if figure.bound is None else f"{figure.bound:,.4g}"
        verdict = "" if figure.bound is None else "holds" if figure.holds else "BROKEN"
        table.add_row(figure.name, f"{figure.value:,.4g}", figure.unit, bound, verdict)
    console = Console()
    console.print(table)
    console.print("; ".join(f"{name} {value}" for name, value in report.setting.items()))
