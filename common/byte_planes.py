"""Numbers as byte planes: lossless, about two thirds of the bytes of bfloat16, for slow links.

Of a trained number only the exponent is predictable; sign and mantissa are noise. So a chunk is taken for numbers
of two or four bytes, each is turned left by one bit (the sign goes to the end, the exponent has the top byte for
itself), and the bytes are sorted into planes: all lowest bytes, then all second ones, and so on. A plane whose bytes
are unequally frequent is written in Huffman's code (raw deflate), the others as they are. A chunk needs nothing of
any other chunk.

    number bytes (1 byte), length of the chunk (4 bytes, little-endian), then for every plane:
    0 or 1 (as it is, or raw deflate), its length here (4 bytes, little-endian), its bytes
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from common.transfer import CHUNK_BYTES

NUMBER_BYTES = (2, 4)
_HEAD = struct.Struct("<BI")
_AS_IT_IS, _DEFLATED = 0, 1
_SAMPLE = 4096  # bytes of a plane that tell how unequal they are
_WORTH_BITS = 7.5  # of eight: above it a plane is left as it is
_RAW_DEFLATE = -15


class BadPlanes(ValueError):
    """These bytes are no chunk in byte planes; the message says why."""


def encode(data: bytes | memoryview, number_bytes: int) -> bytes | None:
    """The chunk as byte planes; None if it would not be smaller, or is no whole number of such numbers."""
    if number_bytes not in NUMBER_BYTES or not 0 < len(data) <= CHUNK_BYTES or len(data) % number_bytes:
        return None
    words = np.frombuffer(data, dtype=f"<u{number_bytes}")
    turned = (words << 1) | (words >> (8 * number_bytes - 1))
    parts = [_HEAD.pack(number_bytes, len(data))]
    for plane in turned.view(np.uint8).reshape(-1, number_bytes).T:
        content = np.ascontiguousarray(plane)
        is_worth = _bits_of(content) < _WORTH_BITS
        coded = _deflated(content) if is_worth else content.tobytes()
        parts += [_HEAD.pack(_DEFLATED if is_worth else _AS_IT_IS, len(coded)), coded]
    encoded = b"".join(parts)
    return encoded if len(encoded) < len(data) else None


def decode(encoded: bytes | memoryview) -> bytes:
    """The chunk. Raises BadPlanes; never makes more than CHUNK_BYTES and one byte a plane, whatever comes."""
    number_bytes, size_bytes, left = _head_of(memoryview(encoded))
    if number_bytes not in NUMBER_BYTES:
        raise BadPlanes(f"numbers of {number_bytes} bytes; 2 or 4 are known")
    if not 0 < size_bytes <= CHUNK_BYTES or size_bytes % number_bytes:
        raise BadPlanes(f"{size_bytes} bytes of numbers of {number_bytes}; at most {CHUNK_BYTES} are accepted")
    numbers = size_bytes // number_bytes
    turned = np.empty((numbers, number_bytes), dtype=np.uint8)
    for place in range(number_bytes):
        coding, length, left = _head_of(left)
        if length > len(left):
            raise BadPlanes(f"plane {place} ends after {len(left)} of {length} bytes")
        turned[:, place] = np.frombuffer(_plane_in(left[:length], coding, numbers), dtype=np.uint8)
        left = left[length:]
    if left:
        raise BadPlanes(f"{len(left)} bytes behind the last plane")
    words = turned.view(f"<u{number_bytes}").reshape(-1)
    return ((words >> 1) | (words << (8 * number_bytes - 1))).tobytes()


def _bits_of(plane: NDArray[np.uint8]) -> float:
    """Entropy of a byte, by a sample from everywhere."""
    sample = plane[:: max(1, len(plane) // _SAMPLE)]
    counts = np.bincount(sample)
    shares = counts[counts > 0] / len(sample)
    return float(-np.sum(shares * np.log2(shares)))


def _deflated(plane: NDArray[np.uint8]) -> bytes:
    # Huffman's code alone: looking for repetitions in noise takes twice as long and finds none.
    coder = zlib.compressobj(1, zlib.DEFLATED, _RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plane.data) + coder.flush()


def _head_of(content: memoryview) -> tuple[int, int, memoryview]:
    if len(content) < _HEAD.size:
        raise BadPlanes(f"{len(content)} bytes where a head of {_HEAD.size} is expected")
    first, length = _HEAD.unpack_from(content)
    return first, length, content[_HEAD.size :]


def _plane_in(coded: memoryview, coding: int, numbers: int) -> bytes | memoryview:
    if coding == _AS_IT_IS:
        plane: bytes | memoryview = coded
    elif coding == _DEFLATED:
        plane = _inflated(coded, numbers)
    else:
        raise BadPlanes(f"a plane in the coding {coding}; 0 and 1 are known")
    if len(plane) != numbers:
        raise BadPlanes(f"a plane of {len(plane)} bytes for {numbers} numbers")
    return plane


def _inflated(coded: memoryview, numbers: int) -> bytes:
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        plane = decoder.decompress(coded, numbers + 1)  # one more tells a longer one
    except zlib.error as error:
        raise BadPlanes(f"a plane that is no deflate stream: {error}") from None
    if len(plane) <= numbers and (not decoder.eof or decoder.unused_data):
        raise BadPlanes("a plane whose deflate stream has no end, or something behind it")
    if len(plane) > numbers:
        raise BadPlanes(f"a plane of more than {numbers} bytes for {numbers} numbers")
    return plane
