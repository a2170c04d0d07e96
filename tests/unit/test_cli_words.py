"""Numbers and remote strings as people read them."""

import pytest

from cli.words import counted, decimals, human_seconds, percent, plain, rank_range


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (75, "1 min 15 s"),
        (4000, "1 h 6 min"),
        (90_000, "1 d 1 h"),
        (float("nan"), "-"),
        (float("inf"), "-"),
    ],
)
def test_seconds_are_said_in_at_most_two_units(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.412, "41.2 %"), (1, "100.0 %"), (0, "0.0 %"), (2e-7, "2e-05 %"), (float("nan"), "-")]
)
def test_a_small_share_never_reads_as_zero(share: float, text: str) -> None:
    assert percent(share) == text


def test_rank_indices_count_from_one_and_include_the_last() -> None:
    assert [rank_range(0, 2), rank_range(2, 8), rank_range(4, 5)] == ["1-2", "3-8", "5"]


def test_a_name_from_the_wire_cannot_steer_the_terminal() -> None:
    assert plain("ada\x1b[2J\nbob") == "ada\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}bob"


def test_a_plural_is_one() -> None:
    assert [counted(1, "client"), counted(0, "client")] == ["1 client", "0 clients"]


def test_a_loss_that_is_no_number_is_a_dash() -> None:
    assert [decimals(0.83219), decimals(float("nan"))] == ["0.832", "-"]
