"""Processes that play runs, one at a time each: torch is loaded once a process, and a process that dies loses one run.

They are started afresh (spawn), let Ctrl-C be the parent's business, and write what they have to say to a log of
their own. A pipe to each is the only queue: it is bounded, and its end tells of a death. What it carries comes from our
own processes on this machine alone (decision 0011).
"""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from common.errors import ConfigError, RafloraError
from simulation.experiment import ExperimentConfig
from simulation.results import RunRow
from simulation.run import Progress
from simulation.schedule import RunPlan

LISTEN_SECONDS = 0.5  # between two looks at whether anybody has spoken
LOAD_SECONDS = 180.0  # that torch gets to be loaded on a busy machine
END_SECONDS = 5.0  # that a process gets to end before it is killed
# That a process may say nothing about its order before it is given up. It tells of every client and every batch of
# texts; the longest silences are a model's download and an evaluation on a large test set.
SILENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Place:
    """Where an experiment lies and where its results go."""

    experiment_folder: Path  # in which the experiment's file is
    folder: Path  # of the results
    cache: Path  # of encoded texts, shared by experiments

    def of_run(self, plan: RunPlan) -> Path:
        """One run's folder."""
        key = plan.key
        return self.folder / "runs" / key.stage / f"{key.arm}_{key.learning_rate!r}_{key.decay}_{key.seed}"

    def base_of(self, experiment: ExperimentConfig) -> Path:
        """Where a base model goes that is made for this model and data."""
        return self.folder / "base" / material_of(experiment)


@dataclass(frozen=True)
class Prepare:
    """Told to a process: make ready what the experiment trains on."""

    experiment: ExperimentConfig


Order: TypeAlias = Prepare | RunPlan


@dataclass(frozen=True)
class Encoded:
    """Told by a process: so many texts of so many."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Told by a process: what was to be prepared is."""


@dataclass(frozen=True)
class Failed:
    """Told by a process, or found because it said nothing more: its order could not be carried out."""

    sentence: str


News: TypeAlias = Encoded | Progress | Ready | RunRow | Failed


@dataclass(eq=False)
class Member:
    """One process and what it is doing."""

    process: BaseProcess
    connection: Connection
    log: Path
    order: Order | None = None
    heard: float = 0.0  # when it last said something, or was given its order, on the monotonic clock

    def give(self, order: Order) -> None:
        """The next thing to do; the last one must be done."""
        assert self.order is None, "one order at a time"  # noqa: S101
        self.order, self.heard = order, time.monotonic()
        with suppress(OSError):  # it has died meanwhile: the end of its pipe will say so
            self.connection.send(order)


@dataclass
class Crew:
    """Up to `size` processes. Use as a context: at its end none is left."""

    place: Place
    size: int
    silence_seconds: float = SILENCE_SECONDS
    members: list[Member] = field(default_factory=list)
    started: int = 0  # processes in all: each has a log of its own, also one that replaces another

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.process.terminate()
        for member in self.members:
            _end(member)
        self.members = []

    def idle(self) -> Member | None:
        """A process without an order, a new one if there may be more; None if all are busy."""
        for member in self.members:
            if member.order is None:
                return member
        if len(self.members) < self.size:
            self.members.append(_start(self.place, self.started))
            self.started += 1
            return self.members[-1]
        return None

    def news(self) -> Iterator[tuple[Order, News]]:
        """What was said since the last call, with the order it is about; waits a moment for the first.

        A process that has died, or has been silent for too long, has failed at its order and is gone.
        """
        by_connection = {member.connection: member for member in self.members if member.order is not None}
        for connection in wait(list(by_connection), timeout=LISTEN_SECONDS):
            member = by_connection[connection]  # type: ignore[index]
            order = member.order
            assert order is not None, "only those with an order are listened to"  # noqa: S101
            member.heard = time.monotonic()
            try:
                said: News = member.connection.recv()
            except (EOFError, OSError):
                self._part_with(member)
                said = Failed(f"its process ended with exit code {member.process.exitcode}; see {member.log}")
            if not isinstance(said, Encoded | Progress):
                member.order = None
            yield order, said
        yield from self._silent()

    def _silent(self) -> Iterator[tuple[Order, News]]:
        for member in list(self.members):
            silence = time.monotonic() - member.heard
            if member.order is not None and silence > self.silence_seconds and not member.connection.poll():
                member.process.kill()
                self._part_with(member)
                sentence = f"its process said nothing for {silence:.0f} s and was ended; see {member.log}"
                yield member.order, Failed(sentence)

    def _part_with(self, member: Member) -> None:
        self.members.remove(member)
        _end(member)


def material_of(experiment: ExperimentConfig) -> str:
    """Names the model and the data alike for experiments that train on the same."""
    clients = experiment.clients.model_dump_json(include={"group_column", "groups_file"})
    content = experiment.model.model_dump_json() + experiment.data.model_dump_json() + clients
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def sees_gpu() -> bool:
    """Whether torch has a GPU, asked in a process of its own. Raises ConfigError if that cannot be told."""
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"torch could not be loaded within {LOAD_SECONDS:.0f} s") from None
    if answer.returncode not in (0, 3):
        raise ConfigError(f"torch cannot be loaded: {answer.stderr.strip().splitlines()[-1:]}")
    return answer.returncode == 0


def _start(place: Place, number: int) -> Member:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    log = place.folder / "logs" / f"process-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_work, args=(there, place, log), daemon=True, name=f"simulate-{number}")
    # A signal that is ignored here is ignored there from the first instruction on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    there.close()
    return Member(process, here, log)


def _end(member: Member) -> None:
    member.connection.close()
    member.process.join(END_SECONDS)
    if member.process.is_alive():
        member.process.kill()
        member.process.join(END_SECONDS)


def _work(connection: Connection, place: Place, log: Path) -> None:
    """The life of a process: order after order until the parent goes."""
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    performer = _Performer(connection, place)
    try:
        while True:
            connection.send(performer.carry_out(connection.recv()))
    except (EOFError, OSError):
        return  # the parent has gone; what a run has written is there for the next one


class _Performer:
    """Carries out orders, and keeps what is prepared for the next."""

    def __init__(self, connection: Connection, place: Place) -> None:
        self._connection = connection
        self._place = place
        self._material = ""  # what is prepared
        self._prepared: Any = None
        self._work: Any = None  # the model, loaded for ranks up to _work_rank
        self._work_rank = 0

    def carry_out(self, order: Order) -> News:
        """Whatever goes wrong is the order's end, not the process's."""
        try:
            if isinstance(order, Prepare):
                self._prepare(order.experiment)
                return Ready()
            return self._play(order)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            return self._failed(f"{error.filename or 'a file'}: {error.strerror or error}")
        except RafloraError as error:
            return self._failed(str(error))
        except Exception as error:  # one run's defect must not cost the others
            return self._failed(f"{type(error).__name__}: {error}")

    def _prepare(self, experiment: ExperimentConfig) -> None:
        material = material_of(experiment)
        if material == self._material:
            return
        # Seconds, which only this process pays; and one thread each, for there are several of it.
        import threadpoolctl  # noqa: PLC0415
        import torch  # noqa: PLC0415

        from simulation.prepare import Files, prepare  # noqa: PLC0415
        from worker.trainer.quiet import silence_libraries  # noqa: PLC0415

        torch.set_num_threads(1)
        threadpoolctl.threadpool_limits(1)
        silence_libraries()
        files = Files(self._place.experiment_folder, self._place.cache, self._place.base_of(experiment))
        self._prepared = prepare(experiment, files, self._encoded)
        self._material, self._work, self._work_rank = material, None, 0

    def _play(self, plan: RunPlan) -> RunRow:
        self._prepare(plan.experiment)
        from simulation.play import play  # noqa: PLC0415 - torch, see above
        from simulation.torch_work import load_work  # noqa: PLC0415

        rank = max(plan.experiment.clients.ranks)
        if rank > self._work_rank:
            self._work, self._work_rank = load_work(self._prepared, lora_rank=rank), rank
        return play(plan, self._prepared, self._place.of_run(plan), self._connection.send, self._work)

    def _encoded(self, done: int, total: int) -> None:
        self._connection.send(Encoded(done, total))

    def _failed(self, sentence: str) -> Failed:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        return Failed(sentence)
