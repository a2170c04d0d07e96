"""What others write reaches a terminal as letters only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.plain import plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out of memory", "out of memory"),
        ("two\nlines\tof", "two lines of"),
        ("\x1b[31mred", "?[31mred"),
        ("\u202egnp", "?gnp"),
        ("naïve 漢字", "naïve 漢字"),
        ("x" * 30, "x" * 17 + "..."),
    ],
)
def test_text_of_others_is_made_plain(text: str, expected: str) -> None:
    assert plain(text, 20) == expected


@given(st.text(st.characters()), st.integers(3, 50))
def test_it_is_always_printable_and_short(text: str, most: int) -> None:
    assert plain(text, most).isprintable()
    assert len(plain(text, most)) <= most
