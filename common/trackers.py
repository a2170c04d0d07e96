"""Hands numbers to TensorBoard, MLflow and Weights & Biases through their own libraries, each in a thread of its own.

It never holds up, slows or breaks what it watches: what a library cannot take is told once in the log and dropped,
and numbers that come faster than they can be handed on are dropped and counted. Nothing but the numbers, their steps
and the settings named here is given to a library; what the libraries would add by themselves (the host's name, its
load, the program's text, its output) and what they would tell their makers is switched off where they let us.
"""

import contextlib
import json
import logging
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog

from common.errors import ConfigError, RafloraError
from common.settings import quiet_trackers
from common.tracking import TrackingConfig
from common.transfer import write_durably

MAX_WAITING = 10_000  # notes, of a few numbers each
MAX_NAMES = 1000  # of curves in all: who names metrics may not make ever new ones
_MAX_BATCH = 500  # of MLflow's numbers in one call, which takes a thousand
CLOSE_SECONDS = 20.0  # for all libraries together; importing one takes seconds
_RUNS = "tracking.json"
_LONGEST_NAME = 200
_STRANGE = re.compile(r"[^A-Za-z0-9_./ -]")
_KEEPING = threading.Lock()  # of the file that says which runs are ours; each library's thread writes to it
_USER = re.compile(r"//[^/@\s]*@")
_HOW_TO_INSTALL = 'pip install "raflora[tracking]"'

log = structlog.get_logger()


@dataclass(frozen=True)
class Run:
    """What is tracked."""

    project: str  # the federation's name
    name: str
    folder: Path  # keeps which run is ours, so that a restart goes on with it
    settings: Mapping[str, str] = field(default_factory=dict)  # shown beside the curves


class Sink(Protocol):
    """One library's run. Whatever it raises ends the use of it, and nothing else."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers of a step."""
        ...

    def close(self) -> None:
        """Hands on what is still held."""
        ...


def destinations(config: TrackingConfig) -> tuple[str, ...]:
    """Where numbers go, for people; without passwords."""
    found = []
    if config.tensorboard is not None:
        found.append(f"TensorBoard in {config.tensorboard} (this machine)")
    if config.mlflow:
        found.append(f"MLflow at {_without_password(config.mlflow)}")
    if config.wandb:
        found.append(f"Weights & Biases, project {config.wandb}")
    return tuple(found)


def leaves_this_machine(config: TrackingConfig) -> bool:
    """Whether anybody else may see the numbers."""
    return bool(config.wandb) or (bool(config.mlflow) and not _is_here(config.mlflow))


def check_installed(config: TrackingConfig) -> None:
    """Raises ConfigError if a library that the settings name is not here. Imports them: up to some seconds."""
    for name, is_wanted, load in (
        ("tensorboard", config.tensorboard is not None, _load_tensorboard),
        ("mlflow", bool(config.mlflow), _load_mlflow),
        ("wandb", bool(config.wandb), _load_wandb),
    ):
        if is_wanted:
            try:
                load()
            except ImportError as error:
                raise ConfigError(f"tracking.{name} is set, but {error.name} is not here; {_HOW_TO_INSTALL}") from None


class Trackers:
    """The sinks of one run, each with a thread of its own. `note` never blocks and never raises."""

    def __init__(self, open_sinks: Sequence[tuple[str, Callable[[], Sink]]]) -> None:
        self._names: set[str] = set()
        self._names_dropped = 0
        self._hands = [_Hand(name, open_sink) for name, open_sink in open_sinks]

    @classmethod
    def of(cls, config: TrackingConfig, run: Run) -> "Trackers":
        """Those that the settings name; none is the usual case and costs nothing."""
        sinks: list[tuple[str, Callable[[], Sink]]] = []
        if config.tensorboard is not None:
            folder = config.tensorboard
            sinks.append(("tensorboard", lambda: _TensorBoard(folder / run.name)))
        if config.mlflow:
            sinks.append(("mlflow", lambda: _MLflow(config.mlflow, run)))
        if config.wandb:
            sinks.append(("wandb", lambda: _WandB(config.wandb, run)))
        return cls(sinks)

    @property
    def dropped(self) -> int:
        """Notes that came faster than they could be handed on, and numbers of names too many."""
        return self._names_dropped + sum(hand.dropped for hand in self._hands)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name; what is not finite is left out."""
        if not self._hands:
            return
        finite = {self._known(name): float(value) for name, value in values.items() if math.isfinite(value)}
        finite.pop("", None)
        if finite:
            for hand in self._hands:
                hand.take(step, finite)

    def _known(self, name: str) -> str:
        """The name as every library takes it; empty for one too many."""
        plain = _STRANGE.sub("_", name)[:_LONGEST_NAME].replace("..", "__").strip("/ ")
        if plain not in self._names:
            if len(self._names) >= MAX_NAMES:
                self._names_dropped += 1
                return ""
            self._names.add(plain)
        return plain

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Waits for what is still to be handed on, but not for ever: so long for all libraries together."""
        until = time.monotonic() + timeout_seconds
        for hand in self._hands:
            hand.finish()
        for hand in self._hands:
            hand.wait(until - time.monotonic())
        if self.dropped or any(hand.is_busy for hand in self._hands):
            waiting = sum(hand.still_waiting for hand in self._hands)
            log.warning("tracking is incomplete", dropped=self.dropped, still_waiting=waiting)


class _Hand:
    """Hands the notes of a run to one library, so that a slow or dead one holds up none of the others."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name = name
        self._open_sink = open_sink
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._is_over = threading.Event()  # nothing more will be noted
        self.dropped = 0
        self._thread = threading.Thread(target=self._hand_on, name=f"tracking {name}", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether the library still has something to do; once it has failed it has not."""
        return self._thread.is_alive()

    @property
    def still_waiting(self) -> int:
        """Notes that nobody has taken yet."""
        return sum(note is not None for note in tuple(self._waiting.queue)) if self.is_busy else 0

    def take(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the numbers until the library takes them."""
        if not self.is_busy:
            return
        try:
            self._waiting.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        """Nothing more will be noted."""
        self._is_over.set()
        with contextlib.suppress(queue.Full):  # then the thread need not be woken
            self._waiting.put_nowait(None)

    def wait(self, timeout_seconds: float) -> None:
        """Until the library has all of it; if it hangs, its thread ends with the process."""
        self._thread.join(max(0.0, timeout_seconds))

    def _hand_on(self) -> None:
        try:
            sink = self._open_sink()
            for step, values in self._notes():
                sink.log(step, values)
            sink.close()
        except Exception as error:
            # The libraries raise what they like, the network's errors among it; the run must not notice.
            why = _USER.sub("//", f"{type(error).__name__}: {error}")[:500]
            log.warning("tracking has ended", library=self._name, why=why)

    def _notes(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """All that is noted, in order, until there is nothing left and nothing more will come."""
        while not (self._is_over.is_set() and self._waiting.empty()):
            note = self._waiting.get()
            if note is not None:
                yield note


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._event, self._summary, writer = _load_tensorboard()
        self._writer = writer(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary.Summary(value=scalars)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()  # somebody may be watching

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, uri: str, run: Run) -> None:
        client, self._metric, param = _load_mlflow()
        self._client = client(tracking_uri=uri)
        place = f"mlflow {_without_password(uri)}"
        self._run_id = _runs_in(run.folder).get(place, "")
        if not self._run_id:
            known = self._client.get_experiment_by_name(run.project)
            experiment = known.experiment_id if known else self._client.create_experiment(run.project)
            self._run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
            self._client.log_batch(self._run_id, params=[param(*pair) for pair in run.settings.items()])
            _keep_run(run.folder, place, self._run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        at = int(time.time() * 1000)
        metrics = [self._metric(*pair, at, step) for pair in values.items()]
        for begin in range(0, len(metrics), _MAX_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + _MAX_BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandB:
    def __init__(self, place: str, run: Run) -> None:
        wandb = _load_wandb()
        entity, _, project = place.rpartition("/")
        run_id = _runs_in(run.folder).get(f"wandb {place}", "") or secrets.token_hex(4)
        quiet = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
        quiet["x_save_requirements"] = False
        self._run: Any = wandb.init(
            entity=entity or None,
            project=project or run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            config=dict(run.settings),
            dir=str(run.folder),
            reinit="create_new",
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, silent=True, host="", **quiet
            ),
        )
        _keep_run(run.folder, f"wandb {place}", run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _load_tensorboard() -> tuple[Any, Any, Any]:
    from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415 - an extra
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

    return event_pb2, summary_pb2, EventFileWriter


def _load_mlflow() -> tuple[Any, Any, Any]:
    quiet_trackers()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry; that a server is gone is told once
    from mlflow import MlflowClient  # noqa: PLC0415 - an extra, and seconds
    from mlflow.entities import Metric, Param  # noqa: PLC0415

    return MlflowClient, Metric, Param


def _load_wandb() -> Any:
    quiet_trackers()
    import wandb  # noqa: PLC0415 - an extra

    return wandb


def _is_here(uri: str) -> bool:
    """Whether an MLflow URI is of this machine: a path, a file or a SQLite database; everything else is a server."""
    parts = urlsplit(uri)
    if not parts.scheme:
        return not uri.startswith("databricks")
    return parts.scheme in ("file", "sqlite") and not parts.hostname


def _runs_in(folder: Path) -> dict[str, str]:
    """Which run of which place is ours; what cannot be read begins a new one."""
    try:
        kept = json.loads((folder / _RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(place): str(run) for place, run in kept.items()} if isinstance(kept, dict) else {}


def _keep_run(folder: Path, place: str, run_id: str) -> None:
    try:
        with _KEEPING:
            content = json.dumps({**_runs_in(folder), place: run_id}, indent=2)
            write_durably(folder / _RUNS, content.encode())
    except (OSError, RafloraError) as error:
        log.warning("a restart will begin a new run", place=place, why=str(error))


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.hostname:
        return uri
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=f"{parts.hostname}{port}", query="").geturl()
