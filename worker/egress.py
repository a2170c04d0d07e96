"""The egress report: one line for everything that leaves this site about its model and data, before it leaves.

Listed are every enrolment, every result and every failure that is told. Not listed is what keeps the line open: the
handshake and the polls (this worker's name, key and software version), and the heartbeats of a task, which hold its
activity in a word, the step, the number of steps and the training loss of that step.

Beside it lies the list of what was refused, and from the report itself is counted what has left so far.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.failpoints import reach

REPORT = "egress.jsonl"
REFUSALS = "refusals.jsonl"
_RESULTS = ("update", "evaluation")
_DAY = timedelta(days=1)


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


@dataclass(frozen=True)
class Refusal:
    """What this worker was asked for and did not do."""

    reason: str  # "policy_refused", "invalid_request", ...
    words: str
    round: int = 0  # 0: before any round
    attempt: int = 0


@dataclass(frozen=True)
class Spent:
    """How many results have left this site."""

    updates: int = 0
    evaluations: int = 0
    last_day: int = 0  # of both, within 24 hours


def record(state_dir: Path, departure: Departure, *, time: str) -> None:
    """Appends one line and makes it durable; `time` is the site's own, ISO 8601."""
    _append(state_dir / REPORT, {"time": time, **asdict(departure)})


def record_refusal(state_dir: Path, refusal: Refusal, *, time: str) -> None:
    """The same for what was refused. Nothing leaves because of it."""
    _append(state_dir / REFUSALS, {"time": time, **asdict(refusal)})


class Ledger:
    """Counts what has left from the report, reading only what was added since the last time."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / REPORT
        self._read_bytes = 0
        self._counts: Counter[str] = Counter()
        self._times: deque[datetime] = deque()

    def spent(self, now_seconds: float) -> Spent:
        """What has left until now, in seconds since the epoch.

        A line that a crash tore counts as a result of either kind, of today: it may have been one.
        """
        now = datetime.fromtimestamp(now_seconds, UTC)
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                for line in file:
                    self._count(line, now)
                self._read_bytes = file.tell()
        while self._times and self._times[0] <= now - _DAY:
            self._times.popleft()
        return Spent(self._counts["update"], self._counts["evaluation"], len(self._times))

    def _count(self, line: bytes, now: datetime) -> None:
        try:
            entry = json.loads(line)
            kinds, time = {entry["kind"]}, datetime.fromisoformat(entry["time"])
        except (ValueError, KeyError, TypeError):
            kinds, time = set(_RESULTS), now
        counted = kinds.intersection(_RESULTS)
        if counted:
            self._counts.update(counted)
            self._times.append(time)


def _append(path: Path, entry: Mapping[str, object]) -> None:
    line = json.dumps(entry, sort_keys=True, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        reach("egress.writing")
        file.write(line)
        file.flush()
        reach("egress.written")
        os.fsync(file.fileno())
    reach("egress.synced")
