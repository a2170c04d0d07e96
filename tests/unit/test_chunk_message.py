"""Chunk messages are made and read by hand: protobuf's own to the byte, and what looks odd is left to protobuf."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from raflora.v1 import federation_pb2 as pb

from common.chunk_message import Chunk, chunk_in, message_of
from coordinator.servicers.streams import upload_chunk_of
from worker.wire_messages import download_chunk_of

_UNKNOWN_FIELD = b"\x3a\x01x"  # field 7


def by_protobuf(chunk: Chunk) -> bytes:
    data = bytes(chunk.data)
    message = pb.UploadAdapterRequest(planes=data) if chunk.is_planes else pb.UploadAdapterRequest(data=data)
    return message.SerializeToString()


@given(st.binary(max_size=300), st.booleans())
def test_a_message_is_what_protobuf_would_write_and_is_read_back(data: bytes, is_planes: bool) -> None:
    chunk = Chunk(data, is_planes)
    assert message_of(chunk) == message_of(Chunk(memoryview(data), is_planes)) == by_protobuf(chunk)
    for read in (upload_chunk_of, download_chunk_of):
        found = read(message_of(chunk))
        assert (bytes(found.data), found.is_planes) == (data, is_planes and data != b"")


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 1 << 20, (1 << 21) - 1, 1 << 21])
def test_every_width_of_a_length_is_protobufs(size: int) -> None:
    chunk = Chunk(b"x" * size)
    message = message_of(chunk)
    assert message == by_protobuf(chunk)
    found = chunk_in(message)
    assert found is not None
    assert found.data == chunk.data


@given(st.binary(max_size=40))
def test_whatever_comes_is_read_as_protobuf_reads_it(message: bytes) -> None:
    try:
        expected = pb.UploadAdapterRequest.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            upload_chunk_of(message)
        return
    found = upload_chunk_of(message)
    assert bytes(found.data) == (expected.planes or expected.data)
    assert found.is_planes == (expected.planes != b"")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x0a",
        b"\x0a\x00",
        b"\x0a\x03ab",  # cut
        b"\x0a\x02abc",  # something behind it
        b"\x0a\x02ab" + _UNKNOWN_FIELD,
        _UNKNOWN_FIELD + b"\x0a\x02ab",
        b"\x0a\x82\x00ab",  # a length with a superfluous byte
        b"\x0a\x01a\x0a\x01b",  # twice
        b"\x0a\xff\xff\xff\xff\xff",
    ],
)
def test_what_is_written_in_another_way_is_left_to_protobuf(message: bytes) -> None:
    assert chunk_in(message) is None


def test_a_chunk_is_not_copied_out_of_its_message() -> None:
    message = message_of(Chunk(b"factors"))
    found = chunk_in(message)
    assert found is not None
    assert isinstance(found.data, memoryview)
    assert found.data.obj is message
