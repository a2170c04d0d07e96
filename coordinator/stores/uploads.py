"""Uploads in progress: resumable, bounded, and checked before they count.

    ROOT/<sha256 of the client id>/<digest>.<announced bytes>.part   arriving
    ROOT/<sha256 of the client id>/<digest>                          complete: its digest was checked

A client has at most one of each: what it announces or completes next replaces the one before, so clients
cannot fill the disk. Nothing here knows rounds or leases, and a complete file is never opened for writing.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from common.errors import (
    CorruptStore,
    CorruptTransfer,
    InvalidRequest,
    TooBusy,
    UnknownBlob,
    UploadTakenOver,
    WrongSize,
)
from common.failpoints import reach
from common.transfer import Expected, PartFile, RunningDigest, check_digest, named_failures, sync, sync_folder
from coordinator.stores.blobs import FileBlobs, digest_of_file
from coordinator.stores.disk import Disk

_FILE_NAME = re.compile(r"(?P<digest>[0-9a-f]{64})(\.(?P<size_bytes>[0-9]{1,18})\.part)?")


class Upload:
    """One stream of bytes into a part file, from UploadSpool.open. Call `close` in a finally.

    Every other method raises UploadTakenOver once a newer stream of the same client has begun.
    """

    def __init__(self, desk: "_Desk", part: PartFile, expected: Expected) -> None:
        self._desk = desk
        self._part = part
        self._expected = expected

    def append(self, offset: int, data: bytes | memoryview) -> None:
        """Writes the next chunk. Raises WrongOffset or WrongSize, and writes nothing then."""
        with self._desk.lock:
            self._check_is_current()
            self._part.append(offset, data)
            self._desk.note_arrival(len(data))

    def finish(self) -> int:
        """Ends the stream: what arrived is durable; if that is everything, the upload is complete.

        Returns the committed bytes. Raises CorruptTransfer, and forgets the bytes, if everything is here
        but is not what was announced.
        """
        with self._desk.lock:
            self._check_is_current()
            self._part.sync()
            if self._part.is_complete:
                self._desk.complete(self._part, self._expected.digest)
            committed_bytes = self._part.committed_bytes
            self._desk.end_stream()
            return committed_bytes

    def close(self) -> None:
        """Ends the stream if it has not ended yet; what arrived stays for the next one."""
        with self._desk.lock:
            if self._desk.part is self._part:
                self._desk.end_stream()

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to close; read without waiting for anybody."""
        return self._desk.part is not self._part

    @property
    def size_bytes(self) -> int:
        """Of the whole upload, as it was announced."""
        return self._expected.size_bytes

    def too_long(self) -> WrongSize:
        """What is wrong with bytes behind the last one."""
        return WrongSize(f"{self._expected.whose}: more bytes than the {self.size_bytes} that were announced")

    def _check_is_current(self) -> None:
        if self._desk.part is not self._part:
            raise UploadTakenOver(f"{self._expected.whose}: this stream has ended or a newer one carries the upload on")


class Arrival:
    """The chunks of one call: a stream that is opened by the first one and finished by the upload's last one.

    So an upload of one chunk is one piece of work for one thread. Raises what UploadSpool.open and Upload do.
    """

    def __init__(self, open_stream: Callable[[], Upload]) -> None:
        self._open_stream = open_stream
        self._upload: Upload | None = None
        self.committed_bytes = 0  # told by the end
        self.is_complete = False

    @property
    def has_to_be_closed(self) -> bool:
        """Whether a stream is left open; read without waiting for anybody."""
        return self._upload is not None and not self._upload.has_ended

    def take(self, offset: int, data: bytes | memoryview) -> None:
        """Writes the next chunk; with the last one the upload is complete."""
        upload = self._stream()
        if self.is_complete:
            raise upload.too_long()
        upload.append(offset, data)
        if offset + len(data) == upload.size_bytes:
            self.end()
            self.is_complete = True

    def end(self) -> int:
        """Ends the stream; the bytes that are durable then."""
        reach("upload.ending")
        self.committed_bytes = self._stream().finish()
        return self.committed_bytes

    def close(self) -> None:
        """Ends the stream if it has not ended yet; what arrived stays for the next one."""
        self._stream().close()

    def _stream(self) -> Upload:
        if self._upload is None:
            self._upload = self._open_stream()
        return self._upload


class UploadSpool:
    """The uploads of all clients. Every method may wait for the disk and may be called from any thread."""

    def __init__(self, root: Path, blobs: FileBlobs, max_open: int, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk(root)
        self._blobs = blobs
        self._streams = threading.BoundedSemaphore(max_open)
        self._lock = threading.Lock()  # guards the dict below; never held while waiting for the disk
        self._desks: dict[str, _Desk] = {}
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.iterdir():
            _remove(path for path in folder.iterdir() if not _FILE_NAME.fullmatch(path.name))
            _remove_if_empty(folder)

    def begin(self, client_id: str, digest: str, size_bytes: int) -> int:
        """Announces an upload and returns how much of it is durable; `size_bytes` means that it is complete.

        Ends the client's stream and drops whatever else it was sending. Raises TooBusy if no stream is free, or no
        room on the disk.
        """
        expected = _expected(client_id, digest, size_bytes)
        desk = self._desk_of(client_id)
        with desk.lock:
            desk.end_stream()
            complete = desk.folder / digest
            if complete.is_file():
                return _check_announced(expected, complete.stat().st_size)
            desk.reserve(expected)
            # Until the return: so a client learns now, and not after megabytes, that there is no place for it.
            part = desk.start_stream(desk.announce(expected), expected)
            try:
                if part.is_complete:  # the stream broke between the last byte and its end
                    with suppress(CorruptTransfer):
                        desk.complete(part, digest)
                return part.committed_bytes
            finally:
                desk.end_stream()

    def open(self, client_id: str, digest: str) -> Upload:
        """The stream of an upload that was announced; ends an older stream of this client.

        Raises UnknownBlob if it was not announced or is complete already, TooBusy if no stream is free.
        """
        desk = self._desk_of(client_id)
        with desk.lock:
            path = desk.part_of(check_digest(digest, f"client {client_id}"))
            if path is None:
                raise UnknownBlob(f"client {client_id}: no upload of {digest[:12]} is open; announce it first")
            expected = _expected(client_id, digest, _announced_bytes(path))
            desk.end_stream()
            return Upload(desk, desk.start_stream(path, expected), expected)

    def arrival(self, client_id: str, digest: str) -> Arrival:
        """The chunks of one call of an upload that was announced. Opens nothing yet."""
        return Arrival(partial(self.open, client_id, digest))

    def committed_bytes(self, client_id: str, digest: str) -> int:
        """How much of this client's upload is durable; 0 if it never began."""
        check_digest(digest, f"client {client_id}")
        desk = self._desk_of(client_id)
        with desk.lock:
            path = desk.part_of(digest) or desk.folder / digest
            return _durable_bytes(path) if path.is_file() else 0

    def completed_path(self, client_id: str, digest: str) -> Path:
        """The checked file, to be read only. Raises UnknownBlob unless this very client uploaded all of it."""
        check_digest(digest, f"client {client_id}")
        complete = self._desk_of(client_id).folder / digest
        if not complete.is_file():
            raise UnknownBlob(f"client {client_id}: no upload with the digest {digest[:12]} is complete")
        return complete

    def checked_path(self, client_id: str, digest: str) -> Path:
        """Like completed_path, after reading every byte: it was checked when it arrived, and has lain on a disk since.

        Raises CorruptTransfer, and forgets the upload, if it is no longer what arrived.
        """
        desk = self._desk_of(client_id)
        with desk.lock:
            path = self.completed_path(client_id, digest)
            if digest_of_file(path) != digest:
                desk.forget(digest)
                raise CorruptTransfer(
                    f"client {client_id}: upload {digest[:12]} changed on the coordinator's disk; send it again"
                )
            return path

    def commit(self, client_id: str, digest: str) -> None:
        """Makes a completed upload a blob, without a copy; it stays here too. Raises UnknownBlob."""
        with self._desk_of(client_id).lock:
            self._blobs.adopt(self.completed_path(client_id, digest), digest)

    def discard(self, client_id: str, digest: str) -> None:
        """Forgets one upload of the client; ends its stream."""
        desk = self._desk_of(client_id)
        with desk.lock:
            desk.forget(check_digest(digest, f"client {client_id}"))

    @property
    def open_streams(self) -> int:
        """Uploads whose bytes are arriving now."""
        with self._lock:
            return sum(desk.part is not None for desk in self._desks.values())

    def sweep(self, client_ids: Iterable[str], gone: Iterable[str] = ()) -> None:
        """Forgets the uploads of everybody but these clients; a stream ends by itself unless its client has gone."""
        known, ended = ({_folder_name(client_id) for client_id in ids} for ids in (client_ids, gone))
        for folder in self._root.iterdir():
            if folder.name not in known - ended:
                desk = self._desk_named(folder.name)
                with desk.lock:
                    if desk.part is None or folder.name in ended:
                        desk.forget_all()

    def _desk_of(self, client_id: str) -> "_Desk":
        return self._desk_named(_folder_name(client_id))

    def _desk_named(self, name: str) -> "_Desk":
        with self._lock:
            if name not in self._desks:
                self._desks[name] = _Desk(self._root / name, self._streams, self._disk)
            return self._desks[name]


class _Desk:
    """One client's folder and its only stream. The caller of every method holds the lock."""

    def __init__(self, folder: Path, streams: threading.BoundedSemaphore, disk: Disk) -> None:
        self.lock = threading.Lock()
        self.folder = folder
        self.part: PartFile | None = None
        self._digest = ""  # of the stream
        self._hashed = ("", RunningDigest())  # of which upload this process has written how much: calls are short
        self._streams = streams
        self._disk = disk

    def reserve(self, expected: Expected) -> None:
        """Keeps room on the disk for what is still to arrive. Raises TooBusy, and changes no file then."""
        part = self.part_of(expected.digest)
        here = part.stat().st_size if part is not None else 0
        self._disk.reserve(self.folder.name, max(0, expected.size_bytes - here), expected.whose)

    def note_arrival(self, size_bytes: int) -> None:
        self._disk.arrived(self.folder.name, size_bytes)

    def start_stream(self, path: Path, expected: Expected) -> PartFile:
        if not self._streams.acquire(blocking=False):
            raise TooBusy(f"{expected.whose}: as many uploads are under way as are allowed; try again in a moment")
        digest, hashed = self._hashed
        try:
            self.part = PartFile(path, expected, hashed if digest == expected.digest else None)
        except BaseException:
            self._streams.release()
            raise
        self._digest = expected.digest
        return self.part

    def end_stream(self) -> None:
        part, self.part = self.part, None
        if part is not None:
            self._hashed = (self._digest, part.digest)
            self._streams.release()
            part.close()

    def part_of(self, digest: str) -> Path | None:
        return next(iter(self.folder.glob(f"{digest}.*.part")), None)

    def announce(self, expected: Expected) -> Path:
        """The part file of this upload, its size in the name so that a restart knows it; drops all others."""
        path = self.folder / f"{expected.digest}.{expected.size_bytes}.part"
        _remove(older for older in self.folder.glob("*.part") if older != path)
        with named_failures(self.folder):
            self.folder.mkdir(exist_ok=True)
        with named_failures(path):
            reach("upload.announcing")
            path.touch()
        reach("upload.announced")
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        return path

    def complete(self, part: PartFile, digest: str) -> None:
        part.finish(self.folder / digest)
        self._disk.release(self.folder.name)
        reach("upload.completed")
        _remove(older for older in self.folder.iterdir() if older.name != digest)

    def forget(self, digest: str) -> None:
        if self._digest == digest:
            self.end_stream()
            self._disk.release(self.folder.name)
        _remove(self.folder.glob(f"{digest}*"))
        _remove_if_empty(self.folder)

    def forget_all(self) -> None:
        self.end_stream()
        self._disk.release(self.folder.name)
        _remove(self.folder.glob("*"))
        _remove_if_empty(self.folder)


def _folder_name(client_id: str) -> str:
    # A client id comes from outside: it must not choose a path.
    return hashlib.sha256(client_id.encode()).hexdigest()


def _expected(client_id: str, digest: str, size_bytes: int) -> Expected:
    whose = f"client {client_id}"
    if size_bytes < 1:
        raise InvalidRequest(f"{whose}: an upload of {size_bytes} bytes was announced; at least one is needed")
    return Expected(check_digest(digest, whose), size_bytes, whose)


def _check_announced(expected: Expected, size_bytes: int) -> int:
    if size_bytes != expected.size_bytes:
        raise InvalidRequest(
            f"{expected.whose}: {size_bytes} bytes of {expected.digest[:12]}, but its size is {expected.size_bytes}"
        )
    return size_bytes


def _announced_bytes(part: Path) -> int:
    match = _FILE_NAME.fullmatch(part.name)
    if match is None or match["size_bytes"] is None:
        raise CorruptStore(f"upload {part}: the name holds no announced size; nobody but raflora may write here")
    return int(match["size_bytes"])


def _durable_bytes(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor, path)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        reach("upload.unlinking")
        path.unlink(missing_ok=True)
        reach("upload.unlinked")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
