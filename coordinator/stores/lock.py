"""One coordinator for one state folder: an exclusive lock that the kernel releases with the process.

It guards one machine. Two coordinators that share a PostgreSQL journal meet in the journal's sequence.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import StateInUse
from common.failpoints import reach

LOCK_FILE = "coordinator.lock"


class StateLock:
    """A held lock. Keep it until the last byte is written; `release` it, or end the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Lets the next coordinator in; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock_state_folder(folder: Path) -> StateLock:
    """Makes the folder if need be and takes it. Raises StateInUse, at once, if another coordinator holds it.

    A forked child would inherit the lock and outlive its parent with it: start helpers with spawn.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # the journal holds enrolment keys; a folder that is there stays as it is
    reach("folder.made")
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StateInUse(
            f"{folder}: another coordinator (process {holder}) holds this state folder; "
            f"stop it, or give this one a state_dir of its own"
        ) from None
    reach("lock.taken")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    reach("lock.written")
    return StateLock(descriptor)
