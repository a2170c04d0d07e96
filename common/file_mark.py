"""Whether a file is another one than before: what a look at it says, without reading it."""

from pathlib import Path

Mark = tuple[int, int, int]
NO_FILE: Mark = (0, 0, 0)


def mark_of(path: Path | None) -> Mark:
    """Of a file that was written anew, another; of one that cannot be looked at, NO_FILE."""
    try:
        found = path.stat() if path else None
    except OSError:
        return NO_FILE
    # A file that took another's place has another inode at least.
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else NO_FILE
