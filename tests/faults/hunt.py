"""How many seeded kills find each planted bug: `make hunt SEED=99`. Nothing tells the seed where the bugs are."""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from faults.kills import Campaign, Nursery, Setting, nursery
from faults.planted import BUGS
from rich.console import Console

STUCK_SECONDS = 20.0  # a bug may be that nothing goes on


@dataclass(frozen=True)
class Catch:
    """What came of one bug."""

    bug: str
    kills: int
    seconds: float
    breach: str  # empty: it was not found

    def __str__(self) -> str:
        found = f"found after {self.kills} kills" if self.breach else f"NOT found in {self.kills} kills"
        return f"{self.bug:42} {found}, {self.seconds:.0f} s  {self.breach[:80]}"


def main() -> int:
    """Exit status 1 if a bug was not found."""
    parser = argparse.ArgumentParser(prog="make hunt", description=__doc__)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--kills", type=int, default=200, help="at most, for each bug")
    parser.add_argument("bugs", nargs="*", metavar="BUG", help="all if none is named")
    asked = parser.parse_args()
    return asyncio.run(_hunt(asked.seed, asked.kills, asked.bugs or list(BUGS), Console(markup=False, highlight=False)))


async def _hunt(seed: int, kills: int, bugs: list[str], console: Console) -> int:
    missed = 0
    with tempfile.TemporaryDirectory(prefix="raflora-hunt-") as folder:
        async with nursery() as place:
            for bug in bugs:
                catch = await _look_for(bug, place, Path(folder), seed, kills)
                missed += not catch.breach
                console.print(str(catch), soft_wrap=True)
    return 1 if missed else 0


async def _look_for(bug: str, place: Nursery, folder: Path, seed: int, kills: int) -> Catch:
    started = time.perf_counter()
    campaign = Campaign(place, folder, seed, Setting(stuck_seconds=STUCK_SECONDS, bug=bug))
    await campaign.run(kills)
    breaches = [breach for outcome in campaign.outcomes for breach in outcome.breaches]
    return Catch(bug, campaign.kills, time.perf_counter() - started, breaches[0] if breaches else "")


if __name__ == "__main__":
    sys.exit(main())
