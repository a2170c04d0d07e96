"""`make kills SEED=7 KILLS=1000`: many kills, a progress bar, and what they showed."""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults.kills import Campaign, DisturbedByItself, Outcome, nursery
from faults.schedule import COORDINATOR
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def main() -> int:
    """Exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="make kills", description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="the same seed kills the same processes at the same steps")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = parser.parse_args()
    console = Console(stderr=asked.format == "json")
    folder = Path(tempfile.mkdtemp(prefix="raflora-kills-"))
    console.print(f"seed {asked.seed}, {asked.kills} kills, in {folder}")
    started = time.perf_counter()
    campaign, broken = asyncio.run(_run(asked.seed, asked.kills, folder, console))
    report = report_of(campaign, time.perf_counter() - started)
    report["breaches"] = broken + report["breaches"]
    if report["breaches"]:
        console.print(f"what the broken federation left is in {folder}")
    else:
        shutil.rmtree(folder)
    if asked.format == "json":
        print(json.dumps(report, indent=2))
    else:
        _show(report, console)
    return 1 if report["breaches"] else 0


async def _run(seed: int, kills: int, folder: Path, console: Console) -> tuple[Campaign, list[str]]:
    """The campaign, and what was broken before anybody was killed."""
    async with nursery() as place:
        campaign = Campaign(place, folder, seed)
        with Progress(console=console) as progress:
            bar = progress.add_task("kills", total=kills)

            def advance(outcome: Outcome) -> None:
                progress.advance(bar, len(outcome.kills))

            try:
                await campaign.run(kills, advance)
            except DisturbedByItself as error:
                return campaign, [str(error)]
    return campaign, []


def report_of(campaign: Campaign, seconds: float) -> dict[str, Any]:
    """Everything, as JSON has it."""
    outcomes = campaign.outcomes
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    recoveries = sorted(second for outcome in outcomes for second in outcome.recovery_seconds)
    reached: Counter[str] = sum((outcome.reached for outcome in outcomes), Counter())
    killed_at = Counter(kill.step for kill in kills)
    return {
        "seed": campaign.seed,
        "kills": len(kills),
        "of_the_coordinator": sum(kill.key == COORDINATOR for kill in kills),
        "federations": len(outcomes),
        "acknowledged": sum(outcome.receipts for outcome in outcomes),
        "seconds": round(seconds, 1),
        "recovery_seconds": {"median": _at(recoveries, 0.5), "p99": _at(recoveries, 0.99)},
        "kills_at": dict(sorted(killed_at.items())),
        "steps_killed_at": len(killed_at),
        "steps_reached": len(reached.keys() | killed_at.keys()),
        "reached_but_never_killed_at": sorted(reached.keys() - killed_at.keys()),
        "breaches": [breach for outcome in outcomes for breach in outcome.breaches],
        "replay": f"make kills SEED={campaign.seed} KILLS={len(kills) + 1}",
    }


def _at(ordered: list[float], share: float) -> float | None:
    if len(ordered) < 2:
        return ordered[0] if ordered else None
    return round(statistics.quantiles(ordered, n=100, method="inclusive")[round(share * 100) - 1], 3)


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("step", "kills", title=f"{report['kills']} kills in {report['seconds']} s")
    for step, count in report["kills_at"].items():
        table.add_row(step, str(count))
    console.print(table)
    coordinators = report["of_the_coordinator"]
    console.print(
        f"killed at {report['steps_killed_at']} of {report['steps_reached']} steps that were reached; "
        f"{coordinators} kills of the coordinator, {report['kills'] - coordinators} of workers"
    )
    console.print(f"reached, but nobody was killed there: {', '.join(report['reached_but_never_killed_at']) or 'none'}")
    recovery = report["recovery_seconds"]
    console.print(f"the coordinator answers again after {recovery['median']} s (median), {recovery['p99']} s (p99)")
    console.print(f"{report['acknowledged']} results were acknowledged in {report['federations']} federations")
    if report["breaches"]:
        for breach in report["breaches"]:
            console.print(f"[red]broken:[/red] {breach}", highlight=False)
        console.print(f"again: {report['replay']}")
    else:
        console.print("[green]nothing was lost, nothing counted twice, every adapter byte-identical, nobody helped")


if __name__ == "__main__":
    sys.exit(main())
