"""Room on the state folder's disk: how much is used, and whether another upload may begin.

What was announced and is still to arrive counts as used, so uploads that began together cannot fill the disk together.
Nothing here writes, deletes or waits; the folder is walked at most every MEASURE_SECONDS, never for each call.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from common.errors import TooBusy

MEASURE_SECONDS = 30.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Room:
    """What there is, in bytes."""

    used_bytes: int  # by the state folder
    free_bytes: int  # on its disk, for us
    awaited_bytes: int = 0  # announced by open uploads and not here yet


@dataclass(frozen=True)
class DiskLimits:
    """What the operator allows; see [limits] in the configuration."""

    disk_bytes: int | None = None
    min_free_bytes: int = 0


def refusal_of(limits: DiskLimits, room: Room, size_bytes: int) -> str:
    """Why so many more bytes must not come, with the numbers; empty if they may."""
    wanted = room.awaited_bytes + size_bytes
    if limits.disk_bytes is not None and room.used_bytes + wanted > limits.disk_bytes:
        return (
            f"the state folder holds {_human(room.used_bytes)}, open uploads will bring {_human(room.awaited_bytes)} "
            f"and this one {_human(size_bytes)}, but limits.disk_bytes is {_human(limits.disk_bytes)}"
        )
    if room.free_bytes - wanted < limits.min_free_bytes:
        return (
            f"the disk has {_human(room.free_bytes)} left, open uploads will take {_human(room.awaited_bytes)} and "
            f"this one {_human(size_bytes)}, but limits.min_free_bytes keeps {_human(limits.min_free_bytes)} free"
        )
    return ""


class Disk:
    """The room of one state folder. Safe to call from several threads."""

    def __init__(
        self,
        folder: Path,
        limits: DiskLimits = DiskLimits(),
        *,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._folder = folder
        self._limits = limits
        self._clock = clock
        self._free_bytes = free_bytes or _free_bytes
        self._lock = threading.Lock()
        self._awaited: dict[str, int] = {}  # by the upload's owner
        self._measured_at = -float("inf")
        self._used_bytes = 0
        self._arrived_bytes = 0  # since it was measured
        self.refusal = ""  # the newest one; empty again once an upload may begin

    def reserve(self, owner: str, size_bytes: int, whose: str) -> None:
        """Keeps room for what an upload will still bring, in place of what its owner reserved before.

        Raises TooBusy, with the numbers; then nothing is kept for it.
        """
        self._measure_if_old()
        with self._lock:
            self._awaited.pop(owner, None)
            if not size_bytes:
                return
            self.refusal = refusal_of(self._limits, self._room(), size_bytes)
            if not self.refusal:
                self._awaited[owner] = size_bytes
                return
            refusal = self.refusal
        log.warning("upload refused for lack of room", whose=whose, why=refusal)
        raise TooBusy(f"{whose}: no room for this upload: {refusal}; try again later")

    def arrived(self, owner: str, size_bytes: int) -> None:
        """Notes bytes that were awaited and are here."""
        with self._lock:
            left = self._awaited.get(owner, 0) - size_bytes
            self._arrived_bytes += size_bytes
            if left > 0:
                self._awaited[owner] = left
            else:
                self._awaited.pop(owner, None)

    def release(self, owner: str) -> None:
        """Forgets what was reserved: the upload is complete, replaced or given up."""
        with self._lock:
            self._awaited.pop(owner, None)

    def room(self) -> Room:
        """What there is now, without a walk: what arrived since the last one is added to it."""
        with self._lock:
            return self._room()

    def measure(self) -> None:
        """Walks the folder. Blocking; call it after a sweep."""
        used = _bytes_below(self._folder)
        with self._lock:
            self._used_bytes, self._arrived_bytes, self._measured_at = used, 0, self._clock()

    def _room(self) -> Room:
        return Room(self._used_bytes + self._arrived_bytes, self._free_bytes(self._folder), sum(self._awaited.values()))

    def _measure_if_old(self) -> None:
        if self._clock() - self._measured_at >= MEASURE_SECONDS:
            self.measure()


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _bytes_below(folder: Path) -> int:
    """The sizes of all files; a file with two names (a completed upload that is a blob too) counts once."""
    seen: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.stat(os.path.join(path, name), follow_symlinks=False)
            except FileNotFoundError:
                continue  # swept meanwhile
            seen[(found.st_dev, found.st_ino)] = found.st_size
    return sum(seen.values())


def _human(size_bytes: int) -> str:
    if size_bytes < 1 << 20:
        return f"{size_bytes} bytes"
    return f"{size_bytes / (1 << 20):.1f} MiB" if size_bytes < 1 << 30 else f"{size_bytes / (1 << 30):.2f} GiB"
