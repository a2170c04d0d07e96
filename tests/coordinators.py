"""Whole coordinators for tests, in this process or as `raflora coordinator`; clients that train with numpy alone."""

import asyncio
import io
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from raflora.v1 import admin_pb2_grpc, federation_pb2_grpc, status_pb2, status_pb2_grpc

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import Layout, WireDtype, decode, digest_of, encode
from common.version import PROTOCOL
from coordinator.config import CoordinatorConfig
from coordinator.server import run_coordinator
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import Entry, SqlJournal
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.messages import Blob, Enrolment, Evaluation, Outcome, RankProfile, Task, TaskKind, Update

SPEC = AdapterSpec(
    (ModuleShape("encoder.0.query", 16, 12), ModuleShape("encoder.1.dense", 11, 20)),
    (TensorShape("classifier.bias", (3,)), TensorShape("classifier.weight", (3, 16))),
)
BASE_MODEL = digest_of(b"the base model")
SEED = 11
START_SECONDS = 60.0  # for a process; a bound, not an expectation


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A federation of two rounds of at least three clients; `rounds__quorum=2` changes one key."""
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "name": "digits",
        "state_dir": str(folder / "state"),
        "log_format": "json",
        "server": {"listen": "127.0.0.1:0"},
        "model": {"base_model": "tiny", "task": "sequence-classification", "labels": ["no", "yes", "perhaps"]},
        "adapter": {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "global_rank": 8},
        "rounds": {"num_rounds": 2, "min_clients": 3, "evaluate_every": 0, "seed": SEED},
        "training": {"learning_rate": 0.1},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            settings.setdefault(section, {})[key] = value
        else:
            settings[name] = value
    return settings


def config_of(folder: Path, **changes: Any) -> CoordinatorConfig:
    """The same as a validated value."""
    return CoordinatorConfig.model_validate(settings_of(folder, **changes))


@asynccontextmanager
async def serving(config: CoordinatorConfig) -> AsyncIterator[str]:
    """A coordinator in this process; its address."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_coordinator(config, on_listening=listening.set_result))
    await asyncio.wait({running, listening}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if running.done():
            running.result()
        yield listening.result()
    finally:
        running.cancel()
        ended = (await asyncio.gather(running, return_exceptions=True))[0]
        if isinstance(ended, Exception):
            raise ended


class CoordinatorProcess:
    """`raflora coordinator` as a process of its own."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], descriptors: int | None = None) -> None:
        """With so many descriptors at most, if a number is given."""
        file = folder / "federation.toml"
        file.write_text(to_toml(settings))
        bound = [] if descriptors is None else ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh"]
        self._process = subprocess.Popen(
            [*bound, sys.executable, "-m", "cli.main", "coordinator", "--config", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait_until_listening(self) -> str:
        """Its address."""
        while True:
            line = self._lines.get(timeout=START_SECONDS)
            assert line, f"the coordinator ended: {self.output}"
            if line.startswith("{") and (said := json.loads(line)).get("event") == "listening":
                return str(said["address"])

    def kill(self) -> None:
        """kill -9."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=START_SECONDS)

    def terminate(self) -> int:
        """Its exit status after SIGTERM."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Its exit status."""
        status = self._process.wait(timeout=START_SECONDS)
        self._reader.join(timeout=START_SECONDS)
        return status

    def close(self) -> None:
        """Leaves no process behind."""
        if self._process.poll() is None:
            self.kill()
        self._reader.join(timeout=START_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            self._lines.put(line)
        self._lines.put("")


@dataclass
class NumpyClient:
    """A client whose training adds seeded noise to its slice; the same task always gives the same bytes."""

    address: str
    client_id: str
    rank: int
    num_examples: int = 10
    enrol_key: str = ""
    wire_dtype: WireDtype = WireDtype.FLOAT32
    is_too_old: bool = False  # to know what a plan may ask beside numbers
    sent: dict[int, bytes] = field(default_factory=dict)  # by round
    received: dict[int, bytes] = field(default_factory=dict)  # by round
    scalings: dict[int, float] = field(default_factory=dict)
    rpc: CoordinatorClient = field(init=False)

    def __post_init__(self) -> None:
        self.enrol_key = self.enrol_key or f"key-of-{self.client_id}"
        who = Credentials(self.client_id, self.enrol_key, "0")
        self.rpc = CoordinatorClient(CoordinatorAddress(address=self.address), who)

    async def restart(self) -> None:
        """Another process of the same identity; it has joined already."""
        await self.rpc.close()
        self.__post_init__()

    async def join(self, base_model: str = BASE_MODEL) -> None:
        """Takes a place."""
        profile = RankProfile(self.rank, "cpu", 1 << 30, self.num_examples)
        place = await self.rpc.join(Enrolment(PROTOCOL, profile, base_model, SPEC))
        self.wire_dtype = WireDtype(place.wire_dtype)

    async def fetch_task(self) -> Task:
        """Waits for work; there must be some."""
        polled = await self.rpc.poll_task(30.0)
        assert polled.tasks, polled.status_sentence
        return polled.tasks[0]

    async def download(self, task: Task) -> bytes:
        """The slice's bytes, checked."""
        content = b"".join([chunk async for chunk in self.rpc.download(task.adapter, 0)])
        assert digest_of(content) == task.adapter.digest
        self.received[task.round] = content
        return content

    async def train(self, task: Task) -> bytes:
        """The bytes of the update."""
        start = decode(await self.download(task), Layout(SPEC, task.lora_rank, self.wire_dtype), self.client_id)
        noise = np.random.default_rng(task.plan.seed)
        is_frozen = task.plan.freezes_lora_A and not self.is_too_old
        modules = {
            name: Factors(f.lora_A if is_frozen else _shaken(f.lora_A, noise), _shaken(f.lora_B, noise))
            for name, f in start.modules.items()
        }
        tensors = {name: _shaken(tensor, noise) for name, tensor in start.tensors.items()}
        content = encode(Adapter(modules, tensors), self.wire_dtype)
        self.sent[task.round], self.scalings[task.round] = content, task.scaling
        return content

    async def upload(self, task: Task, content: bytes, *, stop_at: int | None = None) -> int:
        """Sends from the committed byte on; the committed bytes afterwards."""
        blob = Blob(digest_of(content), len(content))
        offset = await self.rpc.begin_upload(task.lease_token, blob)
        if offset == len(content):
            return offset
        return await self.rpc.upload(blob, offset, io.BytesIO(content[offset:stop_at]))

    async def submit(self, task: Task, content: bytes) -> Outcome:
        """Commits the upload."""
        blob = Blob(digest_of(content), len(content))
        return await self.rpc.submit_update(Update(task, blob, self.num_examples, {"train_loss": 0.5}, 1.0))

    async def do(self, task: Task) -> Outcome:
        """A whole task."""
        if task.kind is TaskKind.EVALUATE:
            await self.download(task)
            metrics = {"accuracy": self.rank / 8, "eval_loss": 1.0}
            return await self.rpc.submit_evaluation(Evaluation(task, self.num_examples, metrics))
        content = await self.train(task)
        await self.upload(task, content)
        return await self.submit(task, content)

    async def work(self) -> None:
        """Until the federation is finished."""
        while True:
            polled = await self.rpc.poll_task(30.0)
            for task in polled.tasks:
                assert await self.do(task) is Outcome.ACCEPTED
            if polled.is_finished:
                return


@asynccontextmanager
async def clients_of(address: str, ranks: Mapping[str, int]) -> AsyncIterator[list[NumpyClient]]:
    """These clients, joined in this order; num_examples are 10, 20, 30, ..."""
    clients = [NumpyClient(address, name, rank, 10 * (i + 1)) for i, (name, rank) in enumerate(ranks.items())]
    try:
        for client in clients:
            await client.join()
        yield clients
    finally:
        for client in clients:
            await client.rpc.close()


class Observer:
    """Raw stubs of all services, as any gRPC client has them."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.federation = federation_pb2_grpc.FederationServiceStub(channel)
        self.status = status_pb2_grpc.StatusServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    async def see(self) -> status_pb2.FederationStatus:
        """The federation as it stands."""
        return (await self.status.GetStatus(status_pb2.GetStatusRequest())).status

    async def finished(self) -> status_pb2.FederationStatus:
        """Waits for the end of the federation."""
        async for answer in self.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            status = answer.status
        assert status.phase == status_pb2.PHASE_FINISHED, status.explanation
        return status

    async def fetch(self, rank: int = 0, offset: int = 0) -> tuple[status_pb2.AdapterHeader, bytes]:
        """The published adapter."""
        request = status_pb2.FetchAdapterRequest(lora_rank=rank, offset=offset)
        parts = [part async for part in self.status.FetchAdapter(request, timeout=60)]
        return parts[0].header, b"".join(part.data for part in parts[1:])


@asynccontextmanager
async def observing(address: str) -> AsyncIterator[Observer]:
    """An observer's connection."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Observer(channel)


def entries_of(config: CoordinatorConfig) -> list[Entry]:
    """The whole journal, read beside the coordinator that writes it."""
    journal = SqlJournal(f"sqlite:///{config.state_dir / 'journal.sqlite'}")
    try:
        return list(journal.read(config.name))
    finally:
        journal.close()


def global_adapter(config: CoordinatorConfig, digest: str) -> Adapter:
    """The effective global adapter of this digest, from the coordinator's disk."""
    content = FileBlobs(config.state_dir / "blobs").open(digest).read_bytes()
    return decode(content, Layout(SPEC, config.adapter.global_rank), "the global adapter")


def to_toml(settings: Mapping[str, Any]) -> str:
    """Plain values and one level of sections."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    lines = list(_toml_lines(plain))
    for name, section in settings.items():
        if isinstance(section, Mapping):
            lines += [f"[{name}]", *_toml_lines(section)]
    return "\n".join(lines) + "\n"


def _toml_lines(values: Mapping[str, Any]) -> Iterator[str]:
    return (f"{key} = {json.dumps(value)}" for key, value in values.items())


def _shaken(array: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    return array + noise.normal(0.0, 0.1, array.shape).astype(np.float32)
