"""Rank slices on this worker's disk: fetched once, resumed at the byte where they broke off, checked by digest.

The slice that is evaluated after a round is the one that the next round trains from, so two are kept.
"""

import asyncio
import contextlib
import hashlib
import os
from functools import partial
from pathlib import Path

import structlog

from common.errors import CorruptTransfer, Unavailable
from common.failpoints import reach
from common.side_by_side import OneBehind
from common.transfer import Expected, PartFile, check_digest
from worker.client import CoordinatorClient
from worker.contact import Contact
from worker.messages import Blob

KEPT_SLICES = 2
MAX_CORRUPT_DOWNLOADS = 3
_WHOLE = ".safetensors"
_PART = ".part"

log = structlog.get_logger()


class Slices:
    """The slices in one folder."""

    def __init__(self, folder: Path, client: CoordinatorClient, contact: Contact) -> None:
        self._folder = folder
        self._client = client
        self._contact = contact

    async def fetch(self, blob: Blob) -> Path:
        """The file with exactly these bytes. Raises CorruptTransfer if they keep arriving damaged."""
        check_digest(blob.digest, "rank slice")
        target = self._folder / f"{blob.digest}{_WHOLE}"
        if await asyncio.to_thread(_is_intact, target, blob):
            return target
        await asyncio.to_thread(self._make_room, blob)
        for attempt in range(1, MAX_CORRUPT_DOWNLOADS + 1):
            try:
                await self._complete(blob, target)
                return target
            except CorruptTransfer as error:
                log.warning("a download arrived damaged", error=str(error), attempt=attempt)
        raise CorruptTransfer(f"rank slice {blob.digest[:12]}: damaged {MAX_CORRUPT_DOWNLOADS} times in a row")

    async def _complete(self, blob: Blob, target: Path) -> None:
        expected = Expected(blob.digest, blob.size_bytes, whose=f"rank slice {blob.digest[:12]}")
        part = await _opened(target.with_suffix(_PART), expected)
        disk = OneBehind()  # all that is done to the part: hashed and written while the next chunk arrives
        try:
            if not part.is_complete:
                await self._contact.insist(lambda: self._continue(part, disk, blob))
            await disk.start(partial(asyncio.to_thread, part.finish, target))
            await disk.settle()
            reach("download.completed")
        finally:
            # Who is cancelled again does not wait, but no file is closed under the thread that writes it.
            await asyncio.shield(_wind_up(part, disk))

    async def _continue(self, part: PartFile, disk: OneBehind, blob: Blob) -> None:
        """One call from where the last one ended. Raises Unavailable if it ends early."""
        offset = part.committed_bytes
        try:
            async with contextlib.aclosing(self._client.download(blob, offset)) as chunks:
                async for chunk in chunks:
                    if not chunk:
                        raise CorruptTransfer(f"rank slice {blob.digest[:12]}: a chunk without bytes")
                    await disk.start(partial(asyncio.to_thread, part.append, offset, chunk))
                    offset += len(chunk)
            await disk.settle()
        finally:
            await disk.abandon()
            await disk.start(partial(asyncio.to_thread, part.sync))
            await disk.settle()
        if not part.is_complete:
            raise Unavailable(
                f"coordinator {self._client.address}: a download ended after {offset} of {blob.size_bytes} bytes"
            )

    def _make_room(self, blob: Blob) -> None:
        """Leaves the part file of this blob and the youngest slices, so that with it there are KEPT_SLICES."""
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = sorted(self._folder.glob(f"*{_WHOLE}"), key=lambda path: path.stat().st_mtime, reverse=True)
        parts = [path for path in self._folder.glob(f"*{_PART}") if path.stem != blob.digest]
        for path in [*whole[KEPT_SLICES - 1 :], *parts]:
            reach("download.dropping")
            path.unlink(missing_ok=True)
            reach("download.dropped")


async def _opened(path: Path, expected: Expected) -> PartFile:
    """The part file, opened in a thread; nobody holds it open if the task is dropped meanwhile."""
    opening = asyncio.ensure_future(asyncio.to_thread(PartFile, path, expected))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


async def _wind_up(part: PartFile, disk: OneBehind) -> None:
    await disk.abandon()
    await asyncio.to_thread(_end, part)


def _end(part: PartFile) -> None:
    try:
        part.sync()
    finally:
        part.close()


def _close(opening: asyncio.Future[PartFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _is_intact(path: Path, blob: Blob) -> bool:
    """Whether the file is there and still has the digest that it is named by; if so it counts as used now."""
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.digest:
                return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
