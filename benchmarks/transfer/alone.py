"""One transfer at a time: the real worker client and a real coordinator, and bare TCP, turn by turn in one run."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.interleaved import Spread, Turn, take_turns, wall_ratio
from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.uploads import settings_of
from benchmarks.load.usage import usage_of
from benchmarks.transfer.raw_tcp import RawServer
from benchmarks.transfer.site import RANK, Site, blob_of, sites_of, spec_of, write_update
from common.codec import Layout
from worker.messages import Blob

MEGABYTES = 256


@dataclass(frozen=True)
class Measured:
    """Of one kind of transfer."""

    ours: Spread  # seconds
    raw: Spread
    wall_ratio: Spread  # raw over ours: 1 is as fast as bare TCP
    cpu_ratio: Spread  # likewise, both ends' CPU seconds


@dataclass
class _Meter:
    """CPU seconds of the serving process, turn by turn."""

    pid: int
    cpu_seconds: list[float] = field(default_factory=list)

    def around(self, work: Callable[[], object]) -> Callable[[], None]:
        """The work, with what the server used for it noted."""

        def noted() -> None:
            before = usage_of(self.pid).cpu_seconds
            work()
            self.cpu_seconds.append(usage_of(self.pid).cpu_seconds - before)

        return noted


class Bench:
    """A coordinator, a site and a bare TCP server with the same bytes; every method measures one kind."""

    def __init__(self, folder: Path, site: Site, coordinator_pid: int, raw: RawServer, update: Path) -> None:
        self._folder, self._site, self._pid, self._raw = folder, site, coordinator_pid, raw
        self._update, self._blob = update, blob_of(update)
        self._turn = 0
        self._received = folder / "received.raw"

    def uploads(self, run: "Run", repetitions: int, progress: Callable[[str], None]) -> Measured:
        """Hashed and durable at the receiver."""

        def after(name: str) -> None:
            progress(f"upload: {name}")
            if name == "ours":
                self._blob = self._changed()

        return self._compare(
            lambda: run(self._site.send(self._update, self._blob)),
            lambda: self._raw.put(self._update),
            repetitions,
            after,
        )

    def downloads(self, run: "Run", repetitions: int, progress: Callable[[str], None]) -> Measured:
        """Hashed and durable at the receiver."""
        path = run(self._site.fetch())

        def after(name: str) -> None:
            progress(f"download: {name}")
            path.unlink(missing_ok=True)

        path.unlink()
        size_bytes = self._site.task.adapter.size_bytes
        return self._compare(
            lambda: run(self._site.fetch()), lambda: self._raw.get(size_bytes, self._received), repetitions, after
        )

    def bare_downloads(self, run: "Run", repetitions: int, progress: Callable[[str], None]) -> Measured:
        """Into nothing."""
        size_bytes = self._site.task.adapter.size_bytes
        return self._compare(
            lambda: run(self._site.take()),
            lambda: self._raw.get(size_bytes, None),
            repetitions,
            lambda name: progress(f"download into nothing: {name}"),
        )

    def _compare(
        self,
        ours: Callable[[], object],
        raw: Callable[[], object],
        repetitions: int,
        after: Callable[[str], None],
    ) -> Measured:
        of_ours, of_raw = _Meter(self._pid), _Meter(self._raw.pid)
        turns = take_turns({"raw TCP": of_raw.around(raw), "ours": of_ours.around(ours)}, repetitions, after)
        cpu_ours = _with_server(turns["ours"], of_ours)
        cpu_raw = _with_server(turns["raw TCP"], of_raw)
        return Measured(
            ours=Spread.of([turn.wall_seconds for turn in turns["ours"]]),
            raw=Spread.of([turn.wall_seconds for turn in turns["raw TCP"]]),
            wall_ratio=wall_ratio(turns["raw TCP"], turns["ours"]),
            cpu_ratio=Spread.of([raw / ours for raw, ours in zip(cpu_raw, cpu_ours, strict=True)]),
        )

    def _changed(self) -> Blob:
        """Other bytes of the same length: what was sent once is not sent again."""
        self._turn += 1
        with self._update.open("r+b") as file:
            file.seek(-8, 2)
            file.write(self._turn.to_bytes(8, "little"))
        return blob_of(self._update)


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def _with_server(turns: list[Turn], meter: _Meter) -> list[float]:
    served = meter.cpu_seconds[-len(turns) :]  # the first turn is not measured
    return [turn.cpu_seconds + server for turn, server in zip(turns, served, strict=True)]


class Alone:
    """Everything that the comparisons stand on; ends with its context."""

    def __init__(self, folder: Path, megabytes: int = MEGABYTES) -> None:
        self._folder, self._megabytes = folder, megabytes
        self._runner = asyncio.Runner()
        self._stack = ExitStack()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """In the one loop that the client's channel belongs to."""
        return self._runner.run(work)

    def __enter__(self) -> Bench:
        folder, spec = self._folder, spec_of(self._megabytes)
        self._stack.enter_context(self._runner)
        coordinator = CoordinatorProcess(folder / "coordinator", settings_of(2))
        self._enter(coordinator)
        update = folder / "update"
        write_update(update, Layout(spec, RANK), seed=1)
        (site,) = self._enter(sites_of(folder, coordinator.address, spec, 1))
        raw = self._stack.enter_context(RawServer(folder / "raw"))
        (folder / "raw" / "served").hardlink_to(update)
        return Bench(folder, site, coordinator.pid, raw, update)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self, context: Any) -> Any:
        entered = self.run(context.__aenter__())
        self._stack.callback(lambda: self.run(context.__aexit__(None, None, None)))
        return entered
