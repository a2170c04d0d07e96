"""What one worker remembers of the coordinator's promises, durable the moment it is told: a file of JSON lines.

The worker itself knows nothing of it; the harness compares the notes with the journal.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Note:
    """One thing that the coordinator said, or did wrong."""

    kind: Literal["task", "committed", "receipt", "breach"]
    client: str
    task: str = ""  # train or evaluate
    round: int = 0
    attempt: int = 0
    lease: int = 0
    digest: str = ""
    number: int = 0  # of a receipt: examples; of what is committed: bytes
    sentence: str = ""  # of a breach

    @property
    def which(self) -> tuple[str, int, int]:
        """The task that it is about."""
        return self.task, self.round, self.attempt


class Notebook:
    """The notes of one worker."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.notes = list(read_notes(file))

    def write(self, note: Note) -> None:
        """Durable when it returns."""
        self.notes.append(note)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(asdict(note)).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_notes(file: Path) -> Iterator[Note]:
    """The notes of a file, in order; none if it is not there. A last line that is not whole was never a note."""
    if file.exists():
        for line in file.read_bytes().split(b"\n")[:-1]:
            yield Note(**json.loads(line))
