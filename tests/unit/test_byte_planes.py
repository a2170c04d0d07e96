"""Byte planes: lossless for any bytes, a third smaller for trained factors, and bounded whatever comes."""

import struct
import zlib
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.byte_planes import BadPlanes, decode, encode
from common.transfer import CHUNK_BYTES

_NUMBERS = 1 << 15
_NOISE = np.random.default_rng(3)
UNIFORM = _NOISE.uniform(-1, 1, _NUMBERS) / 64  # lora_A as it begins
NORMAL = _NOISE.normal(0.0, 1e-3, _NUMBERS)  # lora_B after some steps
BF16 = NORMAL.astype(ml_dtypes.bfloat16).tobytes()


def in_planes(data: bytes, number_bytes: int = 2) -> bytes:
    encoded = encode(data, number_bytes)
    assert encoded is not None
    return encoded


def plane(content: bytes, coding: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<BI", coding, len(content) if length is None else length) + content


def deflated(content: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(content) + coder.flush()


@pytest.mark.parametrize(("numbers", "share"), [(UNIFORM, 0.66), (NORMAL, 0.67)])
def test_bfloat16_factors_take_two_thirds_of_their_bytes(numbers: np.ndarray, share: float) -> None:
    data = numbers.astype(ml_dtypes.bfloat16).tobytes()
    encoded = in_planes(data)
    assert decode(encoded) == data
    assert len(encoded) <= share * len(data)


@pytest.mark.parametrize(("dtype", "number_bytes", "share"), [("float16", 2, 0.90), ("float32", 4, 0.86)])
def test_other_floats_gain_less(dtype: str, number_bytes: int, share: float) -> None:
    data = NORMAL.astype(dtype).tobytes()
    encoded = in_planes(data, number_bytes)
    assert decode(encoded) == data
    assert len(encoded) <= share * len(data)


def test_zeros_nearly_vanish() -> None:
    assert len(in_planes(bytes(CHUNK_BYTES))) < CHUNK_BYTES / 7


@given(st.binary(min_size=1, max_size=64), st.integers(1, 200), st.sampled_from([2, 4]))
def test_any_bytes_come_back(pattern: bytes, repeats: int, number_bytes: int) -> None:
    data = pattern * repeats
    encoded = encode(data, number_bytes)
    if encoded is not None:
        assert len(data) % number_bytes == 0
        assert len(encoded) < len(data)
        assert decode(encoded) == data


@pytest.mark.parametrize("data", [b"", BF16[:-1], _NOISE.bytes(1 << 12), bytes(CHUNK_BYTES + 2)])
def test_what_would_not_shrink_or_is_no_whole_number_is_left_as_it_is(data: bytes) -> None:
    assert encode(data, 2) is None


def test_a_dtype_that_nobody_knows_is_left_as_it_is() -> None:
    assert encode(BF16, 0) is None
    assert encode(BF16, 8) is None


@pytest.mark.parametrize(
    ("encoded", "why"),
    [
        (b"\x02", "head"),
        (plane(b"", coding=3, length=6), "numbers of 3 bytes"),
        (struct.pack("<BI", 2, 0), "0 bytes"),
        (struct.pack("<BI", 2, 3), "3 bytes"),
        (struct.pack("<BI", 2, CHUNK_BYTES + 2), "at most"),
        (struct.pack("<BI", 2, 4) + plane(b"ab"), "head"),
        (struct.pack("<BI", 2, 4) + plane(b"ab") + plane(b"ab", length=9), "ends after"),
        (struct.pack("<BI", 2, 4) + plane(b"abc") + plane(b"ab"), "3 bytes for 2 numbers"),
        (struct.pack("<BI", 2, 4) + plane(b"ab", coding=7) + plane(b"ab"), "coding 7"),
        (struct.pack("<BI", 2, 4) + plane(b"ab") + plane(b"ab") + b"x", "behind the last plane"),
        (struct.pack("<BI", 2, 4) + plane(b"\xff\xff", coding=1) + plane(b"ab"), "no deflate stream"),
        (struct.pack("<BI", 2, 4) + plane(deflated(b"ab")[:-1], coding=1) + plane(b"ab"), "no end"),
        (struct.pack("<BI", 2, 4) + plane(deflated(b"ab") + b"x", coding=1) + plane(b"ab"), "behind it"),
        (struct.pack("<BI", 2, 4) + plane(deflated(b"a"), coding=1) + plane(b"ab"), "1 bytes for 2 numbers"),
        (struct.pack("<BI", 2, 4) + plane(deflated(bytes(100 << 20)), coding=1) + plane(b"ab"), "more than 2 bytes"),
    ],
)
def test_what_is_no_chunk_is_refused_with_the_reason(encoded: bytes, why: str) -> None:
    with pytest.raises(BadPlanes, match=why):
        decode(encoded)


def test_a_damaged_chunk_is_refused_or_other_bytes_of_the_same_length() -> None:
    """The digest of the whole tells those apart; nothing else may come out, and no other error."""
    encoded, chance = in_planes(BF16[:2000]), np.random.default_rng(5)
    for _ in range(2000):
        damaged = bytearray(encoded)
        for _ in range(int(chance.integers(1, 4))):
            damaged[int(chance.integers(len(damaged)))] = int(chance.integers(256))
        with suppress(BadPlanes):
            assert len(decode(bytes(damaged[: int(chance.integers(1, len(damaged) + 1))]))) <= CHUNK_BYTES
