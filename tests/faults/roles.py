"""What the harness's processes are: `raflora coordinator` and `raflora worker`, in another tempo, with a witness.

The commands are the product's own. Replaced are: the trainer process by a thread that makes seeded factors (torch would
cost seconds at each restart), pauses by shorter ones, the sizes of chunks and snapshots by smaller ones (so that small
files have many steps). The worker's client writes down what it is told, and sometimes speaks like a worker that died.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from faults import planted
from faults.notes import Note, Notebook

import cli.access
import cli.backup
import cli.coordinator
import cli.init
import cli.site
import cli.worker
import common.channel
import common.transfer
import coordinator.engine
import worker.client
import worker.contact
import worker.run
from cli.main import main
from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import Layout, WireDtype, decode, encode
from common.errors import CorruptTransfer
from common.failpoints import arm_as_planned, reach
from common.settings import FAILPOINTS_VARIABLE
from coordinator.server import run_coordinator
from worker.client import CoordinatorClient
from worker.messages import Blob, Evaluation, Outcome, Polled, Task, TaskKind, Update, Welcome
from worker.supervisor import OnProgress, TrainerProcess
from worker.trainer_protocol import Evaluate, Evaluated, Load, Loaded, Train, Trained

SPEC = AdapterSpec(
    (ModuleShape("encoder.0.query", 24, 16), ModuleShape("encoder.1.dense", 16, 20)),
    (TensorShape("classifier.bias", (3,)),),
)
BASE_MODEL = "ba5e" * 16
CHUNK_BYTES = 1 << 10
SYNC_BYTES = 2 << 10
SNAPSHOT_EVERY = 25
TIMES_FASTER = 20.0
DONE = frozenset({Outcome.ACCEPTED, Outcome.DUPLICATE})

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """Start this process."""

    key: str  # its name: "coordinator" or a client id
    role: str
    folder: str
    plan: str = ""  # of its failpoints
    bug: str = ""  # that is planted in it; see planted.py
    arguments: tuple[str, ...] = ()  # of a command
    plan_when_ready: str = ""  # of a coordinator: the plan from the moment on when it answers calls
    ahead_seconds: float = 0.0  # of a worker: how late it is by its own clock


def be_coordinator(order: Order, tell: Tell) -> None:
    """Runs the command; tells "ready" when it answers calls."""
    _prepare(order)

    def on_listening(_address: str) -> None:
        arm_as_planned(order.plan_when_ready)
        tell("ready")

    listening: Any = partial(run_coordinator, on_listening=on_listening)
    command: Any = cli.coordinator
    command.run_coordinator = listening
    asyncio.run(cli.coordinator.coordinator(config=Path(order.folder) / "federation.toml"))


def be_worker(order: Order, tell: Tell) -> None:
    """Runs the command; tells "ready" at the first answer, "receipt" at each promise."""
    _prepare(order)
    notebook = Notebook(Path(order.folder) / f"{order.key}.notes")
    module: Any = worker.run  # other names than the product's are put into it
    module.CoordinatorClient = partial(Witness, notebook=notebook, tell=tell, client_id=order.key)
    module.TrainerProcess = SeededTrainer
    clock = worker.contact.Clock()
    tempo = replace(
        clock,
        sleep=lambda seconds: clock.sleep(seconds / TIMES_FASTER),
        wall_time=lambda: clock.wall_time() + order.ahead_seconds,
    )
    module.work = partial(worker.run.work, clock=tempo)
    asyncio.run(cli.worker.worker(config=Path(order.folder) / f"{order.key}.toml"))


def be_command(order: Order, _tell: Tell) -> None:
    """Runs any verb of the command line and ends with its exit status."""
    arm_as_planned(order.plan)
    status = main(order.arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


ROLES: Mapping[str, Callable[[Order, Tell], None]] = MappingProxyType(
    {"coordinator": be_coordinator, "worker": be_worker, "command": be_command}
)


def _prepare(order: Order) -> None:
    os.environ[FAILPOINTS_VARIABLE] = order.plan
    client: Any = worker.client
    common.transfer.CHUNK_BYTES = client.CHUNK_BYTES = CHUNK_BYTES
    common.transfer.SYNC_BYTES = SYNC_BYTES
    coordinator.engine.SNAPSHOT_EVERY = SNAPSHOT_EVERY
    patient = common.channel.client_options
    quick = {"grpc.initial_reconnect_backoff_ms": 20, "grpc.min_reconnect_backoff_ms": 20}
    quick["grpc.max_reconnect_backoff_ms"] = 100
    common.channel.client_options = lambda keepalive: [(k, quick.get(k, v)) for k, v in patient(keepalive)]
    if order.bug:
        planted.plant(order.bug)


class SeededTrainer(TrainerProcess):
    """Trains in a thread: the plan's seed alone decides what it adds to the slice."""

    _num_examples = 0

    async def load(self, order: Load) -> Loaded:
        """Every site holds the same model and as much data as its settings allow."""
        self._num_examples = int(json.loads(order.config_json)["data"]["max_examples"])
        return Loaded(
            base_model_digest=BASE_MODEL,
            modules=tuple((m.name, m.out_features, m.in_features) for m in SPEC.modules),
            tensors=tuple((t.name, t.shape) for t in SPEC.tensors),
            num_examples=self._num_examples,
            device="cpu",
            memory_bytes=1 << 30,
            num_test_examples=self._num_examples,
        )

    async def train(self, request: Train, on_progress: OnProgress) -> Trained:  # noqa: ARG002 - one breath
        """Writes the update as worker/trainer/process.py does."""
        await asyncio.to_thread(_train, request)
        return Trained(self._num_examples, seconds=1.0, metrics={"train_loss": 0.25})

    async def evaluate(self, request: Evaluate, on_progress: OnProgress) -> Evaluated:  # noqa: ARG002
        """Reads the slice."""
        content = await asyncio.to_thread(Path(request.slice_path).read_bytes)
        decode(content, Layout(SPEC, request.lora_rank, WireDtype(request.wire_dtype)), "slice")
        return Evaluated(self._num_examples, {"accuracy": 0.5})


def _train(request: Train) -> None:
    layout = Layout(SPEC, request.lora_rank, WireDtype(request.wire_dtype))
    start = decode(Path(request.slice_path).read_bytes(), layout, "slice")
    noise = np.random.default_rng(request.plan.seed)
    modules = {
        name: Factors(_shaken(factors.lora_A, noise), _shaken(factors.lora_B, noise))
        for name, factors in start.modules.items()
    }
    tensors = {name: _shaken(tensor, noise) for name, tensor in start.tensors.items()}
    content = encode(Adapter(modules, tensors), layout.dtype)
    reach("result.writing")
    Path(request.update_path).write_bytes(content)
    reach("result.written")


def _shaken(array: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    return array + noise.normal(0.0, 0.1, array.shape).astype(np.float32)


class Witness(CoordinatorClient):
    """Writes down every promise, and what contradicts an earlier one."""

    def __init__(self, *args: Any, notebook: Notebook, tell: Tell, client_id: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._notebook = notebook
        self._tell = tell
        self._name = client_id

    async def handshake(self) -> Welcome:
        """The first answer of a life."""
        welcome = await super().handshake()
        self._tell("ready")
        return welcome

    async def poll_task(self, *args: Any, **kwargs: Any) -> Polled:
        """A task whose result was acknowledged must never come again."""
        polled = await super().poll_task(*args, **kwargs)
        for task in polled.tasks:
            note = self._note("task", task)
            if any(n.kind == "receipt" and n.which == note.which for n in self._notebook.notes):
                self._breach(f"an acknowledged upload was asked for again: {task.kind.value}, round {task.round}")
            self._notebook.write(note)
        return polled

    async def begin_upload(self, lease_token: int, blob: Blob) -> int:
        """What was durable must stay durable."""
        committed = await super().begin_upload(lease_token, blob)
        self._check_committed(blob, committed)
        return committed

    async def upload(self, blob: Blob, offset: int, source: BinaryIO) -> int:
        """Nothing on this network damages bytes."""
        try:
            committed = await super().upload(blob, offset, source)
        except CorruptTransfer as error:
            self._breach(f"bytes arrived damaged though no line was cut: {error}")
            raise
        self._check_committed(blob, committed)
        return committed

    async def submit_update(self, update: Update) -> Outcome:
        """Before it, a submission of the worker that held this task in an earlier life."""
        await self._haunt(update)
        outcome = await super().submit_update(update)
        self._receive(update.task, update.blob.digest, update.num_examples, outcome)
        return outcome

    async def submit_evaluation(self, evaluation: Evaluation) -> Outcome:
        """Likewise acknowledged."""
        outcome = await super().submit_evaluation(evaluation)
        self._receive(evaluation.task, evaluation.task.adapter.digest, evaluation.num_examples, outcome)
        return outcome

    async def fail_task(self, lease_token: int, reason: str, message: str) -> bool:
        """Kills are no reason to give a task back."""
        self._breach(f"a task was given back: {reason}: {message}")
        return await super().fail_task(lease_token, reason, message)

    async def _haunt(self, update: Update) -> None:
        older = [
            n for n in self._notebook.notes if n.kind == "task" and n.which == self._note("task", update.task).which
        ]
        if not older or older[0].lease >= update.task.lease_token or update.task.kind is not TaskKind.TRAIN:
            return
        ghost = replace(
            update, task=replace(update.task, lease_token=older[0].lease), num_examples=update.num_examples - 1
        )
        if await super().submit_update(ghost) is Outcome.ACCEPTED:
            self._breach(f"round {update.task.round}: a submission under a lease that was lost was accepted")

    def _receive(self, task: Task, digest: str, num_examples: int, outcome: Outcome) -> None:
        if outcome not in DONE:
            self._breach(f"the result of round {task.round} was answered {outcome.value}")
        self._notebook.write(replace(self._note("receipt", task), digest=digest, number=num_examples))
        self._tell("receipt")

    def _check_committed(self, blob: Blob, committed: int) -> None:
        promised = [n.number for n in self._notebook.notes if n.kind == "committed" and n.digest == blob.digest]
        if committed < max(promised, default=0):
            self._breach(f"{max(promised)} bytes of {blob.digest[:12]} were durable, now {committed} are")
        self._notebook.write(Note("committed", self._name, digest=blob.digest, number=committed))

    def _note(self, kind: Any, task: Task) -> Note:
        return Note(kind, self._name, task.kind.value, task.round, task.attempt, task.lease_token)

    def _breach(self, sentence: str) -> None:
        self._notebook.write(Note("breach", self._name, sentence=sentence))
        self._tell("breach")


if __name__ == "__main__":  # one process without a nursery: `python -m faults.roles ORDER`, the order as JSON
    order = Order(**json.loads(sys.argv[1]))
    ROLES[order.role](order, lambda what: print(what, flush=True))
