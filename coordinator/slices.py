"""Rank slices of the global adapter: made once per adapter and rank, kept as blobs, served to all of that rank."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from common.adapter import Adapter, slice_adapter
from common.codec import Layout, decode, encode
from common.errors import CorruptStore, UnknownBlob
from common.failpoints import reach
from coordinator.manifest import Manifest
from coordinator.stores.blobs import BlobStore

MAX_MAKING = 2  # at a time: each holds a whole slice in memory
MAX_FOREIGN = 8  # slices of ranks that no client was granted, for observers

log = structlog.get_logger()


@dataclass(frozen=True)
class BlobReference:
    """Bytes by content."""

    digest: str
    size_bytes: int


@dataclass
class _Reading:
    """An adapter on its way into memory, and how many wait for it or use it."""

    task: asyncio.Task[Adapter]
    users: int = 0


class Slices:
    """A cache over pure functions: the same adapter and rank always give the same bytes."""

    def __init__(
        self,
        blobs: BlobStore,
        manifest: Manifest,
        granted_ranks: Callable[[], Set[int]],
        on_dropped: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_dropped` is told the digest of a slice of a rank that nobody trains, when newer ones take its place."""
        self._blobs = blobs
        self._manifest = manifest
        self._granted_ranks = granted_ranks
        self._on_dropped = on_dropped
        self._making = asyncio.Semaphore(MAX_MAKING)
        self._made: dict[tuple[str, int], asyncio.Task[BlobReference]] = {}
        self._read: dict[str, _Reading] = {}

    async def slice_of(self, adapter_digest: str, rank: int) -> BlobReference:
        """The first `rank` directions, scaled for a client of that rank, in the wire dtype."""
        key = (adapter_digest, rank)
        if key not in self._made:
            self._made[key] = asyncio.create_task(self._make_in_turn(adapter_digest, rank))
        making = self._made[key]
        try:
            # Shielded: a caller that hangs up must not take the slice from the others who wait for it.
            reference = await asyncio.shield(making)
        except Exception:
            if self._made.get(key) is making:
                del self._made[key]
            raise
        self._drop_foreign(key)
        return reference

    async def mend(self, adapter_digest: str, rank: int, slice_digest: str) -> None:
        """Makes a slice anew that was handed out and whose bytes on disk are no longer what they were.

        Raises CorruptStore, and makes nothing, if those of the adapter are not either.
        """
        try:
            await asyncio.to_thread(self._blobs.verify, slice_digest)
        except (CorruptStore, UnknownBlob) as error:
            log.error("a slice is damaged and made anew", rank=rank, why=str(error))
            damaged = [key for key, task in self._made.items() if _digest_in(task) == slice_digest]
            for key in damaged:
                del self._made[key]
            await self.slice_of(adapter_digest, rank)

    async def settle(self) -> None:
        """Returns when no slice is being made."""
        while pending := [task for task in self._made.values() if not task.done()]:
            await asyncio.wait(pending)

    def keep_only(self, *adapter_digests: str) -> None:
        """Forgets the slices of all other adapters."""
        self._made = {key: task for key, task in self._made.items() if key[0] in adapter_digests}

    def digests(self) -> set[str]:
        """The blobs that are slices."""
        return {_digest_in(task) for task in self._made.values()} - {""}

    def owns(self, digest: str) -> bool:
        """Whether these bytes are a slice that may be handed to a client."""
        return digest in self.digests()

    def _drop_foreign(self, wanted: tuple[str, int]) -> None:
        if len(self._made) <= MAX_FOREIGN:
            return  # every claim comes by here, and the ranks are those of all clients
        granted = self._granted_ranks()
        foreign = [key for key, task in self._made.items() if key[1] not in granted and task.done()]
        for key in [key for key in foreign if key != wanted][: max(0, len(foreign) - MAX_FOREIGN)]:
            task = self._made.pop(key)
            digest = _digest_in(task)
            if digest and not self.owns(digest):
                self._on_dropped(digest)

    async def _make_in_turn(self, adapter_digest: str, rank: int) -> BlobReference:
        async with self._global_adapter(adapter_digest) as reading, self._making:
            return await asyncio.to_thread(self._make, await asyncio.shield(reading), rank)

    @asynccontextmanager
    async def _global_adapter(self, digest: str) -> AsyncGenerator[asyncio.Task[Adapter]]:
        """Read and verified once for all slices that are wanted at the same time, as when a round opens."""
        if digest not in self._read:
            read = partial(read_global_adapter, self._blobs, self._manifest, digest)
            self._read[digest] = _Reading(asyncio.create_task(asyncio.to_thread(read)))
        reading = self._read[digest]
        reading.users += 1
        try:
            yield reading.task
        finally:
            reading.users -= 1
            if not reading.users and self._read.get(digest) is reading:
                del self._read[digest]

    def _make(self, adapter: Adapter, rank: int) -> BlobReference:
        cut = slice_adapter(adapter, rank, scaling=self._manifest.scaling(rank))
        content = encode(cut, self._manifest.adapter.wire_dtype)
        reach("slice.made")
        reference = BlobReference(self._blobs.put(content), len(content))
        reach("slice.stored")
        return reference


def _digest_in(making: asyncio.Task[BlobReference]) -> str:
    """Of the slice that was made; empty while there is none."""
    is_made = making.done() and not making.cancelled() and making.exception() is None
    return making.result().digest if is_made else ""


def read_global_adapter(blobs: BlobStore, manifest: Manifest, digest: str) -> Adapter:
    """The effective global adapter (scaling 1, float32). Raises CorruptStore if its bytes changed on disk."""
    layout = Layout(manifest.spec, manifest.adapter.global_rank)
    return decode(blobs.verify(digest).read_bytes(), layout, whose=f"global adapter {digest[:12]}")
