"""Bytes as people read them."""

import pytest

from common.sizes import human_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (6 << 20, "6.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_bytes_are_said_in_the_largest_unit_that_fits(size_bytes: int, text: str) -> None:
    assert human_bytes(size_bytes) == text
