"""Measures what bytes and rounds cost, and tells."""

import argparse
import json
import os
import sys
from dataclasses import asdict

from benchmarks.interleaved import MIN_REPETITIONS
from benchmarks.transfer.parts import PARTS, figures
from common.memory import keep_memory_flat


def _say(what: str) -> None:
    sys.stderr.write(f"\r\033[K{what}")
    sys.stderr.flush()


def main() -> None:
    """Parses the arguments, measures, tells."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--only", choices=tuple(PARTS), help="one part")
    parser.add_argument("--repetitions", type=int, default=MIN_REPETITIONS)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    os.nice(5)
    keep_memory_flat()  # as a worker's agent does it, whose part this process plays
    found = figures(_say, arguments.only, arguments.repetitions)
    _say("")
    if arguments.format == "json":
        sys.stdout.write(json.dumps([asdict(figure) for figure in found], indent=1) + "\n")
        return
    for figure in found:
        value, verdict = figure.value, figure.goal.says(figure.value.median) if figure.goal else ""
        sys.stdout.write(
            f"{figure.name:<70} {value.median:9.3f} {figure.unit:<12} [{value.low:.3f} to {value.high:.3f}] {verdict}\n"
        )


if __name__ == "__main__":
    main()
