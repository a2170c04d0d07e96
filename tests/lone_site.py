"""A federation of Ada alone in a whole coordinator without a network, and a journal that can be held up."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinators import BASE_MODEL, SPEC, config_of

from common.adapter import initial_adapter
from common.codec import digest_of, encode
from coordinator.config import CoordinatorConfig
from coordinator.federation.requests import Outcome, SubmitUpdate
from coordinator.federation.state import Profile, Update
from coordinator.service import CoordinatorService, Task
from coordinator.slices import BlobReference
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import Entry, MemoryJournal

KEY = "a-key-for-tests"
RANK = 2
CONTENT = encode(initial_adapter(SPEC, RANK, seed=1))
DIGEST = digest_of(CONTENT)


class HeldJournal(MemoryJournal):
    """Waits before it records an event of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self.is_held = threading.Event()
        self.may_go_on = threading.Event()

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        if any(entry.kind == self._kind for entry in entries):
            self.is_held.set()
            assert self.may_go_on.wait(timeout=30)
        super().append(federation, entries)


@dataclass(frozen=True)
class Site:
    """Ada, who joined a federation of her own."""

    service: CoordinatorService

    async def fetch(self) -> Task:
        task = await self.service.next_task("ada", KEY, 30.0)
        assert task is not None
        return task

    @property
    def lease_token(self) -> int:
        opened = self.service.engine.state.open
        assignment = opened.assignment_of("ada") if opened else None
        return assignment.lease_token if assignment else 0

    async def upload(self, *chunks: bytes) -> int:
        await self.service.intake.begin_upload("ada", KEY, self.lease_token, BlobReference(DIGEST, len(CONTENT)))
        return await self.service.intake.receive("ada", KEY, DIGEST, 0, stream(*(chunks or (CONTENT,))))

    async def upload_other(self, content: bytes) -> int:
        digest = digest_of(content)
        await self.service.intake.begin_upload("ada", KEY, self.lease_token, BlobReference(digest, len(content)))
        return await self.service.intake.receive("ada", KEY, digest, 0, stream(content))

    async def submit(self, task: Task, digest: str = DIGEST) -> Outcome:
        update = Update(digest, len(CONTENT), 10, {}, 1.0)
        return await self.service.intake.submit_update(
            SubmitUpdate("ada", task.lease_token, task.number, task.attempt, task.slice.digest, update), KEY
        )

    async def work(self) -> None:
        task = await self.fetch()
        await self.upload()
        assert await self.submit(task) is Outcome.ACCEPTED

    async def published(self, rounds: int = 1) -> str:
        engine, version = self.service.engine, -1
        while engine.state.round < rounds:
            version = await engine.wait_for_change(version, 30.0)
        return engine.state.adapter_digest


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def lonely(folder: Path, **changes: object) -> CoordinatorConfig:
    return config_of(folder, rounds__min_clients=1, **changes)


@asynccontextmanager
async def running(service: CoordinatorService) -> AsyncIterator[Site]:
    task = asyncio.create_task(service.run())
    try:
        await service.join("ada", KEY, Profile(RANK, 10), SPEC, BASE_MODEL)
        yield Site(service)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        service.close()


def blobs_of(config: CoordinatorConfig) -> FileBlobs:
    return FileBlobs(config.state_dir / "blobs")
