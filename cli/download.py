"""The published adapter from the coordinator onto this disk: resumed at its offset, checked by its digest.

The bytes wait in a hidden file named after their digest, so the next run of a command goes on where this one stopped.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from raflora.v1 import status_pb2, status_pb2_grpc
from safetensors import SafetensorError, safe_open

from cli.connection import Connection, messages_of, reach
from cli.errors import Failed
from common.adapter import Adapter, AdapterSpec, ModuleShape, TensorShape
from common.codec import Layout, WireDtype, decode, name_of_lora_A, name_of_lora_B
from common.errors import AdapterMismatch, InvalidRequest, Unavailable, UnknownBlob
from common.transfer import Expected, PartFile, check_digest

RETRY_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0)  # after so many failures in a row without a new byte it is over
_WIRE_DTYPES = {"F32": WireDtype.FLOAT32, "BF16": WireDtype.BFLOAT16, "F16": WireDtype.FLOAT16}


@dataclass(frozen=True)
class Download:
    """An adapter's bytes on disk, whole and of the announced digest."""

    header: status_pb2.AdapterHeader
    path: Path


async def fetch_adapter(connection: Connection, rank: int, *, beside: Path, best: bool = False) -> Download:
    """The newest adapter (or the best) cut to `rank` (0: uncut), in a hidden file beside a path.

    Raises Unavailable, CorruptTransfer, Failed, or what the coordinator says (NothingPublished, WrongRank).
    """
    header = await _announced(connection, rank, best=best)
    check_digest(header.digest, whose="published adapter")
    whole = beside.with_name(f".{beside.name}.{header.digest}")
    expected = Expected(header.digest, header.size_bytes, whose="published adapter")
    failures = 0
    while True:
        part = PartFile(whole.with_name(whole.name + ".part"), expected)
        start = part.committed_bytes
        request = status_pb2.FetchAdapterRequest(lora_rank=rank, digest=header.digest, offset=start, best=best)
        try:
            await _fill(part, connection, request)
            part.finish(whole)
            return Download(header, whole)
        except UnknownBlob:
            raise Failed("a newer adapter was published during the download; run the command again") from None
        except Unavailable:
            part.sync()
            failures = 1 if part.committed_bytes > start else failures + 1
            if failures > len(RETRY_SECONDS):
                raise
        finally:
            part.close()
        await asyncio.sleep(RETRY_SECONDS[failures - 1])


def read_adapter(download: Download) -> Adapter:
    """The adapter in the file, as a client that multiplies by the header's scaling uses it.

    Raises Failed if the file is not what its header says.
    """
    try:
        return decode(download.path.read_bytes(), _layout_of(download), whose="published adapter")
    except (InvalidRequest, SafetensorError) as error:
        raise Failed(f"the coordinator sent something else than its header says: {error}") from None


async def _announced(connection: Connection, rank: int, *, best: bool) -> status_pb2.AdapterHeader:
    """What the adapter is; its bytes are asked for in a call of their own, which can be repeated."""
    request = status_pb2.FetchAdapterRequest(lora_rank=rank, best=best)
    async with reach(connection) as channel, aclosing(_parts(channel, connection, request)) as parts:
        async for part in parts:
            if part.HasField("header"):
                return part.header
            break
    raise Failed(f"coordinator {connection.address} sent no header before the adapter")


async def _fill(part: PartFile, connection: Connection, request: status_pb2.FetchAdapterRequest) -> None:
    """Appends what the coordinator sends; every wait for a chunk is bounded, and so is their sum (by the size)."""
    offset = request.offset
    async with reach(connection) as channel, aclosing(_parts(channel, connection, request)) as messages:
        async for message in messages:
            part.append(offset, message.data)  # a header carries none
            offset += len(message.data)


def _parts(
    channel: grpc.aio.Channel, connection: Connection, request: status_pb2.FetchAdapterRequest
) -> AsyncGenerator[status_pb2.FetchAdapterResponse, None]:
    return messages_of(status_pb2_grpc.StatusServiceStub(channel).FetchAdapter(request), connection)


def _layout_of(download: Download) -> Layout:
    """Shapes and dtype from the file, names from the header; decode then holds the file to all of them."""
    with safe_open(download.path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
        dtypes = {found.get_dtype() for found in slices.values()}
    if len(dtypes) != 1 or not dtypes <= _WIRE_DTYPES.keys():
        raise AdapterMismatch(f"numbers of the types {sorted(dtypes)}; one of {sorted(_WIRE_DTYPES)} is expected")
    modules = []
    for name in download.header.modules:
        lora_A, lora_B = shapes.pop(name_of_lora_A(name), ()), shapes.pop(name_of_lora_B(name), ())
        if len(lora_A) != 2 or len(lora_B) != 2:
            raise AdapterMismatch(f"{name}: lora_A {lora_A} and lora_B {lora_B}; two matrices are expected")
        modules.append(ModuleShape(name, out_features=lora_B[0], in_features=lora_A[1]))
    tensors = [TensorShape(name, shape) for name, shape in shapes.items()]
    spec = AdapterSpec(tuple(modules), tuple(tensors))
    return Layout(spec, download.header.lora_rank, _WIRE_DTYPES[dtypes.pop()])
