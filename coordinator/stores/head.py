"""How far a journal was when it last answered: a small file beside the database, so that a lost end is noticed.

SQLite takes a damaged frame of its write-ahead log for the end of the log: one flipped byte would silently take every
later commit along (docs/decisions/0012). The file has two slots that are written in turn, so a torn write leaves the
other one. It is never ahead of the journal, and it never says what an entry holds.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from common.errors import CorruptStore
from common.failpoints import reach
from common.transfer import named_failures, write_durably

_SLOT_BYTES = 512  # a sector: written whole or not at all
_SLOTS = 2

log = structlog.get_logger()


@dataclass(frozen=True)
class Head:
    """The newest entry of a federation whose commit has succeeded."""

    sequence: int
    checksum: str  # of that entry; it covers all entries before


class HeadFile:
    """The head of one federation's journal."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> Head | None:
        """The newest head that is whole, or None without a file. Raises CorruptStore if no slot is whole."""
        slots = self._slots()
        whole = [head for head in slots if head is not None]
        if slots and not whole:
            raise CorruptStore(
                f"{self._file}: neither slot is what was written; if the journal beside it is known to be whole, "
                "remove this file and start again"
            )
        if len(whole) < len(slots):
            log.warning("one of two slots is not what was written; the other one is used", file=str(self._file))
        return max(whole, key=lambda head: head.sequence, default=None)

    def prepare(self, head: Head) -> None:
        """Makes the file durable if it is missing, so that `advance` needs no room. Raises TooBusy, StorageFailed."""
        if not self._file.is_file():
            write_durably(self._file, _slot(head) * _SLOTS, mode=0o600)  # like the database beside it

    def advance(self, head: Head) -> None:
        """Notes a commit that has succeeded. No fsync: after a power cut the file may be older, never wrong.

        Raises TooBusy, StorageFailed.
        """
        found = [-1 if slot is None else slot.sequence for slot in self._slots()]
        older = found.index(min(found))
        with named_failures(self._file):
            reach("head.writing")
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, _slot(head), older * _SLOT_BYTES)
            finally:
                os.close(descriptor)
        reach("head.written")

    def _slots(self) -> list[Head | None]:
        try:
            with named_failures(self._file):
                content = self._file.read_bytes()
        except FileNotFoundError:
            return []
        return [_head_in(content[i * _SLOT_BYTES : (i + 1) * _SLOT_BYTES]) for i in range(_SLOTS)]


def _slot(head: Head) -> bytes:
    text = f"{head.sequence} {head.checksum}"
    return f"{text} {_digest(text)}\n".encode().ljust(_SLOT_BYTES - 1) + b"\n"


def _head_in(slot: bytes) -> Head | None:
    fields = slot.decode(errors="replace").split()
    if len(fields) != 3 or not fields[0].isdecimal() or _digest(f"{fields[0]} {fields[1]}") != fields[2]:
        return None
    return Head(int(fields[0]), fields[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
