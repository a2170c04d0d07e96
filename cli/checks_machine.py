"""Checks of this machine: versions, disk, model, data, GPU, an authority's folder. No network; nothing is changed.

What has to be written to be known (does a file last?) is written beside the rest and taken away again.
"""

import csv
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cli.checks import Check, failed, ok, warning
from common.errors import ConfigError
from common.sizes import human_bytes
from common.transfer import is_disk_full
from common.version import software_version
from worker.config import DataConfig, LaunchConfig, ModelConfig
from worker.launch import check_launch

WORKER_PACKAGES = ("torch", "transformers", "peft")
LITTLE_BYTES = 1 << 30
NO_BYTES = 64 << 20
CHILD_SECONDS = 120.0  # importing torch from a cold disk takes its time
_FIRST_BAD_SQLITE, _FIRST_GOOD_SQLITE = (3, 7, 0), (3, 51, 3)
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "glusterfs", "gpfs", "beegfs", "afs", "fuse.sshfs"}
)
_FILE_KINDS = (".jsonl", ".csv", ".parquet")
_READ_COLUMNS = ("text_column", "prompt_column", "messages_column", "image_column", "feature_column")
_LONGEST_LINE = 1 << 20
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH = "import torch; c = torch.cuda; print(torch.__version__, c.is_available(), c.device_count())"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def check_versions(role: str = "") -> Iterator[Check]:
    """Python, ours and the libraries' that a worker or coordinator needs; of nobody in particular: no more."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("versions", f"raflora {software_version()}, Python {python}, grpcio {version('grpcio')}")
    if role == "worker":
        yield _worker_packages()
    elif role == "coordinator":
        yield _sqlite(sqlite3.sqlite_version_info)


def _worker_packages() -> Check:
    found, missing = [], []
    for package in WORKER_PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        advice = 'install torch for your GPU first, then: pip install "raflora[worker]"'
        return failed("training libraries", f"{', '.join(missing)} not installed", advice)
    return ok("training libraries", ", ".join(found))


def _sqlite(found: tuple[int, ...]) -> Check:
    number = ".".join(map(str, found))
    if _FIRST_BAD_SQLITE <= found < _FIRST_GOOD_SQLITE:
        return ok(
            "SQLite",
            f"{number}; good for one writer, which is what a coordinator is: let no other program write to its journal",
        )
    return ok("SQLite", number)


def check_disk(name: str, folder: Path, mounts: str | None = None) -> Iterator[Check]:
    """Whether a folder keeps what is written to it; `mounts` as in /proc/self/mountinfo."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        yield failed(name, f"{there} is a file, not a folder", f"name another {name}")
        return
    try:
        free_bytes = shutil.disk_usage(there).free
        _try_to_keep(there if there == folder.absolute() else None)
    except OSError as error:
        yield _disk_refusal(name, folder, error)
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield failed(name, f"{there} cannot be written to by this user", "give this user the folder, or name another")
        return
    kind = _file_system_of(there, _mountinfo() if mounts is None else mounts)
    room = f"{folder}: {human_bytes(free_bytes)} free"
    if free_bytes < NO_BYTES:
        yield failed(name, room, "make room, or name a folder on another disk")
    elif kind in _NETWORK_FILE_SYSTEMS:
        advice = "use a local disk: locks and fsync are not to be relied on across a network"
        yield warning(name, f"{room}, on a network file system ({kind})", advice)
    elif free_bytes < LITTLE_BYTES:
        yield warning(name, room, "that is little; adapters and checkpoints need room")
    else:
        yield ok(name, f"{room}{f' ({kind})' if kind else ''}")


def _try_to_keep(folder: Path | None) -> None:
    """Writes and fsyncs a file without a name, if there is a folder to do it in; it is gone when this returns."""
    if folder is None:
        return
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"\0" * 65_536)
        os.fsync(file.fileno())


def _disk_refusal(name: str, folder: Path, error: OSError) -> Check:
    if is_disk_full(error):
        return failed(name, f"{folder}: the disk is full", "make room, or name a folder on another disk")
    if isinstance(error, PermissionError):
        return failed(name, f"{folder} cannot be written to by this user", "give this user the folder, or name another")
    return failed(name, f"{folder}: nothing can be kept there: {error.strerror or error}", "look at the disk")


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _file_system_of(folder: Path, mounts: str) -> str:
    """The type of the file system that a folder is on; empty if it cannot be told."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split()
        if not dash or len(fields) < 5:
            continue
        place = Path(fields[4].replace("\\040", " "))
        if (folder == place or place in folder.parents) and len(place.parts) > best:
            best, kind = len(place.parts), after.split()[0]
    return kind


def check_model(config: ModelConfig) -> Check:
    """Whether the base model's files are there and can be read; a hub id is taken on trust."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        if _looks_local(config.path):
            found = f"{folder.absolute()}: there is no such folder"
            return failed("model", found, "set model.path to the base model's folder")
        where = "from the local cache" if config.offline else "from the hub, at the first start"
        return ok("model", f"{config.path} is no local folder, so a hub id: loaded {where}")
    try:
        files = [folder / name for name in _weights_in(folder)] + [folder / "config.json"]
        size_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            path.open("rb").close()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{folder / _INDEX}: {error!r}"
        return failed("model", found, f"the folder needs config.json and {_WEIGHTS} (or its shards and their index)")
    return ok("model", f"{folder}: {human_bytes(size_bytes)}")


def _looks_local(path: str) -> bool:
    """Whether this can be no hub id, which is NAME or ORGANISATION/NAME."""
    folder = Path(path).expanduser()
    has_neighbours = len(folder.parts) > 1 and folder.parent.is_dir()
    return path.startswith((".", "/", "~")) or len(folder.parts) > 2 or has_neighbours or folder.is_file()


def _weights_in(folder: Path) -> Iterable[str]:
    if (folder / _WEIGHTS).exists() or not (folder / _INDEX).exists():
        return (_WEIGHTS,)
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def check_data(config: DataConfig) -> Iterator[Check]:
    """Whether the data files are there and can be read; a hub data set's id is taken on trust."""
    for key, source in (("train", config.train), ("test", config.test)):
        if source:
            yield _data_source(f"data.{key}", source, config)


def _data_source(name: str, source: str, config: DataConfig) -> Check:
    path = Path(source).expanduser()
    if path.suffix not in _FILE_KINDS and not path.exists():
        return ok(name, f"{source} is no local file, so a hub data set's id")
    try:
        if path.is_dir():
            return failed(name, f"{path} is a folder", f"name a file that ends in {', '.join(_FILE_KINDS)}")
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        return failed(name, f"{path.absolute()}: {error.strerror}", f"set {name} to a file that this user can read")
    if is_empty:
        return failed(name, f"{path} is empty", f"set {name} to a file with records")
    return _columns(name, path, config)


def _columns(name: str, path: Path, config: DataConfig) -> Check:
    """Whether the file has a column that some kind of task reads; which task it will be, only the coordinator knows."""
    size, columns = human_bytes(path.stat().st_size), _columns_of(path)
    if not columns:
        return ok(name, f"{path}: {size}")
    wanted = {key: str(getattr(config, key)) for key in _READ_COLUMNS}
    named = [key for key in wanted if key in config.model_fields_set]  # by this site, not by default
    found = f"{path}: the columns are {', '.join(columns)}"
    missing = [f"{wanted[key]!r} (data.{key})" for key in named or wanted if wanted[key] not in columns]
    if not set(wanted.values()) & set(columns):
        return failed(name, f"{found}, and none is called {' or '.join(missing)}", "name your columns in [data]")
    if named and missing:
        return warning(name, f"{found}, and none is called {' or '.join(missing)}", "correct [data] or the file")
    return ok(name, f"{path}: {size}, columns {', '.join(columns)}")


def _columns_of(path: Path) -> tuple[str, ...]:
    """Of a csv or jsonl file, by its first line; empty if that says nothing, which its reader will complain of."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(_LONGEST_LINE)
        if path.suffix == ".csv":
            return tuple(next(csv.reader([line]), ()))
        return tuple(json.loads(line)) if path.suffix == ".jsonl" and line.lstrip().startswith("{") else ()
    except (OSError, ValueError, csv.Error, RecursionError):
        return ()


def check_device(config: ModelConfig, python: str = sys.executable) -> Check:
    """Whether torch finds the device, asked in a process of its own; what the driver lists stands beside it."""
    if config.device == "cpu":
        return ok("device", "cpu, as the settings say")
    listed = _said_by(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    said = _said_by([python, "-c", _TORCH]).split()
    if len(said) != 3:
        return failed("device", "torch cannot be imported", f"{python} -c 'import torch' says why")
    torch, is_available, count = said[0], said[1] == "True", int(said[2])
    gpus = "; ".join(listed.splitlines())
    if is_available:
        wanted = int(config.device.partition(":")[2] or 0) if config.device.startswith("cuda") else 0
        if wanted >= count:
            return failed("device", f"{config.device}: torch finds {count} GPU(s): {gpus}", "set model.device")
        return ok("device", f"torch {torch} finds {count} GPU(s){f': {gpus}' if gpus else ''}")
    if gpus:
        advice = "install the build of torch for this GPU's driver (https://pytorch.org/get-started)"
        return failed("device", f"the driver lists {gpus}, but torch {torch} finds no GPU", advice)
    if config.device.startswith("cuda"):
        return failed("device", f"{config.device} is set, but there is no GPU", 'set model.device = "auto" or "cpu"')
    return warning("device", f"no GPU (torch {torch}): training runs on the CPU", "fine for small models")


def check_group(launch: LaunchConfig) -> Check:
    """Whether the settings say, without contradiction, how a group of training processes is launched."""
    try:
        check_launch(launch)
    except ConfigError as error:
        return failed("launch", str(error), "docs/several-gpus.md says what can be set")
    sharded = ", the base sharded over them" if launch.shard_base else ""
    return ok("launch", f"a group of processes{sharded}; whether it starts shows only at the worker's start")


def _said_by(command: list[str]) -> str:
    """What a program prints; empty if there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def check_private(
    name: str, paths: Mapping[str, Path], complain: Callable[[str, str, str], Check] = failed
) -> Iterator[Check]:
    """Whether secret files and folders are for their owner's eyes only; what is not there is passed over."""
    for what, path in paths.items():
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:
            continue
        if mode & _OTHERS:
            wanted = "700" if path.is_dir() else "600"
            yield complain(name, f"others can get at {what}: {path} has mode {mode:o}", f"chmod {wanted} {path}")
