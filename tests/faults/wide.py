"""A federation whose updates are several chunks long, and workers' ends of its transfers: for faults in the middle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinators import BASE_MODEL, config_of

from common.adapter import AdapterSpec, ModuleShape, initial_adapter
from common.codec import Layout, digest_of, encode
from common.transfer import CHUNK_BYTES
from common.version import PROTOCOL
from coordinator.config import CoordinatorConfig
from worker import uploads
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.contact import Clock, Contact
from worker.downloads import Slices
from worker.messages import Blob, Enrolment, Outcome, RankProfile, Task, Update

RANK = 8
WIDE = AdapterSpec((ModuleShape("wide", 64_000, 48_000),))
CONTENT = encode(initial_adapter(WIDE, RANK, seed=3))
CHUNKS = len(CONTENT) // CHUNK_BYTES
assert CHUNKS == 3
assert len(CONTENT) % CHUNK_BYTES


def wide_config(folder: Path, **changes: Any) -> CoordinatorConfig:
    """Rounds of two clients, so that one alone closes none; `rounds__quorum=2` changes one key."""
    return config_of(folder, rounds__min_clients=2, adapter__modules_to_save=[], **changes)


def content(number: int) -> bytes:
    """Another update each time, of the same size."""
    header = len(Layout(WIDE, RANK).header)
    return CONTENT[:header] + number.to_bytes(2, "little") + CONTENT[header + 2 :]


async def at_once(seconds: float) -> None:
    """A pause of a clock that does not wait."""
    await asyncio.sleep(0)


@dataclass
class WideClient:
    """A worker's own transfers over one line, without an agent."""

    rpc: CoordinatorClient
    folder: Path
    name: str

    @property
    def contact(self) -> Contact:
        return Contact(self.folder, Clock(sleep=at_once))

    async def join(self) -> None:
        profile = RankProfile(RANK, "cpu", 1 << 30, 10)
        await self.rpc.join(Enrolment(PROTOCOL, profile, BASE_MODEL, WIDE))

    async def task(self) -> Task:
        polled = await self.contact.insist(lambda: self.rpc.poll_task(30.0))
        return polled.tasks[0]

    async def fetch(self, task: Task) -> Path:
        return await Slices(self.folder / "slices", self.rpc, self.contact).fetch(task.adapter)

    async def send(self, task: Task, update: bytes) -> Blob:
        path, blob = self.folder / "update.safetensors", Blob(digest_of(update), len(update))
        path.write_bytes(update)
        await uploads.send(uploads.Upload(path, blob, task.lease_token), self.rpc, self.contact)
        return blob

    async def submit(self, task: Task, blob: Blob) -> Outcome:
        return await self.contact.insist(lambda: self.rpc.submit_update(Update(task, blob, 10, {}, 1.0)))


@asynccontextmanager
async def wide_client(address: str, folder: Path, name: str = "ada") -> AsyncIterator[WideClient]:
    """One client with a folder and a line of its own; it has not joined."""
    home = folder / name
    home.mkdir(exist_ok=True)
    who = Credentials(name, f"key-of-{name}", "0")
    rpc = CoordinatorClient(CoordinatorAddress(address=address, rpc_timeout_seconds=10), who)
    try:
        yield WideClient(rpc, home, name)
    finally:
        await rpc.close()


@asynccontextmanager
async def beside(address: str, folder: Path) -> AsyncIterator[WideClient]:
    """Bob, who joins over an undisturbed line so that a round opens."""
    async with wide_client(address, folder, "bob") as bob:
        await bob.join()
        yield bob
