"""Flower's round: its own SuperLink, SuperNodes and `flwr run`, with a ServerApp that takes orders over a socket.

Settings are Flower's defaults, but for telemetry and the installation of an app's dependencies, which are off. How long
it waits between looks is fixed in its code (3 s for replies, 3 s for messages at the SuperNode, 0.5 s for the end of an
app), but for the 1 s between looks for tasks, which FLWR_SUPEREXEC_TASK_POLL_INTERVAL sets.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.interleaved import Turn
from benchmarks.programs import Program, ProgramFailed, tree_cpu_seconds
from benchmarks.rivals.environment import Rivals

_APP = Path(__file__).parent / "flower_app"
_START_SECONDS = 120.0
_ROUND_SECONDS = 600.0
_LOOK_SECONDS = 0.2


@dataclass
class FlowerRounds:
    """A run that waits for the next order."""

    programs: list[Program]
    orders: TextIO

    def turn(self, size_bytes: int) -> Turn:
        """From the call of send_and_receive to its end. Raises ProgramFailed."""
        before = self._cpu_seconds()
        print(size_bytes, file=self.orders, flush=True)
        played = _heard(self.orders)
        return Turn(played["wall_seconds"], self._cpu_seconds() - before)

    def _cpu_seconds(self) -> float:
        """Of SuperLink and SuperNodes with all that they start: the apps run in processes of theirs."""
        return sum(tree_cpu_seconds(program.pid) for program in self.programs)


@contextmanager
def flower_rounds(rivals: Rivals, folder: Path, num_workers: int) -> Generator[FlowerRounds]:
    """All processes, in an empty folder. Raises ProgramFailed."""
    port, *node_ports = _free_ports(num_workers + 1)
    environment = _environment(rivals, folder, port)
    with ExitStack() as stack:
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.bind(str(folder / "orders"))
        waiting.listen()
        waiting.settimeout(_START_SECONDS)

        def start(name: str, *arguments: str) -> Program:
            command = (str(rivals.program(name)), "--insecure", *arguments)
            log = folder / f"{name}-{arguments[-1]}.log"
            return stack.enter_context(Program(command, log, environment=environment, answers=False))

        programs = [start("flower-superlink", "--disable-runtime-dependency-installation", "--port", str(port))]
        _wait_until_open(port, programs[0])
        for node_port in node_ports:
            programs.append(start("flower-supernode", "--superlink", f"127.0.0.1:{port}", "--port", str(node_port)))
        _submit(rivals, folder, environment, num_workers)
        orders = stack.enter_context(_accepted(waiting, programs[0]).makefile("rw"))
        orders_of = FlowerRounds(programs, orders)
        _heard(orders)
        yield orders_of


def _environment(rivals: Rivals, folder: Path, port: int) -> dict[str, str]:
    home = folder / "flower"
    home.mkdir()
    connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # SuperLink and SuperNodes start their helpers by name.
        "PATH": f"{rivals.programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def _wait_until_open(port: int, program: Program) -> None:
    ends_at = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends_at and not program.has_ended:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(_LOOK_SECONDS)
    raise program.complaint(f"did not listen within {_START_SECONDS:g} s")


def _submit(rivals: Rivals, folder: Path, environment: dict[str, str], num_workers: int) -> None:
    config = f'socket="{folder / "orders"}" nodes={num_workers}'
    command = (str(rivals.program("flwr")), "run", str(_APP), "here", "--run-config", config)
    try:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        raise ProgramFailed(f"flwr run: {(error.stdout + error.stderr)[-1500:].strip()}") from None
    except subprocess.TimeoutExpired:
        raise ProgramFailed(f"flwr run has not ended after {_START_SECONDS:g} s") from None


def _accepted(waiting: socket.socket, superlink: Program) -> socket.socket:
    try:
        line, _ = waiting.accept()
    except TimeoutError:
        raise superlink.complaint(f"started no ServerApp within {_START_SECONDS:g} s") from None
    line.settimeout(_ROUND_SECONDS)
    return line


def _heard(orders: TextIO) -> dict[str, Any]:
    try:
        said = orders.readline()
    except TimeoutError:
        raise ProgramFailed(f"a round of Flower's took longer than {_ROUND_SECONDS:g} s") from None
    if not said:
        raise ProgramFailed("Flower's ServerApp has ended")
    answer: dict[str, Any] = json.loads(said)
    return answer


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]
