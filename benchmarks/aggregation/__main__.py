"""The part on its own: JSON on standard output."""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress

from benchmarks.aggregation.cases import CASES, figures
from benchmarks.interleaved import MIN_REPETITIONS
from benchmarks.machine import setting


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--only", choices=sorted(CASES), help="a single case")
    parser.add_argument("--repetitions", type=int, default=MIN_REPETITIONS, help="measured turns of each (5)")
    arguments = parser.parse_args()
    if arguments.repetitions < MIN_REPETITIONS:
        parser.error(f"a median of fewer than {MIN_REPETITIONS} says little")
    before = setting()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        found = figures(progress, arguments.only, arguments.repetitions)
    says = [figure.goal.says(figure.value.median) if figure.goal else "" for figure in found]
    reached = [{**asdict(figure), "reached": word} for figure, word in zip(found, says, strict=True)]
    print(json.dumps({"setting": before, "figures": reached}, indent=2))


if __name__ == "__main__":
    main()
