"""How a group of training processes is started, and where its first process finds the agent.

The agent starts one launcher (torchrun, accelerate, or the site's own), which starts the processes. Standard input and
output of such processes are the launcher's business and differ between launchers, so the group's process 0 connects to
a socket in a folder that only this user can enter. Nothing here imports torch, and nothing listens on a network.
"""

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.settings import environment_alone, environment_with
from worker.config import LaunchConfig
from worker.trainer_protocol import MAX_LINE_BYTES, SOCKET_OPTION

_LONGEST_SOCKET_PATH = 107  # bytes; what Linux takes
# accelerate's words.
_GROUP = "MULTI_GPU"  # a whole model in each process
_SHARDED = "FSDP"
_DEEPSPEED = "DEEPSPEED"
_HOW_SHARDED = ("fsdp_reshard_after_forward", "fsdp_sharding_strategy")  # of its version 2, of its version 1
_IN_FULL = frozenset({"true", "full_shard", "1"})

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Meeting:
    """Takes the one connection that process 0 of a group makes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="raflora-"))  # for this user alone
        self.path = self._folder / "agent"
        self._connected: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listens. Raises ConfigError if the folder for temporary files has too long a name."""
        if len(bytes(self.path)) > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"launch: the socket {self.path} has a longer name than the {_LONGEST_SOCKET_PATH} bytes that Linux "
                "takes; set TMPDIR to a folder with a shorter one"
            )
        self._server = await asyncio.start_unix_server(self._take, self.path, limit=MAX_LINE_BYTES)

    async def connection(self) -> Connection:
        """The connection, as soon as it is there; the caller sets the limit."""
        return await asyncio.shield(self._connected)

    def close(self) -> None:
        """Listens no more; the connection that was taken lives on."""
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connected.done():
            writer.close()
        else:
            self._connected.set_result((reader, writer))


def group_command(launch: LaunchConfig, trainer: Sequence[str], socket: Path) -> tuple[str, ...]:
    """What starts the group. Raises ConfigError if the launch cannot be meant."""
    check_launch(launch)
    member = (*trainer, SOCKET_OPTION, str(socket))
    if launch.command:
        return (*launch.command, *member)
    if launch.accelerate_config is not None:
        program = ("-m", "accelerate.commands.launch", "--config_file", str(launch.accelerate_config), "--no_python")
        return (sys.executable, *program, *member)
    here = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(launch.processes), "--no-python")
    return (sys.executable, "-m", "torch.distributed.run", *here, *member)


def group_environment(launch: LaunchConfig) -> dict[str, str]:
    """The launcher's environment: our settings stay here, and on one machine the processes meet on loopback only."""
    if launch.command:
        return environment_with()  # srun and mpirun need what the scheduler has set
    if launch.accelerate_config is not None:
        return environment_alone()
    return environment_alone(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")


def check_launch(launch: LaunchConfig) -> None:
    """Raises ConfigError that says what to change; looks at the accelerate file, if one is named."""
    ways = {
        "launch.processes": launch.processes > 1,
        "launch.accelerate_config": launch.accelerate_config is not None,
        "launch.command": bool(launch.command),
    }
    chosen = [name for name, is_set in ways.items() if is_set]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are both set; one of them says how the group is launched")
    if launch.shard_base and not chosen:
        raise ConfigError(
            "launch.shard_base: there is one process, and nobody to share the base with; set launch.processes to the "
            "number of this machine's GPUs"
        )
    if launch.accelerate_config is not None:
        _check_accelerate(launch.accelerate_config)
    if launch.command and shutil.which(launch.command[0]) is None:
        raise ConfigError(f"launch.command: no program {launch.command[0]!r} is found on PATH")


def _check_accelerate(path: Path) -> None:
    content = _content_of(path)
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "NO":
        raise ConfigError(
            f"launch.accelerate_config: {path} asks for one process (distributed_type NO); leave the key out, or "
            "answer multi-GPU in `accelerate config`"
        )
    if kind == _DEEPSPEED:
        raise ConfigError(
            f"launch.accelerate_config: {path} asks for distributed_type {kind}, which is not used here. Its stages 1 "
            "and 2 divide gradients and the optimizer's state, and those of LoRA's factors are small; for what stage "
            f"3 does choose {_SHARDED}, or {_GROUP} and launch.shard_base = true"
        )
    if kind not in (_GROUP, _SHARDED):
        raise ConfigError(
            f"launch.accelerate_config: {path} asks for distributed_type {kind}; {_GROUP} (the whole model in each "
            f"process) or {_SHARDED} (the base divided among them) is expected"
        )
    if kind == _SHARDED:
        _check_sharding(path, content.get("fsdp_config"))


def _check_sharding(path: Path, fsdp: object) -> None:
    """Raises ConfigError if the file asks for what is not done; what only says where to cut is not asked."""
    asked = fsdp if isinstance(fsdp, dict) else {}
    for key in _HOW_SHARDED:
        if str(asked.get(key, True)).lower() not in _IN_FULL:
            raise ConfigError(
                f"launch.accelerate_config: {path}: fsdp_config.{key} is {asked[key]}; a base that is gathered layer "
                "by layer and let go at once (true, or FULL_SHARD) is all that saves memory with LoRA. If the base "
                f"fits whole, choose distributed_type {_GROUP}"
            )
    for key, instead in (
        ("fsdp_offload_params", "weights are kept on the GPUs; set it to false"),
        ("fsdp_activation_checkpointing", "set it to false and model.gradient_checkpointing = true"),
    ):
        if str(asked.get(key, False)).lower() == "true":
            raise ConfigError(f"launch.accelerate_config: {path}: fsdp_config.{key} is true; {instead}")


def _content_of(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped] # noqa: PLC0415 # comes with accelerate; a worker without a group does not need it

    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"launch.accelerate_config: {path.absolute()}: there is no such file; `accelerate config --config_file "
            f"{path}` makes one"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"launch.accelerate_config: {path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"launch.accelerate_config: {path}: holds no settings of accelerate")
    return content


async def first_of(meeting: Meeting, ended: "asyncio.Task[int]", seconds: float) -> Connection | None:
    """The group's connection; None if the launcher ended first. Raises TimeoutError."""
    coming = asyncio.create_task(meeting.connection())
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wait({coming, ended}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(coming, return_exceptions=True)
