"""Blobs: immutable bytes under the name of their SHA-256, durable before the name is given out.

Nothing here knows what the bytes mean. Four verbs, so that an object store can take the place of the folder.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from common.codec import digest_of
from common.errors import CorruptStore, UnknownBlob
from common.failpoints import reach
from common.transfer import check_digest, named_failures, sync_folder, write_durably


class BlobStore(Protocol):
    """Bytes by content. Safe to call from several threads."""

    def put(self, content: bytes) -> str:
        """Stores the bytes and returns their digest; durable when it returns."""

    def open(self, digest: str) -> Path:
        """A local file with the bytes, to be read only. Raises UnknownBlob."""

    def verify(self, digest: str) -> Path:
        """Like open, after reading every byte. Raises CorruptStore if they are not those that were stored."""

    def delete(self, digest: str) -> None:
        """Forgets the bytes; does nothing if they are not here."""


class FileBlobs:
    """Blobs as files `ROOT/ab/abcd...`, all in one file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        sync_folder(root.parent)

    def put(self, content: bytes) -> str:
        """See BlobStore. Bytes that are here but damaged are written anew."""
        digest = digest_of(content)
        path = self._path(digest)
        if path.is_file() and digest_of_file(path) == digest:
            sync_folder(path.parent)  # whoever wrote it may have died before this step
        else:
            self._make_shard(path.parent)
            write_durably(path, content)
        reach("blob.stored")
        return digest

    def open(self, digest: str) -> Path:
        """See BlobStore."""
        path = self._path(digest)
        if not path.is_file():
            raise UnknownBlob(f"blob {digest[:12]}: never stored here, or deleted")
        return path

    def delete(self, digest: str) -> None:
        """See BlobStore."""
        path = self._path(digest)
        if path.is_file():
            with named_failures(path):
                reach("blob.unlinking")
                path.unlink(missing_ok=True)
            reach("blob.unlinked")
            sync_folder(path.parent)

    def set_aside(self, digests: Iterable[str]) -> list[Path]:
        """Forgets these bytes at once; the files that are left are for `remove`, since freeing much room takes long.

        Not durable: what a crash brings back is found by the next sweep.
        """
        aside = []
        for path in filter(Path.is_file, map(self._path, digests)):
            with named_failures(path):
                reach("blob.unlinking")
                aside.append(path.replace(path.with_name(f"{path.name}.aside.part")))
            reach("blob.unlinked")
        return aside

    def remove(self, aside: Iterable[Path]) -> None:
        """Frees the room of what was set aside."""
        for path in aside:
            path.unlink(missing_ok=True)
            reach("stray.unlinked")

    def adopt(self, path: Path, digest: str) -> None:
        """Takes in a durable, checked file of the same file system, without a copy; the source keeps its name.

        Both names mean the same bytes from now on, so nobody may write to the source.
        """
        target = self._path(digest)
        self._make_shard(target.parent)
        with named_failures(target):
            reach("blob.linking")
            try:
                os.link(path, target)
            except FileExistsError:
                if digest_of_file(target) != digest:  # sent again because what was here is damaged
                    part = target.with_name(f"{digest}.{os.getpid()}-{threading.get_ident()}.part")
                    part.unlink(missing_ok=True)
                    os.link(path, part)
                    os.replace(part, target)
        reach("blob.linked")
        sync_folder(target.parent)

    def verify(self, digest: str) -> Path:
        """See BlobStore."""
        path = self.open(digest)
        found = digest_of_file(path)
        if found != digest:
            raise CorruptStore(f"blob {path}: its bytes changed on disk (their digest is {found[:12]})")
        return path

    def digests(self) -> set[str]:
        """The names of all blobs."""
        return {path.name for path in self._root.glob("??/*") if path.suffix != ".part"}

    def sweep(self) -> None:
        """Removes what a crash left half written. Only at start: nobody may be writing."""
        for part in self._root.glob("??/*.part"):
            part.unlink(missing_ok=True)
            reach("stray.unlinked")

    def _path(self, digest: str) -> Path:
        check_digest(digest, "blob store")
        return self._root / digest[:2] / digest

    def _make_shard(self, folder: Path) -> None:
        if not folder.is_dir():
            with named_failures(folder):
                reach("shard.making")
                folder.mkdir(exist_ok=True)
            reach("shard.made")
        sync_folder(self._root)


def digest_of_file(path: Path) -> str:
    """SHA-256 of all its bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
