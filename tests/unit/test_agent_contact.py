"""Patience and what the log says meanwhile, with a clock that the test turns."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.errors import InvalidRequest, RafloraError, TooBusy, Unavailable
from worker.assignment import heartbeat_pause_seconds
from worker.contact import Clock, Contact, pause_seconds
from worker.identity import is_alive

DOWN = Unavailable("coordinator 10.0.0.5:7070 cannot be reached: connection refused")


class Hands:
    """A clock whose hands move only while somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.seconds, sleep=self.sleep, chance=lambda: 1.0, wall_time=lambda: 500.0)


def failing(*errors: RafloraError) -> Callable[[], Awaitable[str]]:
    waiting = list(errors)

    async def operation() -> str:
        if waiting:
            raise waiting.pop(0)
        return "answer"

    return operation


def test_pauses_double_from_half_a_second_to_thirty_with_full_jitter() -> None:
    assert [pause_seconds(failures, 1.0) for failures in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [pause_seconds(failures, 0.0) for failures in (0, 3, 1_000_000)] == [0.5, 0.5, 0.5]


def test_heartbeats_are_spread_by_a_fifth_and_never_hot() -> None:
    assert [heartbeat_pause_seconds(30, chance) for chance in (0.0, 0.5, 1.0)] == [24, 30, 36]
    assert heartbeat_pause_seconds(0, 0.5) == 0.1
    assert heartbeat_pause_seconds(float("inf"), 0.5) == 3600


async def test_an_outage_is_told_at_once_then_every_thirty_seconds_then_its_end(tmp_path: Path) -> None:
    contact = Contact(tmp_path, Hands().clock)
    with capture_logs() as logs:
        assert await contact.insist(failing(*[DOWN] * 8)) == "answer"
    # The attempts are at 0, 1, 3, 7, 15, 31, 61 and 91 seconds; the answer comes at 121.
    assert [line["event"] for line in logs] == [f"{DOWN}; trying again"] * 4 + ["the coordinator is back"]
    assert logs[-1]["after_seconds"] == 121


async def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    contact = Contact(tmp_path, Hands().clock)
    assert await contact.insist(failing(TooBusy("8 uploads"), RafloraError("a bug over there"))) == "answer"


async def test_a_refusal_is_an_answer_and_is_not_repeated(tmp_path: Path) -> None:
    contact = Contact(tmp_path, Hands().clock)
    with pytest.raises(InvalidRequest):
        await contact.insist(failing(InvalidRequest("no")))
    assert is_alive(tmp_path, max_age_seconds=10, now=505)


async def test_a_worker_without_contact_is_not_alive(tmp_path: Path) -> None:
    contact = Contact(tmp_path, Hands().clock)
    contact.lost(DOWN)
    assert not is_alive(tmp_path, max_age_seconds=10, now=500)
    contact.made()
    assert is_alive(tmp_path, max_age_seconds=10, now=510)
    assert not is_alive(tmp_path, max_age_seconds=10, now=511)
