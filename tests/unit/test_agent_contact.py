"""Patience and what the log says meanwhile, with a clock that the test turns."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import pairwise
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

import worker.contact
from common.errors import InvalidRequest, RafloraError, TooBusy, Unavailable
from worker.assignment import heartbeat_pause_seconds
from worker.contact import REMIND_SECONDS, Clock, Contact, pause_seconds
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
    assert [line["event"] for line in logs] == [f"{DOWN}; trying again"] * 5 + ["the coordinator is back"]
    assert logs[-1]["after_seconds"] == 121


async def test_the_log_is_never_silent_for_longer_than_that_also_within_a_pause(tmp_path: Path) -> None:
    hands, said_at = Hands(), list[float]()

    def note(_logger: object, _method: str, line: MutableMapping[str, object]) -> MutableMapping[str, object]:
        said_at.append(hands.seconds)
        return line

    structlog.configure(processors=[note, structlog.testing.LogCapture()])
    try:
        await Contact(tmp_path, hands.clock).insist(failing(*[DOWN] * 12))
    finally:
        structlog.reset_defaults()
    assert said_at[-1] == 241
    assert max(later - earlier for earlier, later in pairwise(said_at)) <= REMIND_SECONDS


async def test_an_attempt_that_nobody_answers_is_no_reason_to_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.contact, "REMIND_SECONDS", 0.01)
    reminders = 0

    def count(_logger: object, _method: str, line: MutableMapping[str, object]) -> MutableMapping[str, object]:
        nonlocal reminders
        reminders += 1
        if reminders == 3:
            answered.set()
        return line

    answered = asyncio.Event()
    attempts = iter((False, True))

    async def operation() -> str:
        if not next(attempts):
            raise DOWN
        await answered.wait()  # set by the third line in the log
        return "answer"

    structlog.configure(processors=[count, structlog.testing.LogCapture()])
    try:
        assert await asyncio.wait_for(Contact(tmp_path, Hands().clock).insist(operation), 30) == "answer"
    finally:
        structlog.reset_defaults()


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
