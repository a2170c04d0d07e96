"""The messages that carry bytes, written and read without copying them twice: one field, a length, the bytes.

UploadAdapterRequest and DownloadAdapterResponse hold plain bytes in field 1, or the same as byte planes in field 2.
Protobuf copies them into a message and out of it again; what is made here is the same to the byte, and whatever does
not look like that (unknown fields, several fields, lengths written in another way) is left to protobuf.
"""

from dataclasses import dataclass

from common import byte_planes

_TAG_PLAIN, _TAG_PLANES = 0x0A, 0x12  # fields 1 and 2, length-delimited
_LONGEST_LENGTH = 4  # bytes of a length: messages are below 256 MiB by far


@dataclass(frozen=True)
class Chunk:
    """Some bytes of an adapter, as they are or as byte planes."""

    data: bytes | memoryview
    is_planes: bool = False

    @classmethod
    def of_fields(cls, data: bytes, planes: bytes) -> "Chunk":
        """What a parsed message holds; with both fields the planes count."""
        return cls(planes, is_planes=True) if planes else cls(data)

    def plain(self) -> bytes | memoryview:
        """The bytes themselves. Raises byte_planes.BadPlanes; slow if they are planes, so call it in a thread."""
        return byte_planes.decode(self.data) if self.is_planes else self.data


def message_of(chunk: Chunk) -> bytes:
    """The message with this field and no other; without bytes it is empty, as protobuf writes it."""
    size_bytes = len(chunk.data)
    if not size_bytes:
        return b""
    head = bytearray((_TAG_PLANES if chunk.is_planes else _TAG_PLAIN,))
    while size_bytes > 0x7F:
        head.append(0x80 | (size_bytes & 0x7F))
        size_bytes >>= 7
    head.append(size_bytes)
    return b"".join((head, chunk.data))


def chunk_in(message: bytes) -> Chunk | None:
    """What `message_of` made the message of, not copied; None: it was made otherwise, protobuf must look at it."""
    if len(message) < 2 or message[0] not in (_TAG_PLAIN, _TAG_PLANES):
        return None
    size_bytes = 0
    for position in range(1, min(len(message), 1 + _LONGEST_LENGTH)):
        byte = message[position]
        size_bytes |= (byte & 0x7F) << (7 * (position - 1))
        if byte <= 0x7F:
            is_canonical = byte and size_bytes == len(message) - position - 1
            data = memoryview(message)[position + 1 :]
            return Chunk(data, is_planes=message[0] == _TAG_PLANES) if is_canonical else None
    return None
