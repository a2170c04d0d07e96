"""How many bytes an update takes on a connection: counted between worker and coordinator, with and without planes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.coordinators import CoordinatorProcess
from benchmarks.load.uploads import settings_of
from benchmarks.transfer.site import RANK, sites_of, spec_of, write_update
from common.codec import Layout, WireDtype

_PIECE_BYTES = 1 << 16


@dataclass
class Counter:
    """What has passed so far, towards the coordinator."""

    address: str = ""
    sent_bytes: int = 0


@asynccontextmanager
async def counted(address: str) -> AsyncIterator[Counter]:
    """A relay to the address that counts."""
    counter, (host, port) = Counter(), address.rsplit(":", 1)

    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter, counts: bool) -> None:
        try:
            while piece := await source.read(_PIECE_BYTES):
                counter.sent_bytes += len(piece) if counts else 0
                sink.write(piece)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pipe(reader, back, True), pipe(there, writer, False))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        counter.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield counter
    finally:
        server.close()


async def share_of_planes(folder: Path, megabytes: int, seed: int) -> float:
    """Bytes of one upload in bfloat16 as byte planes, over those of the file itself."""
    spec = spec_of(megabytes, number_bytes=2)
    settings = settings_of(2)
    settings["adapter"]["wire_dtype"] = "bfloat16"
    update = folder / "update"
    blob = write_update(update, Layout(spec, RANK, WireDtype.BFLOAT16), seed)
    async with (
        CoordinatorProcess(folder / "coordinator", settings) as coordinator,
        counted(coordinator.address) as counter,
        sites_of(folder, counter.address, spec, 1, encoding="byte-planes") as (site,),
    ):
        before = counter.sent_bytes
        await site.send(update, blob)
        return (counter.sent_bytes - before) / blob.size_bytes
