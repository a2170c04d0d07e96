"""A federation whose processes are killed at chosen steps and started again, until it is over.

`play` runs one; `Campaign` runs one after the other until there were enough kills. What went wrong is in the outcome,
by name; nothing is asserted here.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from coordinators import to_toml
from faults.notes import read_notes
from faults.oracle import FEDERATION, KEEP_ROUNDS, History, breaches_at_the_end, breaches_of_the_dead, read_journal
from faults.roles import Order
from faults.schedule import COORDINATOR, Schedule

from common.failpoints import parse_plan

TESTS = Path(__file__).resolve().parents[1]
RANKS = (2, 2, 4, 4, 8, 8, 16, 16)
WORKERS_SHARE = 0.3  # of the kills of a federation, at most
STUCK_SECONDS = 60.0  # nothing happened for so long: somebody would have to help
PlanOf = Callable[[str, int], str]  # process, its how-manieth life from 0: a plan of failpoints


@dataclass(frozen=True)
class Setting:
    """What kind of federation; the same setting gives the same adapter, whatever happens to it."""

    rounds: int = 20
    ranks: tuple[int, ...] = RANKS
    evaluate_every: int = 5
    stuck_seconds: float = STUCK_SECONDS
    bug: str = ""

    @property
    def ranks_of(self) -> Mapping[str, int]:
        """By client id."""
        return {f"site-{number}": rank for number, rank in enumerate(self.ranks, start=1)}


@dataclass(frozen=True)
class Kill:
    """One that interrupted work."""

    key: str
    life: int
    number: int
    step: str


@dataclass
class Outcome:
    """What became of a federation."""

    kills: list[Kill] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)  # from a coordinator's death until it answers
    worker_recovery_seconds: list[float] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)  # steps
    receipts: int = 0
    history: History = field(default_factory=lambda: History("", ()))
    seconds: float = 0.0


class DisturbedByItself(Exception):
    """A promise was broken although nobody was killed."""


class Nursery:
    """The process that forks the others."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def start(self, order: Order) -> None:
        """Starts a process."""
        self._write(asdict(order))

    def signal(self, key: str, number: int) -> None:
        """Sends it a signal, if it lives."""
        self._write({"key": key, "signal": number})

    async def event(self, seconds: float) -> tuple[str, str, int]:
        """What happened next, to whom, with which exit status. Raises TimeoutError."""
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery ended")
        said = json.loads(line)
        return said["what"], said["key"], said.get("status", 0)

    def _write(self, what: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")


@contextlib.asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """One for many federations; with it end all processes that it started."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "faults.nursery"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=TESTS,
        env=process_environment(),
    )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(STUCK_SECONDS):
            await process.wait()


async def play(place: Nursery, folder: Path, setting: Setting, expected: History | None, plan_of: PlanOf) -> Outcome:
    """One federation from its founding to its end, or to the first breach. An empty plan lets a life go on."""
    federation = _Federation(place, folder, setting, expected, plan_of)
    started = time.perf_counter()
    try:
        await federation.run()
    finally:
        await federation.end()
    federation.outcome.seconds = time.perf_counter() - started
    return federation.outcome


async def undisturbed(place: Nursery, folder: Path, setting: Setting) -> History:
    """What such a federation does if nothing happens to it. Raises DisturbedByItself."""
    outcome = await play(place, folder, setting, None, lambda *_: f"trace={folder / 'trace'}")
    if outcome.breaches:
        raise DisturbedByItself(f"undisturbed, and yet: {outcome.breaches}")
    return outcome.history


class _Federation:
    def __init__(
        self, place: Nursery, folder: Path, setting: Setting, expected: History | None, plan_of: PlanOf
    ) -> None:
        self.outcome = Outcome()
        self._place = place
        self._folder = folder
        self._setting = setting
        self._expected = expected
        self._plan_of = plan_of
        self._lives: Counter[str] = Counter()
        self._plans: dict[str, str] = {}  # of those who live
        self._died_at: dict[str, float] = {}
        write_settings(folder, setting)

    async def run(self) -> None:
        for key in (COORDINATOR, *self._setting.ranks_of):
            self._start(key)
        try:
            while self._plans.keys() - {COORDINATOR} and not self.outcome.breaches:
                await self._next()
            await self._stop_coordinator()
            if not self.outcome.breaches:  # once more, so that it tidies up what the last kill left
                self._start(COORDINATOR, plan="")
                await self._until_ready()
                await self._stop_coordinator()
        except TimeoutError:
            self._breach(f"nothing happened for {self._setting.stuck_seconds:g} s: {self._where()}")
        if not self.outcome.breaches:
            self.outcome.breaches += breaches_at_the_end(self._folder, self._expected)
        self.outcome.history = read_journal(self._folder / "state").history
        notes = [note for file in self._folder.glob("*.notes") for note in read_notes(file)]
        self.outcome.receipts = sum(note.kind == "receipt" for note in notes)

    async def end(self) -> None:
        """Leaves nobody behind."""
        for key in self._plans:
            self._place.signal(key, signal.SIGKILL)
        while self._plans:
            what, key, _ = await self._place.event(STUCK_SECONDS)
            if what == "ended":
                self._plans.pop(key, None)

    async def _next(self) -> None:
        what, key, status = await self._place.event(self._setting.stuck_seconds)
        match what:
            case "ready":
                self._note_recovery(key)
            case "breach":
                self.outcome.breaches += [
                    f"{key}: {note.sentence}"
                    for note in read_notes(self._folder / f"{key}.notes")
                    if note.kind == "breach"
                ]
            case "ended":
                self._bury(key, status)

    def _bury(self, key: str, status: int) -> None:
        plan, life = self._plans.pop(key), self._lives[key] - 1
        steps = self._steps_of(key, life)
        self.outcome.reached.update(steps)
        if status == -signal.SIGKILL and _was_planned(plan, steps):
            self.outcome.kills.append(Kill(key, life, len(steps), steps[-1]))
            if key == COORDINATOR:
                self.outcome.breaches += breaches_of_the_dead(self._folder, self._expected)
            if not self.outcome.breaches:
                self._died_at[key] = time.perf_counter()
                self._start(key)
        elif status != 0 or key == COORDINATOR:
            self._breach(f"{key} ended by itself with status {status}: {self._last_words(key)}")

    async def _until_ready(self) -> None:
        while self._plans and not self.outcome.breaches:
            what, key, status = await self._place.event(self._setting.stuck_seconds)
            if what == "ready":
                return
            if what == "ended":
                self._bury(key, status)

    async def _stop_coordinator(self) -> None:
        """SIGTERM; a kill that was planned may come first, then it starts again."""
        while not self.outcome.breaches:
            self._place.signal(COORDINATOR, signal.SIGTERM)
            what, key, status = await self._place.event(self._setting.stuck_seconds)
            if what == "ended" and status == 0:
                self.outcome.reached.update(self._steps_of(key, self._lives[key] - 1))
                del self._plans[key]
                return
            if what == "ended":
                self._bury(key, status)
                await self._until_ready()

    def _start(self, key: str, plan: str | None = None) -> None:
        life = self._lives[key]
        self._lives[key] += 1
        text = self._plan_of(key, life) if plan is None else plan
        trace = f"trace={self._trace_of(key, life)}"
        self._plans[key] = ",".join(part for part in (text, trace) if part)
        role = "coordinator" if key == COORDINATOR else "worker"
        self._place.start(Order(key, role, str(self._folder), self._plans[key], self._setting.bug))

    def _note_recovery(self, key: str) -> None:
        died_at = self._died_at.pop(key, None)
        if died_at is not None:
            mine, theirs = self.outcome.recovery_seconds, self.outcome.worker_recovery_seconds
            (mine if key == COORDINATOR else theirs).append(time.perf_counter() - died_at)

    def _steps_of(self, key: str, life: int) -> list[str]:
        file = self._trace_of(key, life)
        return [line.split()[1] for line in file.read_text().splitlines()] if file.exists() else []

    def _trace_of(self, key: str, life: int) -> Path:
        return self._folder / f"{key}.{life}.trace"

    def _last_words(self, key: str) -> str:
        file = self._folder / f"{key}.log"
        return file.read_text(errors="replace").strip().rpartition("\n")[2][-400:] if file.exists() else "none"

    def _where(self) -> str:
        state = read_journal(self._folder / "state").state
        return f"round {state.round + 1}, {state.phase}, {sorted(self._plans)} live"

    def _breach(self, sentence: str) -> None:
        self.outcome.breaches.append(sentence)


def _was_planned(plan: str, steps: Sequence[str]) -> bool:
    """Whether a process with this plan had to die at the last of these steps."""
    if not steps:
        return False
    last, number = steps[-1], len(steps)
    kills = [point for point in parse_plan(plan).points if not point.error]
    return any(point.is_met(last, number, steps.count(last)) for point in kills)


@dataclass
class Campaign:
    """Federations until there were enough kills, or one that broke a promise."""

    place: Nursery
    folder: Path
    seed: int
    setting: Setting = Setting()
    kills_each: int = 60  # of one federation; then it ends in peace
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """So far."""
        return sum(len(outcome.kills) for outcome in self.outcomes)

    async def run(self, kills: int, on_federation: Callable[[Outcome], None] = lambda _: None) -> None:
        """Until so many kills or a breach."""
        peaceful = _fresh(self.folder / "undisturbed")
        expected = await undisturbed(self.place, peaceful, replace(self.setting, bug=""))
        names = {COORDINATOR: _names_in(peaceful, COORDINATOR), "": _names_in(peaceful, "site-1")}
        while self.kills < kills:
            number = len(self.outcomes)
            folder = _fresh(self.folder / f"federation-{number}")
            plan_of = _quota(Schedule(self.seed, number, names), min(self.kills_each, kills - self.kills))
            outcome = await play(self.place, folder, self.setting, expected, plan_of)
            self.outcomes.append(outcome)
            on_federation(outcome)
            if outcome.breaches:
                return
            shutil.rmtree(folder)


def _names_in(folder: Path, key: str) -> tuple[str, ...]:
    """The steps that this process came to while nobody disturbed it, each once."""
    lines = [line for file in folder.glob(f"{key}.*.trace") for line in file.read_text().splitlines()]
    return tuple(sorted({line.split()[1] for line in lines}))


def _quota(schedule: Schedule, kills: int) -> PlanOf:
    """The schedule's plans until as many lives as kills are wanted were given one; most of them the coordinator's.

    There are eight workers and one coordinator, and what must not be lost is the coordinator's.
    """
    of_workers = int(kills * WORKERS_SHARE)
    lives = {True: iter(range(kills - of_workers)), False: iter(range(of_workers))}

    def plan_of(key: str, life: int) -> str:
        return schedule.plan_of(key, life) if next(lives[key == COORDINATOR], None) is not None else ""

    return plan_of


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def process_environment() -> dict[str, str]:
    """Of every process of a federation: little, so that nothing of the caller's shell matters."""
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS.parent / 'proto'}",
        "OPENBLAS_NUM_THREADS": "1",
        "GRPC_VERBOSITY": "NONE",
    }


def write_settings(folder: Path, setting: Setting) -> None:
    """The settings files of a federation and its sites, on a port that was free a moment ago."""
    address = f"127.0.0.1:{_free_port()}"
    federation = {
        "name": FEDERATION,
        "state_dir": str(folder / "state"),
        "export_dir": str(folder / "export"),
        "server": {"listen": address},
        "model": {"base_model": "tiny", "task": "sequence-classification", "labels": ["no", "yes", "perhaps"]},
        "adapter": {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "global_rank": 16},
        "rounds": {
            "num_rounds": setting.rounds,
            "min_clients": len(setting.ranks),
            "evaluate_every": setting.evaluate_every,
            "seed": 11,
        },
        "store": {"keep_rounds": KEEP_ROUNDS},
        "training": {"learning_rate": 0.1},
    }
    (folder / "federation.toml").write_text(to_toml(federation))
    for number, (client, rank) in enumerate(setting.ranks_of.items(), start=1):
        site = {
            "name": client,
            "rank": rank,
            "state_dir": str(folder / client),
            "coordinator": {"address": address},
            "model": {"path": "tiny"},
            "data": {"train": "none", "max_examples": 10 * number},
        }
        (folder / f"{client}.toml").write_text(to_toml(site))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
