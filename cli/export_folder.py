"""The folder that an export goes into: free or made free, filled beside it and put in its place when it is whole."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.export_card import CARD_FILE
from cli.export_origin import RECORD_FILE
from common.errors import ConfigError
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE

# What an export of another kind would leave behind: transformers loads an adapter that lies beside a model, and one
# file of weights rather than shards.
_OF_AN_EXPORT = (
    *(CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, RECORD_FILE),
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
)


def free_folder(folder: Path, *, overwrite: bool) -> Path:
    """The folder's absolute path; the one around it is there. Raises ConfigError if something else is in it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise ConfigError(f"{folder}: holds files already; name another folder or pass --overwrite")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder beside it, whose content takes its place when the block ends well; nothing stays otherwise."""
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        yield staging
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def files_in(folder: Path) -> list[str]:
    """Every file in it, relative, with slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    for pattern in _OF_AN_EXPORT:
        for path in folder.glob(pattern):
            path.unlink()
    for name in files_in(staging):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target)
