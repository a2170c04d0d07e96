"""Streams of bytes over gRPC, in chunks that protobuf does not copy."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Generator
from contextlib import closing

import grpc
import grpc.aio
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc

from common import byte_planes
from common.byte_planes import BadPlanes
from common.chunk_message import Chunk, chunk_in, message_of
from common.errors import InvalidRequest
from coordinator.service import Counters

_SERVICE = pb.DESCRIPTOR.services_by_name["FederationService"].full_name


def add_to_server(servicer: federation_pb2_grpc.FederationServiceServicer, server: grpc.aio.Server) -> None:
    """Serves a FederationService whose UploadAdapter takes chunks and whose DownloadAdapter gives them."""
    federation_pb2_grpc.add_FederationServiceServicer_to_server(servicer, server)
    server.add_registered_method_handlers(  # in place of those that the line above registered
        _SERVICE,
        {
            "UploadAdapter": grpc.stream_unary_rpc_method_handler(
                servicer.UploadAdapter, upload_chunk_of, pb.UploadAdapterResponse.SerializeToString
            ),
            "DownloadAdapter": grpc.unary_stream_rpc_method_handler(
                servicer.DownloadAdapter, pb.DownloadAdapterRequest.FromString, message_of
            ),
        },
    )


def upload_chunk_of(message: bytes) -> Chunk:
    """The chunk in an UploadAdapterRequest. Raises DecodeError."""
    chunk = chunk_in(message)
    if chunk is None:
        parsed = pb.UploadAdapterRequest.FromString(message)
        chunk = Chunk.of_fields(parsed.data, parsed.planes)
    return chunk


async def data_of(
    chunks: AsyncIterator[Chunk], client_id: str, counters: Counters
) -> AsyncGenerator[bytes | memoryview, None]:
    """The bytes of an upload's chunks, which are counted as they came. Raises InvalidRequest."""
    # Nothing of a chunk is kept while the next one is waited for: a thousand senders may fall silent.
    async for chunk in chunks:
        counters.bytes_received += len(chunk.data)
        try:
            data = await asyncio.to_thread(chunk.plain) if chunk.is_planes else chunk.data
        except BadPlanes as error:
            raise InvalidRequest(f"client {client_id!r}: a chunk in byte planes: {error}") from None
        del chunk
        yield data
        del data


def as_wanted(
    content: Generator[bytes], encodings: "Collection[pb.ContentEncoding]", number_bytes: int
) -> Generator[Chunk]:
    """The chunks as the caller wants them: byte planes are for those who understand them and have a slow link."""
    wants_planes = pb.CONTENT_ENCODING_BYTE_PLANES in encodings
    with closing(content):
        for data in content:
            planes = byte_planes.encode(data, number_bytes) if wants_planes else None
            yield Chunk(data) if planes is None else Chunk(planes, is_planes=True)
