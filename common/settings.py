"""Settings: one TOML file; the environment (RAFLORA__ROUNDS__QUORUM=3) overrides it, --set rounds.quorum=3 both.

Read once at start into frozen pydantic models. The only place that looks at environment variables.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError

ENVIRONMENT_PREFIX = "RAFLORA__"
ADDRESS_VARIABLE = "RAFLORA_COORDINATOR"
IDENTITY_VARIABLE = "RAFLORA_IDENTITY"
DATA_VARIABLE = "RAFLORA_DATA"
FAILPOINTS_VARIABLE = "RAFLORA_FAILPOINTS"
DEFAULT_ADDRESS = "127.0.0.1:7070"
_SEPARATOR = "__"
# What launchers call a process's number, the number of processes, and both again on its own machine.
_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LAUNCHED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_\w+|ACCELERATE_\w+|FSDP_\w+|MV2_COMM_WORLD_\w+|PMI_\w+|OMPI_COMM_WORLD_\w+)"
)
_SHARDED = "ACCELERATE_USE_FSDP"
_FOREIGN = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class Section(BaseModel):
    """A part of a settings file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=Section)


def load_settings(
    model: type[Settings],
    path: Path | None,
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of one role. Raises ConfigError that names the source, the key and what was expected."""
    content = _read_toml(path) if path else {}
    sources: dict[str, str] = {}
    environment = os.environ if environ is None else environ
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split(_SEPARATOR)
            _put(content, keys, text, f"environment variable {name}", sources)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example --set rounds.quorum=3")
        _put(content, key.split("."), text, f"--set {key}", sources)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        if path is None and not sources:
            raise ConfigError("no settings: give --config FILE; `raflora config` lists the keys") from None
        raise ConfigError(explained(error, str(path) if path else "settings", model, sources)) from None


def environment_keys(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys that the environment overrides, as --set names them: "rounds.quorum"."""
    environment = os.environ if environ is None else environ
    names = sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX))
    return tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().replace(_SEPARATOR, ".") for name in names)


def environment_with(**changes: str) -> dict[str, str]:
    """The environment of a process that we start, with these variables changed.

    Our settings stay here: one may be a join token or a database's password, and no process of ours reads them anew.
    """
    return {**{name: text for name, text in os.environ.items() if not _is_ours_alone(name)}, **changes}


def environment_alone(**changes: str) -> dict[str, str]:
    """The same without what a launcher around us has set: the process must not take itself for one of a group."""
    return {name: text for name, text in environment_with(**changes).items() if not _LAUNCHED.fullmatch(name)}


@dataclass(frozen=True)
class Launched:
    """Which process of a group this is, as its launcher told it."""

    rank: int
    size: int
    local_rank: int  # among those of its machine
    host: str  # where the group meets
    port: int
    has_store: bool  # the launcher itself serves the meeting place (torchrun); else the process of rank 0 does
    is_sharded: bool  # accelerate was told to shard the model (FSDP)
    is_foreign: bool  # or to leave it to DeepSpeed or Megatron


def take_launch(environ: MutableMapping[str, str] | None = None) -> Launched:
    """What the launcher said, taken out of the environment, so that no library acts on it behind our back.

    Raises ConfigError that names what is missing.
    """
    environment = os.environ if environ is None else environ
    try:
        launched = Launched(
            rank=int(_first(environment, _RANK)),
            size=int(_first(environment, _SIZE)),
            local_rank=int(_first(environment, _LOCAL_RANK)),
            host=_first(environment, ("MASTER_ADDR",)),
            port=int(_first(environment, ("MASTER_PORT",))),
            has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            is_sharded=_is_on(environment, _SHARDED),
            is_foreign=any(_is_on(environment, name) for name in _FOREIGN),
        )
    except ValueError as error:
        raise ConfigError(f"launch: the launcher set a variable of a group that is no number: {error}") from None
    for name in [name for name in environment if _LAUNCHED.fullmatch(name)]:
        del environment[name]
    return launched


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in {"true", "1"}


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise ConfigError(
        f"launch: none of the variables {', '.join(names)} is set, which a process of a group needs; "
        "start it through torchrun, accelerate, srun or mpirun, and export MASTER_ADDR and MASTER_PORT for the last two"
    )


def _is_ours_alone(name: str) -> bool:
    return name.startswith(ENVIRONMENT_PREFIX) or name == IDENTITY_VARIABLE


def coordinator_address(environ: Mapping[str, str] | None = None, otherwise: str = "") -> str:
    """Where an observer looks for the coordinator when the command line does not say."""
    environment = os.environ if environ is None else environ
    return environment.get(ADDRESS_VARIABLE) or otherwise or DEFAULT_ADDRESS


def identity_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """As whom an observer or operator comes when the command line does not say, if the environment does."""
    environment = os.environ if environ is None else environ
    folder = environment.get(IDENTITY_VARIABLE)
    return Path(folder).expanduser() if folder else None


def data_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where experiments look for their data when they do not say, if the environment does."""
    environment = os.environ if environ is None else environ
    folder = environment.get(DATA_VARIABLE)
    return Path(folder).expanduser() if folder else None


def failpoints_plan(environ: Mapping[str, str] | None = None) -> str:
    """Where a test wants this process to die or fail (see common.failpoints); empty: nowhere."""
    environment = os.environ if environ is None else environ
    return environment.get(FAILPOINTS_VARIABLE, "")


def quiet_grpc_core() -> None:
    """Keeps gRPC's C core from writing its notices ("Got goaway") over a screen; call it before gRPC is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def quiet_trackers() -> None:
    """Keeps MLflow and Weights & Biases from telling their makers how they are used, and from trying for minutes.

    Call it before their import. What the environment says already, stays.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # of a run; it may hold a password
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
    )  # within a quarter of a minute; its own: 7, in minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.absolute()}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path.absolute()}: cannot be read: {error.strerror}") from None


def _put(content: dict[str, Any], keys: list[str], text: str, source: str, sources: dict[str, str]) -> None:
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{source}: {key} is a value, not a section")
    place[keys[-1]] = _value_of(text)
    sources[".".join(keys)] = source


def _value_of(text: str) -> Any:
    """The TOML value that the text spells (3, true, [2, 4], "x"); the text itself if it spells none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def explained(
    error: ValidationError, where: str, model: type[BaseModel], sources: Mapping[str, str] | None = None
) -> str:
    """A line for each problem: who set the key (`where` if none of the sources), the key, what was expected."""
    lines = []
    for problem in error.errors(include_url=False):
        keys = [str(part) for part in problem["loc"]]
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said = f"there is no such key; {_known_keys(model, keys)}"
        elif problem["type"] == "missing":
            said = "is required and not given"
        # What concerns several keys names them itself; the section that holds them would say no more.
        is_plain = isinstance(problem["input"], str | int | float | bool | list | tuple)
        shows = is_plain and problem["type"] not in {"missing", "extra_forbidden"}
        found = f", found {problem['input']!r:.80}" if shows else ""
        lines.append(
            ": ".join([_source_of(keys, sources or {}) or where, *filter(None, [".".join(keys)]), said + found])
        )
    return "\n".join(lines)


def _known_keys(model: type[BaseModel], keys: list[str]) -> str:
    """What stands in the section of an unknown key, the likeliest first."""
    section: Any = model
    for key in keys[:-1]:
        if key.isdigit():  # a place in a list of sections, which is the section by now
            continue
        field = getattr(section, "model_fields", {}).get(key)
        options = [field.annotation, *get_args(field.annotation)] if field is not None else []
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    known = sorted(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(keys[-1], known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"


def _source_of(keys: list[str], sources: Mapping[str, str]) -> str:
    """Who set this key or, by setting a whole list or section, one around it; empty: the file."""
    around = (".".join(keys[:length]) for length in range(len(keys), 0, -1))
    return next((sources[key] for key in around if key in sources), "")
