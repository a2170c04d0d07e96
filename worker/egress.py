"""The egress report: one line for everything that leaves this site about its model and data, before it leaves.

Listed are every enrolment, every result and every failure that is told. Not listed is what keeps the line open: the
handshake and the polls (this worker's name, key and software version), and the heartbeats of a task, which hold its
activity in a word, the step, the number of steps and the training loss of that step.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPORT = "egress.jsonl"


@dataclass(frozen=True)
class Departure:
    """What leaves at one time. Only an update holds factors; of everything else the bytes are 0."""

    kind: str  # "join", "update", "evaluation" or "failure"
    round: int = 0
    attempt: int = 0
    digest: str = ""  # of a join: the base model's
    size_bytes: int = 0
    num_tensors: int = 0  # of a join: how many shapes are told
    dtype: str = ""
    lora_rank: int = 0  # of a join: the largest that is offered
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    words: str = ""  # of a failure: the reason and what is told of it; of a join: the device and its memory


def record(state_dir: Path, departure: Departure, *, time: str) -> None:
    """Appends one line and makes it durable; `time` is the site's own, ISO 8601."""
    line = json.dumps({"time": time, **asdict(departure)}, sort_keys=True, allow_nan=False) + "\n"
    descriptor = os.open(state_dir / REPORT, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
