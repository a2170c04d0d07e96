"""The egress report: one line for everything that leaves this site, written before it leaves.

A site can prove from this file what it sent; nothing is sent that does not stand in it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

REPORT = "egress.jsonl"


@dataclass(frozen=True)
class Departure:
    """What leaves in one task. Of an evaluation or a failure no factors leave, so there the bytes are 0."""

    kind: str  # "update", "evaluation" or "failure"
    round: int
    attempt: int
    digest: str
    size_bytes: int
    num_tensors: int
    dtype: str
    lora_rank: int
    num_examples: int
    metrics: Mapping[str, float]
    words: str = ""  # of a failure: the reason and what is told of it


def record(state_dir: Path, departure: Departure, *, time: str) -> None:
    """Appends one line and makes it durable; `time` is the site's own, ISO 8601."""
    line = json.dumps({"time": time, **asdict(departure)}, sort_keys=True, allow_nan=False) + "\n"
    descriptor = os.open(state_dir / REPORT, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
