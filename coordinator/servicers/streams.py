"""Streams of bytes over gRPC: the disk is read in a thread, one chunk ahead of nobody."""

import asyncio
from collections.abc import AsyncIterator, Iterator


async def read_chunks(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks of a blocking iterator. HTTP/2's flow control stops us, so nothing is queued here."""
    try:
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
