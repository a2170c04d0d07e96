"""A site without a model: the worker's own client, upload and download code, and a made-up update."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by its name once this is imported
import numpy as np

from benchmarks.load.clients import BASE_MODEL
from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout
from common.version import PROTOCOL
from worker import uploads
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.contact import Clock, Contact
from worker.downloads import Slices
from worker.messages import Blob, Enrolment, RankProfile, Task

SIDE = 4096  # of every layer
RANK = 64


def spec_of(megabytes: int, number_bytes: int = 4) -> AdapterSpec:
    """As many layers as make an update of about so many million bytes."""
    layers = max(1, round(megabytes * 1e6 / (2 * SIDE * RANK * number_bytes)))
    return AdapterSpec(tuple(ModuleShape(f"layer.{i:04}", SIDE, SIDE) for i in range(layers)), ())


def write_update(path: Path, layout: Layout, seed: int) -> Blob:
    """A valid update with numbers as LoRA has them: lora_A uniform as it begins, lora_B normal."""
    noise = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, shape in sorted(layout.shapes.items()):
            size = int(np.prod(shape))
            numbers = noise.uniform(-1, 1, size) / 64 if name.endswith("lora_A") else noise.normal(0.0, 1e-3, size)
            file.write(numbers.astype(layout.dtype.value).tobytes())
    assert path.stat().st_size == layout.size_bytes
    return blob_of(path)


def blob_of(path: Path) -> Blob:
    """The file's name and length."""
    with path.open("rb") as file:
        return Blob(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


@dataclass(frozen=True)
class Site:
    """One worker's agent side, joined and with a task."""

    client: CoordinatorClient
    contact: Contact
    slices: Slices
    task: Task

    async def send(self, path: Path, blob: Blob) -> None:
        """The whole upload, as a worker does it."""
        await uploads.send(uploads.Upload(path, blob, self.task.lease_token), self.client, self.contact)

    async def fetch(self) -> Path:
        """The whole download, as a worker does it: checked and durable."""
        return await self.slices.fetch(self.task.adapter)

    async def take(self) -> None:
        """The same bytes into nothing."""
        left = self.task.adapter.size_bytes
        async for chunk in self.client.download(self.task.adapter, 0):
            left -= len(chunk)
        assert left == 0, f"{left} bytes are missing"


Encoding: TypeAlias = Literal["identity", "byte-planes"]


async def join(address: str, client_id: str, spec: AdapterSpec, encoding: Encoding) -> CoordinatorClient:
    """A client that has a place."""
    # The first one founds a large adapter.
    where = CoordinatorAddress(address=address, rpc_timeout_seconds=300, encoding=encoding)
    client = CoordinatorClient(where, Credentials(client_id, f"key-of-{client_id}", "0"))
    await client.join(Enrolment(PROTOCOL, RankProfile(RANK, "cpu", 0, 100), BASE_MODEL, spec))
    return client


@asynccontextmanager
async def sites_of(
    folder: Path, address: str, spec: AdapterSpec, number: int, encoding: Encoding = "identity"
) -> AsyncIterator[list[Site]]:
    """So many sites with a task each, in a round that one client more keeps open."""
    clients = [await join(address, f"site-{i:04}", spec, encoding) for i in range(number + 1)]
    try:
        sites = []
        for i, client in enumerate(clients[:number]):
            polled = await client.poll_task()
            home = folder / f"site-{i:04}"
            home.mkdir(exist_ok=True)
            contact = Contact(home, Clock())
            sites.append(Site(client, contact, Slices(home / "slices", client, contact), polled.tasks[0]))
        yield sites
    finally:
        for client in clients:
            await client.close()
