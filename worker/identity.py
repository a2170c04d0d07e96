"""Who this worker is, and whether it lives: three small files in its state folder.

enrol-key   made once; tells two workers of one name apart
lock        held while a worker runs, so that two never share a folder
alive       touched after every answer of the coordinator
"""

import fcntl
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from common.failpoints import reach
from common.transfer import sweep_parts, write_durably

_ENROL_KEY = "enrol-key"
_LOCK = "lock"
_ALIVE = "alive"
_KEY_FORM = re.compile(r"[0-9a-f-]{36}")


def client_id_of(name: str) -> str:
    """The configured name, or the host's."""
    return name or socket.gethostname()


def enrol_key_of(state_dir: Path) -> str:
    """The key that this state folder enrols with; made and made durable at the first call.

    Raises ConfigError if the file holds something else.
    """
    path = state_dir / _ENROL_KEY
    if not path.exists():
        # The umask only ever takes rights away, so the file is never readable by others, not even for a moment.
        previous = os.umask(0o077)
        try:
            write_durably(path, f"{uuid.uuid4()}\n".encode())
        finally:
            os.umask(previous)
        reach("key.made")
    key = path.read_text(encoding="utf-8").strip()
    if not _KEY_FORM.fullmatch(key):
        raise ConfigError(f"{path}: not an enrolment key; delete it to enrol anew under another name")
    return key


@contextmanager
def holding(state_dir: Path) -> Iterator[None]:
    """Keeps every other worker out of this state folder. Raises ConfigError if one is inside or it cannot be used."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        reach("site.made")
        descriptor = os.open(state_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir: {state_dir} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"state_dir: {state_dir} is in use by another worker; each needs a folder of its own"
        ) from None
    try:
        sweep_parts(state_dir)
        yield
    finally:
        os.close(descriptor)


def touch_alive(state_dir: Path, now: float) -> None:
    """Notes that the coordinator has just answered; `now` in seconds since the epoch, by this machine's clock."""
    path = state_dir / _ALIVE
    path.touch()
    reach("alive.touched")
    os.utime(path, (now, now))


def is_alive(state_dir: Path, max_age_seconds: float, now: float) -> bool:
    """Whether the coordinator answered this worker within the last `max_age_seconds`, for a health check."""
    try:
        return now - (state_dir / _ALIVE).stat().st_mtime <= max_age_seconds
    except FileNotFoundError:
        return False
