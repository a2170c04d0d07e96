"""Everything that `make bench` measures, in one go: `python -m benchmarks [--only PART[:CASE]]`.

    aggregation   one module and whole rounds, against a dense SVD, stacked QR and the floor of the machine
    transfer      uploads, downloads and a round of a hundred workers, against bare TCP
    rounds        rounds of two workers against Flower's, and a thousand workers that wait
    rivals        our aggregation beside what NVIDIA FLARE, chorus-fl and Flower install

Contenders take turns; a figure is the median of at least five turns, between the lowest and the highest, but for the
memory of a merge, many uploads at once, workers that wait and bytes on the wire: those are run once. Nothing
here passes or fails: what is below its bar, what could not be measured and what is worse than recorded is named.
`python -m benchmarks.worker_step` and `worker_round`, `load` and `theorem` are measurements apart.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks import recorded, report_picture
from benchmarks.interleaved import MIN_REPETITIONS, Figure
from benchmarks.machine import setting
from benchmarks.report import Report, json_of, markdown_of, show, with_tables
from common.memory import keep_memory_flat

PARTS = ("aggregation", "transfer", "rounds", "rivals")
_DOCS = Path(__file__).parent.parent / "docs"
_SAYS = Console(stderr=True)
_WIDE = 140
_NICE = 5  # as every process that is started here

Measure = Callable[["Steps", str | None, int], list[Figure]]


class Steps(Progress):
    """What is being measured: bars for the parts that count their turns, and a line for those that say what they do."""

    _said: TaskID | None = None

    def __call__(self, what: str) -> None:
        """Says it, in the place of what was said before."""
        if self._said is not None:
            self.remove_task(self._said)
        self._said = self.add_task(what, total=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, tells, writes; the exit status is 0 whatever was measured."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.docs and given.only and given.only[1]:
        parser.error("--docs writes the tables of whole parts; leave the case out")
    os.nice(_NICE)
    keep_memory_flat()  # as coordinator and worker agent do, whose parts this process plays
    report = measure(given.only, given.repetitions)
    if not report.figures:
        parser.error(f"{given.only[0]} has no case {given.only[1]!r}")
    if given.format == "json":
        print(json_of(report))
    else:
        # In a file or a pipe there is no width to keep to.
        show(report, Console() if sys.stdout.isatty() else Console(width=_WIDE))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json_of(report) + "\n", encoding="utf-8")
    if given.docs:
        write_docs(report, _DOCS)
    if given.record:
        recorded.write(report.figures, report.setting)
    return 0


def measure(only: tuple[str, str | None] | None, repetitions: int) -> Report:
    """The parts one after the other, or the one that was asked for."""
    before, figures = setting(), list[Figure]()
    with Steps(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=_SAYS, transient=True
    ) as steps:
        for part in PARTS if only is None else (only[0],):
            measure_part: Measure = import_module(f"benchmarks.{part}").figures
            figures += measure_part(steps, only[1] if only else None, repetitions)
    return Report(before, tuple(figures), tuple(recorded.worse(figures, recorded.read())))


def part_and_case(text: str) -> tuple[str, str | None]:
    """What --only names."""
    part, _, case = text.partition(":")
    if part not in PARTS:
        raise argparse.ArgumentTypeError(f"{part!r} is no part; there are {', '.join(PARTS)}")
    return part, case or None


def write_docs(report: Report, docs: Path) -> None:
    """The tables of docs/performance.md and their pictures, of the parts that were measured."""
    page = docs / "performance.md"
    tables = {}
    for part, figures in report.parts.items():
        picture = f"images/bench-{part}.png"
        table = markdown_of(report, part)
        if report_picture.draw(figures, docs / picture):
            table += f"\n\n![{part}: every figure against its bar]({picture})"
        tables[part] = table
    page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def _repetitions(text: str) -> int:
    if not text.isdigit() or int(text) < MIN_REPETITIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: a median needs a number of at least {MIN_REPETITIONS}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=part_and_case, metavar="PART[:CASE]", help="one part, or one case of it")
    parser.add_argument("--repetitions", type=_repetitions, default=MIN_REPETITIONS, help="measured turns of each (5)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="on standard output (text)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench.json"), help="where the JSON goes (runs/bench.json)"
    )
    parser.add_argument("--docs", action="store_true", help="also write docs/performance.md and its pictures")
    parser.add_argument("--record", action="store_true", help="also record the figures: later runs compare with them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
