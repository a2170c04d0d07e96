"""`raflora backup` and `raflora restore`: a federation's state as a folder, made beside a running coordinator.

Both work on files of this machine and ask nobody over the network.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cli.authority import hint
from cli.output import Format
from cli.words import plain
from common.errors import ConfigError
from common.settings import load_settings
from common.sizes import human_bytes
from coordinator.config import CoordinatorConfig
from coordinator.stores.backup import JOURNAL_FILE, Backup, Source, back_up
from coordinator.stores.backup import restore as restore_backup
from coordinator.stores.database import sqlite_file
from coordinator.stores.owner import OWNER_FILE, owner_of


def backup(
    state_or_config: Path,
    destination: Path,
    /,
    *,
    without_authority: Annotated[
        bool, Parameter(help="Leave the folder of [server.identity] out; its key can issue every certificate.")
    ] = False,
    format: Annotated[Format, Parameter(help="table or json.")] = "table",
) -> None:
    """Copies a federation's state into DESTINATION, which must not exist; the coordinator may go on meanwhile.

    STATE_OR_CONFIG is the coordinator's state folder or its settings file. With the settings file the authority's
    folder comes along. Keep the copy as safe as the original: it holds what only the operator may know.
    """
    source = _source_of(state_or_config, with_authority=not without_authority)
    with _bar("copying", format) as on_progress:
        made = back_up(source, destination, on_progress)
    _tell(made, format, f"{plain(str(destination))}: {_sentence(made)}")


def restore(
    backup_folder: Path,
    state_dir: Path,
    /,
    *,
    authority: Annotated[
        Path | None, Parameter(help="Also restore the authority's folder, to here (see server.identity.folder).")
    ] = None,
    format: Annotated[Format, Parameter(help="table or json.")] = "table",
) -> None:
    """Makes the state folder STATE_DIR from a backup, after checking every byte of it; never over an existing one.

    Then start the coordinator on it as ever. Workers go on by themselves: what they sent after the backup was made,
    they are asked for again.
    """
    with _bar("checking", format) as on_progress:
        restored = restore_backup(backup_folder, state_dir, authority, on_progress)
    _tell(restored, format, f"{plain(str(state_dir))}: restored, {_sentence(restored)}")
    if authority is not None:
        hint(
            "the authority is as it was then: revoke again what was revoked after the backup (`raflora site revoke "
            f"NAME --folder {plain(str(authority))}`), and add again what was added"
        )


def _source_of(path: Path, *, with_authority: bool) -> Source:
    if path.is_dir():
        if not (path / OWNER_FILE).is_file():
            raise ConfigError(f"{path}: no coordinator's state folder ({OWNER_FILE} is not there)")
        owner = owner_of(path)
        if owner.journal:
            raise ConfigError(f"{path}: its journal is elsewhere ({owner.journal}); name the settings file instead")
        return Source(owner.federation, path, path / JOURNAL_FILE)
    settings = load_settings(CoordinatorConfig, path)
    journal = sqlite_file(settings.store.journal) if settings.store.journal else settings.state_dir / JOURNAL_FILE
    if journal is None:
        raise ConfigError(f"{path}: store.journal is not SQLite; back that database up with its own tools (pg_dump)")
    identity = settings.server.identity
    return Source(
        settings.name,
        settings.state_dir,
        journal,
        settings.store.keep_rounds,
        identity.folder if identity is not None and with_authority else None,
    )


@contextmanager
def _bar(what: str, format: Format) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=format == "json" or not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _sentence(backup: Backup) -> str:
    return (
        f"federation {plain(backup.federation)} after round {backup.round}, {backup.sequence} journal entries, "
        f"{len(backup.files)} files, {human_bytes(backup.size_bytes)}"
    )


def _tell(backup: Backup, format: Format, sentence: str) -> None:
    if format == "table":
        print(sentence)
        return
    fields = {
        "folder": str(backup.folder),
        "federation": backup.federation,
        "round": backup.round,
        "sequence": backup.sequence,
        "files": len(backup.files),
        "size_bytes": backup.size_bytes,
        "has_authority": backup.has_authority,
    }
    print(json.dumps(fields, indent=2))
