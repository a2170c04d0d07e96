"""What a process holds, as the kernel counts it (/proc); Linux only, nothing to install."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Usage:
    """One look at one process."""

    rss_bytes: int  # resident: private memory and mapped files
    anonymous_bytes: int  # of it, memory of its own
    peak_bytes: int  # the largest rss since the last forget_peak
    handles: int  # open file descriptors
    threads: int
    cpu_seconds: float  # user and system


@dataclass
class Peaks:
    """The largest values seen by `watching`."""

    rss_bytes: int = 0
    anonymous_bytes: int = 0  # of it, memory of its own
    children_rss_bytes: int = 0  # of all processes that it started, together
    handles: int = 0
    threads: int = 0
    samples: int = field(default=0, repr=False)


def usage_of(pid: int) -> Usage:
    """Raises FileNotFoundError or ProcessLookupError if the process is gone."""
    folder = Path("/proc") / str(pid)
    said = _status(folder)
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return Usage(
        rss_bytes=_bytes(said, "VmRSS"),
        anonymous_bytes=_bytes(said, "RssAnon"),
        peak_bytes=_bytes(said, "VmHWM"),
        handles=len(os.listdir(folder / "fd")),
        threads=int(said["Threads"]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
    )


def forget_peak(pid: int) -> None:
    """Lets the kernel count the peak anew, from now on."""
    (Path("/proc") / str(pid) / "clear_refs").write_text("5")


def children_of(pid: int) -> list[int]:
    """The processes that it started and that still run, and theirs."""
    found: list[int] = []
    for thread in (Path("/proc") / str(pid) / "task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in thread.read_text().split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


@asynccontextmanager
async def watching(pid: int) -> AsyncIterator[Peaks]:
    """The largest values while the context is open, sampled ten times a second; it ends with the process."""
    peaks = Peaks()
    watching = asyncio.create_task(_watch(pid, peaks))
    try:
        yield peaks
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _watch(pid: int, peaks: Peaks) -> None:
    with suppress(OSError):
        while True:
            now = usage_of(pid)
            peaks.rss_bytes = max(peaks.rss_bytes, now.rss_bytes)
            peaks.anonymous_bytes = max(peaks.anonymous_bytes, now.anonymous_bytes)
            peaks.children_rss_bytes = max(peaks.children_rss_bytes, sum(_rss_of(children_of(pid))))
            peaks.handles, peaks.threads = max(peaks.handles, now.handles), max(peaks.threads, now.threads)
            peaks.samples += 1
            await asyncio.sleep(_SAMPLE_SECONDS)


def _rss_of(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        with suppress(OSError, KeyError):  # it may have ended meanwhile
            yield _bytes(_status(Path("/proc") / str(pid)), "VmRSS")


def _status(folder: Path) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {name: value.strip() for name, value in pairs}


def _bytes(status: dict[str, str], name: str) -> int:
    return int(status[name].removesuffix("kB")) * 1024
