"""A federation's state as a folder that can be carried away, made beside a running coordinator, and back again.

    BACKUP/journal.sqlite, journal.sqlite-head-NAME   the journal as of one moment
    BACKUP/blobs/ab/abcd...                           every adapter and update that this moment needs
    BACKUP/authority/...                              the folder of [server.identity], unless it was left out
    BACKUP/backup.json                                a digest for every file; written last: without it, no backup

Uploads that have not been submitted stay behind: nobody was promised anything about them. Nothing here changes a
state folder that exists, and no file is believed before its digest is checked.
"""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import ConfigError, CorruptStore, TooBusy, Unavailable, UnknownBlob
from common.failpoints import reach
from common.transfer import named_failures, sync, sync_folder, write_durably
from coordinator.engine import replay
from coordinator.federation.events import LeasesSkipped
from coordinator.federation.state import State
from coordinator.stores.blobs import FileBlobs, digest_of_file
from coordinator.stores.event_codec import entry_of
from coordinator.stores.journal import SqlJournal, head_file
from coordinator.stores.owner import Owner, claim_state_folder

MANIFEST_FILE = "backup.json"
JOURNAL_FILE = "journal.sqlite"
FORMAT = 1
ATTEMPTS = 10  # the running coordinator may sweep what was about to be copied; each time there is a newer moment
LOCK_SECONDS = 10.0  # for a journal that another process holds
SKIPPED_LEASES = 1 << 32  # more than any federation hands out between a backup and its restoration

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Source:
    """Where a federation lives."""

    federation: str
    state_dir: Path
    journal: Path  # the SQLite file
    keep_rounds: int = 1  # older adapters that are taken along if they are still there
    authority: Path | None = None


@dataclass(frozen=True)
class Backup:
    """What a backup folder holds."""

    folder: Path
    federation: str
    round: int  # the newest published one
    sequence: int  # of the newest journal entry
    files: Mapping[str, tuple[str, int]]  # path below the folder -> SHA-256, bytes

    @property
    def has_authority(self) -> bool:
        """Whether the authority's folder came along."""
        return any(name.startswith("authority/") for name in self.files)

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files.values())


class _Swept(Exception):
    """A blob went while it was about to be copied."""


def back_up(source: Source, destination: Path, on_progress: Progress = lambda _, __: None) -> Backup:
    """Copies the state as of one moment; the coordinator may run meanwhile and is not held up.

    Raises ConfigError if the destination exists or there is no state, CorruptStore if the state is damaged, TooBusy if
    the destination's disk is full or the coordinator always was faster.
    """
    if not source.journal.is_file():
        raise ConfigError(f"{source.journal}: there is no journal here, so there is nothing to back up")
    if destination.exists():
        raise ConfigError(f"{destination}: exists already; name a folder that does not")
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.mkdir(mode=0o700)
    try:
        for _ in range(ATTEMPTS):
            try:
                return _copy_moment(source, destination, on_progress)
            except _Swept:
                _remove_all_but_blobs(destination)
        raise TooBusy(f"{destination}: the coordinator finished rounds faster than they could be copied; try again")
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)  # half a backup must not be taken for one
        raise


def read_backup(folder: Path, on_progress: Progress = lambda _, __: None) -> Backup:
    """The backup, after reading every byte of it. Raises ConfigError without one, CorruptStore naming what is wrong."""
    backup = _manifest_of(folder)
    done = 0
    for name, (digest, size_bytes) in backup.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size_bytes or digest_of_file(file) != digest:
            raise CorruptStore(f"{file}: missing, or not what was backed up; use another backup")
        done += size_bytes
        on_progress(done, backup.size_bytes)
    return backup


def restore(
    folder: Path, state_dir: Path, authority: Path | None = None, on_progress: Progress = lambda _, __: None
) -> Backup:
    """Makes a state folder (and, if asked to, the authority's) from a backup. Never over something that is there.

    Leases that the lost time may have given are skipped, so no worker of that time is taken for one of this.
    Raises ConfigError if something is in the way, CorruptStore if the backup is not whole.
    """
    backup = read_backup(folder, on_progress)
    if authority is not None and not backup.has_authority:
        raise ConfigError(f"{folder}: this backup was made without the authority's folder")
    if authority is not None and _is_restored(backup, authority):
        authority = None  # by a restore that was cut off before the state, which comes last
    for target in (state_dir, *([authority] if authority else [])):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target}: something is there already; nothing is ever restored over it")
    begun = [made := _sibling(state_dir)]
    try:
        _copy_files(backup, "", made, skip="authority/")
        (made / "uploads").mkdir(mode=0o700)
        _skip_leases(backup.federation, made)
        claim_state_folder(made, Owner(backup.federation, ""), FileBlobs(made / "blobs"))
        if authority is not None:
            begun.append(kept := _sibling(authority))
            _copy_files(backup, "authority/", kept)
            _put_in_place(kept, authority)
        _put_in_place(made, state_dir)
    except BaseException:
        for half_made in begun:  # also of the authority's key; what is in its place the next try finds there
            shutil.rmtree(half_made, ignore_errors=True)
        raise
    return backup


# ---------------------------------------------------------------- backing up


def _copy_moment(source: Source, destination: Path, on_progress: Progress) -> Backup:
    state, sequence = _copy_journal(source, destination)
    blobs = FileBlobs(source.state_dir / "blobs")
    required = sorted(state.required_blobs)
    wanted = [*required, *_older_adapters(state, source.keep_rounds, blobs)]
    total = sum(_size_of(blobs, digest, required) for digest in wanted)
    done = 0
    for digest in wanted:
        target = destination / "blobs" / digest[:2] / digest
        if not target.exists():  # from an attempt before
            _copy(_open(blobs, digest), target)
        if digest_of_file(target) != digest:
            raise CorruptStore(f"blob {digest}: its bytes changed on disk, so it cannot be backed up")
        done += target.stat().st_size
        on_progress(done, total)
    for copied in list((destination / "blobs").glob("*/*")):
        if copied.name not in wanted:  # of the moment before
            copied.unlink()
    if source.authority is not None:
        for file in _files_below(source.authority):
            _copy(source.authority / file, destination / "authority" / file)
    files = {str(file): _described(destination / file) for file in _files_below(destination)}
    _sync_folders(destination)
    backup = Backup(destination, source.federation, state.round, sequence, files)
    reach("backup.finishing")
    write_durably(destination / MANIFEST_FILE, _manifest(backup), mode=0o600)
    sync_folder(destination.parent)
    return backup


def _copy_journal(source: Source, destination: Path) -> tuple[State, int]:
    """The state and the sequence of the copy, which is checked to its last entry."""
    copy = destination / JOURNAL_FILE
    head = head_file(source.journal, source.federation)
    if head.is_file():  # before the journal: it may only be older
        _copy(head, head_file(copy, source.federation))
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with (
            named_failures(copy),
            closing(sqlite3.connect(f"file:{_quoted(source.journal)}?mode=ro", uri=True, timeout=LOCK_SECONDS)) as live,
            closing(sqlite3.connect(copy)) as target,
        ):
            live.backup(target)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise TooBusy(f"{copy}: the disk is full") from None
        if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise Unavailable(f"{source.journal}: another process has locked it for {LOCK_SECONDS:g} s") from None
        raise CorruptStore(f"{source.journal}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise CorruptStore(f"{source.journal}: {error}") from None
    state, sequence = _replayed(copy, source.federation)
    if not state.manifest_digest:
        raise ConfigError(f"{source.journal}: federation {source.federation!r} is not founded; nothing to back up")
    _sync_file(copy)
    return state, sequence


def _replayed(journal_file: Path, federation: str) -> tuple[State, int]:
    journal = SqlJournal(f"sqlite:///{journal_file}")
    try:
        for _ in journal.read(federation):
            pass  # from the first entry: a snapshot would leave the older ones unread
        state, sequence, _ = replay(federation, journal)
        return state, sequence
    finally:
        journal.close()


def _older_adapters(state: State, keep_rounds: int, blobs: FileBlobs) -> list[str]:
    here = blobs.digests()
    older = {record.adapter_digest for record in state.history[-keep_rounds:]}
    return sorted((older & here) - state.required_blobs)


def _remove_all_but_blobs(destination: Path) -> None:
    """What a further attempt makes anew; blobs never change, so those that are copied need not be copied again."""
    for path in destination.iterdir():
        if path.name == "authority":
            shutil.rmtree(path)
        elif path.name != "blobs":
            path.unlink()


def _size_of(blobs: FileBlobs, digest: str, required: list[str]) -> int:
    try:
        return blobs.open(digest).stat().st_size
    except (UnknownBlob, FileNotFoundError):
        if digest in required:
            raise _Swept from None
        return 0


def _open(blobs: FileBlobs, digest: str) -> Path:
    try:
        return blobs.open(digest)
    except UnknownBlob:
        raise _Swept from None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with named_failures(target):
        try:
            opened = source.open("rb")
        except FileNotFoundError:
            raise _Swept from None
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with opened as reader, os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            sync(writer.fileno(), target)
    reach("backup.copied")


def _files_below(folder: Path) -> Iterator[PurePosixPath]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            yield PurePosixPath(file.relative_to(folder).as_posix())


def _described(file: Path) -> tuple[str, int]:
    return digest_of_file(file), file.stat().st_size


def _sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        sync(opened.fileno(), file)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        sync_folder(Path(folder))


def _quoted(path: Path) -> str:
    # What has a meaning in a URI of SQLite.
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


# ---------------------------------------------------------------- the manifest


def _manifest(backup: Backup) -> bytes:
    fields = {
        "format": FORMAT,
        "federation": backup.federation,
        "round": backup.round,
        "sequence": backup.sequence,
        "files": {name: list(described) for name, described in sorted(backup.files.items())},
    }
    return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode()


def _manifest_of(folder: Path) -> Backup:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: not a finished backup ({MANIFEST_FILE} is written last, and is not there)")
    try:
        fields = json.loads(file.read_bytes())
        checksum = fields.pop("checksum")
        if fields["format"] != FORMAT:
            raise ConfigError(f"{file}: format {fields['format']}, but this raflora reads {FORMAT}")
        files = {str(name): (str(digest), int(size)) for name, (digest, size) in fields["files"].items()}
        backup = Backup(folder, str(fields["federation"]), int(fields["round"]), int(fields["sequence"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{file}: not what was written: {error!r}; use another backup") from None
    if checksum != _checksum(fields) or any(not _is_inside(name) for name in files):
        raise CorruptStore(f"{file}: not what was written (checksum); use another backup")
    return backup


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- restoring


def _sibling(target: Path) -> Path:
    """A new folder of the same file system, so that it can be renamed into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.absolute().with_name(f"{target.name}.restoring-{os.getpid()}")
    made.mkdir(mode=0o700)
    return made


def _is_restored(backup: Backup, authority: Path) -> bool:
    """Whether this folder holds the backup's authority and nothing else."""
    held = {f"authority/{file}": _described(authority / file) for file in _files_below(authority)}
    return held == {name: described for name, described in backup.files.items() if name.startswith("authority/")}


def _copy_files(backup: Backup, below: str, target: Path, skip: str = "\0") -> None:
    for name in backup.files:
        if name.startswith(below) and not name.startswith(skip):
            _copy(backup.folder / name, target / name.removeprefix(below))


def _skip_leases(federation: str, state_dir: Path) -> None:
    """Checks the journal to its end and appends to it. Raises CorruptStore."""
    journal = SqlJournal(f"sqlite:///{state_dir / JOURNAL_FILE}")
    try:
        for _ in journal.read(federation):
            pass
        state, sequence, at = replay(federation, journal)
        blobs = FileBlobs(state_dir / "blobs")
        for digest in state.required_blobs:
            blobs.verify(digest)
        skipped = LeasesSkipped(state.last_lease_token + SKIPPED_LEASES)
        journal.append(federation, [entry_of(skipped, sequence + 1, at)])
    except UnknownBlob as error:
        raise CorruptStore(f"the backup lacks what its journal needs: {error}") from None
    finally:
        journal.close()


def _put_in_place(made: Path, target: Path) -> None:
    _sync_folders(made)
    with named_failures(target):
        os.replace(made, target)  # onto nothing or an empty folder
    reach("backup.restored")
    sync_folder(target.absolute().parent)
