"""A real coordinator, `raflora coordinator`, as a process of its own; it never outlives its context."""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.settings import environment_with

_START_SECONDS = 120.0
_GOODBYE_SECONDS = 30.0
_LOOK_SECONDS = 0.05
_NICE = 5  # a load test must not starve what else runs on the machine


class CoordinatorProcess:
    """One federation's coordinator; may be killed and started again on the same state folder and port."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], program: tuple[str, ...] = ()) -> None:
        """`settings` by section and key, as in federation.toml; the state folder and a free port are given here.

        `program` is what is run with the settings file as its last argument, if not `raflora coordinator`.
        """
        folder.mkdir(exist_ok=True)
        self._program = program or ("-m", "cli.main", "coordinator", "--config")
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "coordinator.log"
        self._settings = {key: dict(section) for key, section in settings.items()}
        self._settings.setdefault("server", {}).setdefault("listen", "127.0.0.1:0")
        self._process: asyncio.subprocess.Process | None = None
        self.address = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "the coordinator was not started"
        return self._process.pid

    async def start(self) -> None:
        """Returns once it takes calls; on the port that it had before, if any. Raises RuntimeError with its log."""
        if self.address:
            self._settings["server"]["listen"] = self.address
        file = self.folder / "federation.toml"
        file.write_text(self._toml(), encoding="utf-8")
        with self.log.open("wb") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *("nice", "-n", str(_NICE), sys.executable, *self._program, str(file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                # One thread: BLAS threads that wait for each other on a busy machine make founding take minutes.
                env=environment_with(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
            )
        try:
            async with asyncio.timeout(_START_SECONDS):
                self.address = await self._listening()
        except TimeoutError:
            raise RuntimeError(f"the coordinator did not listen within {_START_SECONDS:g} s; see {self.log}") from None

    async def stop(self) -> None:
        """SIGTERM, and its end."""
        assert self._process is not None, "the coordinator was not started"
        with suppress(ProcessLookupError):
            self._process.terminate()
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await self._process.wait()

    async def kill(self) -> None:
        """kill -9; does nothing if it has ended."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    async def _listening(self) -> str:
        assert self._process is not None
        while True:
            for line in self.log.read_text(errors="replace").splitlines():
                if '"event": "listening"' in line:
                    return str(json.loads(line)["address"])
            if self._process.returncode is not None:
                raise RuntimeError(f"the coordinator ended at once:\n{self.log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(_LOOK_SECONDS)

    def _toml(self) -> str:
        lines = [f"state_dir = {json.dumps(str(self.state))}", 'log_format = "json"']
        for name, section in self._settings.items():
            # JSON writes strings, numbers and lists of them as TOML reads them.
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
        return "\n".join(lines) + "\n"
