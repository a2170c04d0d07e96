"""Streams of bytes over gRPC: the disk is read in a thread, one chunk ahead of nobody."""

import asyncio
from collections.abc import AsyncIterator, Generator


async def read_chunks(chunks: Generator[bytes]) -> AsyncIterator[bytes]:
    """The chunks of a blocking generator. HTTP/2's flow control stops us, so nothing is queued here."""
    reading: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            reading = asyncio.create_task(asyncio.to_thread(next, chunks, None))
            chunk = await asyncio.shield(reading)
            if chunk is None:
                return
            yield chunk
    finally:
        if reading is not None:
            await asyncio.wait({reading})  # a generator that runs in a thread cannot be closed
        chunks.close()
