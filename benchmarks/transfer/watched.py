"""A real coordinator that watches its own event loop: `python -m benchmarks.transfer.watched OUT SETTINGS`.

It is `raflora coordinator` with one task more: it asks to be woken every few milliseconds and notes how late it was.
What it noted, the largest lateness of every tenth of a second, is appended to the file OUT.
"""

import asyncio
import sys
import time
from pathlib import Path

from cli.coordinator import coordinator

NAP_SECONDS = 0.002
_WINDOW_SECONDS = 0.1


async def watch(out: Path) -> None:
    """Until cancelled: a line a window, when it ended (monotonic) and how late it was at worst, in seconds."""
    loop = asyncio.get_running_loop()
    with out.open("w", buffering=1) as file:
        while True:
            ends_at, worst = loop.time() + _WINDOW_SECONDS, 0.0
            while loop.time() < ends_at:
                due = loop.time() + NAP_SECONDS
                await asyncio.sleep(NAP_SECONDS)
                worst = max(worst, loop.time() - due)
            file.write(f"{time.monotonic():.3f} {worst:.6f}\n")


def lateness(out: Path, since: float, until: float) -> list[float]:
    """The worst of every window between two moments, in seconds."""
    lines = [line.split() for line in out.read_text().splitlines()]
    return [float(line[1]) for line in lines if len(line) == 2 and since <= float(line[0]) <= until]


async def _run(out: Path, settings: Path) -> None:
    watching = asyncio.create_task(watch(out))
    try:
        await coordinator(config=settings)
    finally:
        watching.cancel()


if __name__ == "__main__":
    asyncio.run(_run(Path(sys.argv[1]), Path(sys.argv[2])))
