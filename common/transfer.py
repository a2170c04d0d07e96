"""Bytes that arrive in chunks and survive an interruption: a part file with an offset and a digest.

Both directions use it: the coordinator for uploads, the worker for downloads. Nothing here knows gRPC.
The order is the promise: write, fsync, check the digest, rename, fsync the folder; only then is it complete.
A full disk or too many open files is TooBusy and the bytes may be sent again; any other failure of the disk is
StorageFailed, and the end.
"""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from common.errors import (
    CorruptTransfer,
    InvalidRequest,
    StorageFailed,
    TooBusy,
    UnknownBlob,
    WrongOffset,
    WrongSize,
)
from common.failpoints import reach

CHUNK_BYTES = 1 << 20  # well under gRPC's 4 MiB default, so no side must raise it
SYNC_BYTES = 16 << 20  # at most this much is sent again after a crash
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CROWDED = frozenset({errno.EMFILE, errno.ENFILE})
_lost: set[Path] = set()  # what an fsync of this process failed for
_BROKEN = frozenset({errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE})


def check_digest(digest: str, whose: str) -> str:
    """The digest itself; InvalidRequest unless it is 64 hexadecimal digits (so it is safe as a file name)."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{whose}: digest {digest[:80]!r} is not a SHA-256 of 64 hexadecimal digits")
    return digest


def chunks_of(path: Path, offset: int = 0) -> Generator[bytes]:
    """The file's bytes from an offset, in chunks that end at multiples of CHUNK_BYTES, so that no number is cut in two.

    Raises WrongOffset beyond its end, UnknownBlob if it is gone.
    """
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise UnknownBlob(f"blob {path.name[:12]} was deleted meanwhile; ask for the newest one") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if not 0 <= offset <= size:
            raise WrongOffset(f"offset {offset}: the blob has {size} bytes", committed_bytes=size)
        file.seek(offset)
        yield from chunks_from(file, offset)


def chunks_from(file: BinaryIO | FileIO, offset: int, most_bytes: int | None = None) -> Generator[bytes]:
    """The same of an open file that stands at this offset, and at most so many bytes."""
    ends_at = None if most_bytes is None else offset + most_bytes
    while ends_at is None or offset < ends_at:
        wanted = CHUNK_BYTES - offset % CHUNK_BYTES
        chunk = file.read(wanted if ends_at is None else min(wanted, ends_at - offset))
        if not chunk:
            return
        offset += len(chunk)
        yield chunk


@dataclass(frozen=True)
class Expected:
    """What was announced before the first byte."""

    digest: str
    size_bytes: int
    whose: str  # for messages: "client ada", "slice for ada"


class RunningDigest:
    """SHA-256 of what was written so far, so that nothing need be read again in the end."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes in."""
        self._sha256.update(data)
        self.size_bytes += len(data)

    def hexdigest(self) -> str:
        """Of all of them."""
        return self._sha256.hexdigest()


class PartFile:
    """One transfer that is not complete yet, on disk.

    `committed_bytes` is what survives a crash of this process or machine.
    Call `close` in a finally; a part file that is not finished stays for the next attempt. `digest`, of the attempt
    before in this process, spares it from being read again; it counts only if it is of as many bytes as are found.
    """

    def __init__(self, path: Path, expected: Expected, digest: RunningDigest | None = None) -> None:
        self._path = path
        self._expected = expected
        self._digest = digest or RunningDigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: bytes that a full disk refused must not be written again by a later flush.
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        reach("part.opened")
        self._written, self._synced = self._file.seek(0, os.SEEK_END), 0
        if self._digest.size_bytes != self._written:
            self._digest = RunningDigest()
        if self._written > expected.size_bytes:
            self._restart()
        elif self._written:
            self._sync_what_was_found()

    @property
    def committed_bytes(self) -> int:
        """The offset at which the sender goes on."""
        return self._synced

    @property
    def digest(self) -> RunningDigest:
        """Of what this process has written; for the next attempt."""
        return self._digest

    def append(self, offset: int, data: bytes | memoryview) -> None:
        """Writes the next chunk. Raises WrongOffset, WrongSize or TooBusy, and keeps nothing of it then."""
        if offset != self._written:
            self.sync()  # so that the offset in the answer is the one that is taken next
            raise WrongOffset(
                f"{self._expected.whose}: chunk at byte {offset}, expected {self._written}",
                committed_bytes=self._synced,
            )
        if offset + len(data) > self._expected.size_bytes:
            raise WrongSize(
                f"{self._expected.whose}: more bytes than the {self._expected.size_bytes} that were announced"
            )
        with self._undone(self._written):
            reach("part.writing")
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        reach("part.written")
        if self._digest.size_bytes == self._written:
            self._digest.update(data)
        self._written += len(data)
        if self._written - self._synced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Makes everything written so far durable. A failed fsync is never retried: the error goes up."""
        if self._synced == self._written:
            return
        # The kernel may count pages as clean that it could not write: what the fsync was for is thrown away.
        with self._undone(self._synced):
            sync(self._file.fileno(), self._path)
        self._synced = self._written

    @property
    def is_complete(self) -> bool:
        """Every announced byte is durable; the digest is not yet checked."""
        return self._synced == self._expected.size_bytes

    def finish(self, target: Path) -> None:
        """Checks the digest and gives the file its name.

        Raises CorruptTransfer, and forgets the bytes, if they are not the announced ones.
        """
        self.sync()
        found = self._digest_found()
        if found != self._expected.digest or not self.is_complete:
            size = self._written
            self._restart()
            raise CorruptTransfer(
                f"{self._expected.whose}: {size} bytes with the digest {found[:12]}, "
                f"expected {self._expected.size_bytes} with {self._expected.digest[:12]}; send them again"
            )
        self._file.close()
        reach("part.checked")
        rename_durably(self._path, target)

    def close(self) -> None:
        """Ends this attempt; what was synced stays."""
        self._file.close()

    def _digest_found(self) -> str:
        if self._digest.size_bytes == self._written:
            return self._digest.hexdigest()
        self._file.seek(0)  # an earlier process has written some of it
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def _sync_what_was_found(self) -> None:
        # The attempt before may have ended between a write and its fsync.
        try:
            self.sync()
        except BaseException:
            self._file.close()
            raise

    @contextmanager
    def _undone(self, size_bytes: int) -> Iterator[None]:
        """If the disk is full the file has this size again, and everything in it was durable or may still be."""
        try:
            with named_failures(self._path):
                yield
        except TooBusy:
            self._cut(size_bytes)
            raise

    def _cut(self, size_bytes: int) -> None:
        reach("part.truncating")
        self._file.truncate(size_bytes)
        reach("part.truncated")
        self._file.seek(size_bytes)
        self._written, self._synced = size_bytes, min(self._synced, size_bytes)
        if not size_bytes or self._digest.size_bytes > size_bytes:
            # Of bytes that are no longer there; unless it begins anew with the file, all of it is read in the end.
            self._digest = RunningDigest()

    def _restart(self) -> None:
        self._cut(0)


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Writes a whole file so that after a crash it is there whole or not at all; the umask takes from `mode`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two threads or processes may write the same content-addressed file at once.
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with named_failures(path), open(part, "wb", opener=partial(os.open, mode=mode)) as file:
            reach("file.writing")
            file.write(content)
            file.flush()
            reach("file.written")
            sync(file.fileno(), path)
        rename_durably(part, path)
    except TooBusy:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def sweep_parts(folder: Path, of: str = "*") -> None:
    """Removes what writers that died in `write_durably` left in this folder, of all files or of this one.

    Only while nobody writes there.
    """
    for part in folder.glob("*.part" if of == "*" else f"{escape(of)}.*-*.part"):
        part.unlink(missing_ok=True)
        reach("part.swept")


def rename_durably(source: Path, target: Path) -> None:
    """Gives a durable file its name. Raises StorageFailed, TooBusy."""
    with named_failures(target):
        reach("file.renaming")
        os.replace(source, target)
    reach("file.renamed")
    sync_folder(target.parent)


class _FolderSyncs:
    """Syncs of folders that share a lock: one at a time, and one for all who have asked before it began.

    One at a time, because the kernel tells of a failure once, and whoever is second would be told that all is well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = 0
        self._done: dict[Path, int] = {}  # by folder, the last one that began and succeeded

    def sync(self, descriptor: int, folder: Path) -> None:
        """As sync_folder."""
        asked_after = self._begun  # that one may have begun before the caller's change
        with self._lock:
            if self._done.get(folder, 0) > asked_after:
                return
            self._begun += 1
            sync(descriptor, folder)
            self._done = {folder: self._begun}  # whoever waits for another folder syncs it


_FOLDERS = tuple(_FolderSyncs() for _ in range(64))


def sync_folder(folder: Path) -> None:
    """Makes renames and deletions inside a folder durable. Raises StorageFailed, TooBusy."""
    with named_failures(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with named_failures(folder):
            reach("folder.syncing")
        _FOLDERS[hash(folder) % len(_FOLDERS)].sync(descriptor, folder)
    finally:
        os.close(descriptor)
    reach("folder.synced")


def sync(descriptor: int, path: Path) -> None:
    """Makes the bytes of an open file, or the names in an open folder, durable. Raises StorageFailed, TooBusy.

    What failed once is not asked again, by no thread of this process: the answer would mean nothing.
    """
    if path in _lost:
        raise StorageFailed(f"{path}: the disk did not keep what it was given before")
    try:
        reach("bytes.syncing")
        os.fsync(descriptor)
    except OSError as error:
        named = _named(error, path)
        if isinstance(named, StorageFailed):
            _lost.add(path)
        raise named from error
    reach("bytes.synced")


@contextmanager
def named_failures(path: Path) -> Iterator[None]:
    """Gives a disk that is full, broken or gone, or too many open files, a name: TooBusy or StorageFailed.

    Other errors stay what they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL | _CROWDED | _BROKEN:
            raise _named(error, path) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no room left on the disk, or none for this user."""
    return isinstance(error, OSError) and error.errno in _FULL


def shortage_of(error: BaseException) -> str:
    """What there is too little of, if that is all that is wrong and it may pass; else empty."""
    if is_disk_full(error):
        return "the disk is full"
    return "too many files are open" if isinstance(error, OSError) and error.errno in _CROWDED else ""


def _named(error: OSError, path: Path) -> TooBusy | StorageFailed:
    if shortage := shortage_of(error):
        name = path.name[:12] if _DIGEST.match(path.name) else path.name
        return TooBusy(f"{name}: {shortage}; try again later")
    return StorageFailed(f"{path}: the disk did not keep what it was given: {error.strerror or error}")
