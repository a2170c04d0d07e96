"""How often a caller may make the coordinator write."""

import pytest
from structlog.testing import capture_logs

from common.errors import IdentityConflict, QuotaExceeded
from coordinator import pace as module
from coordinator.pace import BURST, SECONDS_PER_RECORD, Pace
from coordinator.sessions import Sessions


def spend(pace: Pace, count: int, now: float = 0.0, round: int = 0) -> None:
    for _ in range(count):
        pace.check("eve", now, round)
        pace.spend("eve", now, round)


def test_a_burst_passes_and_then_one_in_a_while() -> None:
    pace = Pace()
    spend(pace, BURST)
    with pytest.raises(QuotaExceeded, match="try again in 10 s"):
        pace.check("eve", 0.0)
    pace.check("bob", 0.0)
    spend(pace, 1, SECONDS_PER_RECORD)
    with pytest.raises(QuotaExceeded):
        pace.check("eve", SECONDS_PER_RECORD)


def test_a_long_silence_saves_up_no_more_than_the_burst() -> None:
    pace = Pace()
    spend(pace, BURST)
    spend(pace, BURST, 1e9)
    with pytest.raises(QuotaExceeded):
        pace.check("eve", 1e9)


def test_a_published_round_gives_everything_back() -> None:
    pace = Pace()
    for round in range(1000):  # a thousand rounds in one moment, with as much as a round can need
        spend(pace, BURST, 0.0, round)
    with pytest.raises(QuotaExceeded):
        pace.check("eve", 0.0, 999)


def test_what_was_asked_in_one_moment_is_paid_back() -> None:
    pace = Pace(burst=1, seconds_per_record=1.0)
    for _ in range(3):
        pace.spend("eve", 0.0)  # all three were checked before the first was counted
    with pytest.raises(QuotaExceeded):
        pace.check("eve", 2.5)
    pace.check("eve", 3.0)


def test_it_remembers_a_bounded_number_of_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLERS", 2)
    pace = Pace(burst=1)
    for who in ("ada", "bob", "cem"):
        pace.spend(who, 0.0)
    pace.check("ada", 0.0)
    with pytest.raises(QuotaExceeded):
        pace.check("cem", 0.0)


def test_a_lease_belongs_to_the_session_that_was_given_it() -> None:
    sessions = Sessions()
    sessions.hear("ada", "first", 0.0)
    sessions.note_lease("ada", "first", 5)
    assert sessions.lease_of("ada", "first") == 5
    assert (sessions.lease_of("ada", ""), sessions.lease_of("ada", "second"), sessions.lease_of("bob", "")) == (0, 0, 0)
    sessions.hear("ada", "second", 1.0)
    sessions.note_lease("ada", "first", 6)  # an answer to the older one that was still on its way
    assert (sessions.lease_of("ada", "first"), sessions.lease_of("ada", "second")) == (0, 0)


def test_two_processes_that_quarrel_all_day_make_one_line_a_minute() -> None:
    sessions = Sessions()
    sessions.hear("ada", "older", 0.0)
    sessions.hear("ada", "newer", 0.0)
    with capture_logs() as lines:
        for second in range(120):
            with pytest.raises(IdentityConflict):
                sessions.hear("ada", "older", float(second))
    assert [line["unsaid"] for line in lines] == [0, 59]
