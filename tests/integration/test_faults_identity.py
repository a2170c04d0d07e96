"""Two workers with one identity: the newer one goes on, the older one ends, and the operator hears of it."""

import asyncio
import shutil
from pathlib import Path

import pytest
from coordinators import NumpyClient, clients_of, config_of, observing, serving
from faults.workers import mishap, tiny_federation, working
from structlog.testing import capture_logs

from common.errors import IdentityConflict
from coordinator.sessions import ALARM_SECONDS, REMEMBERED_SESSIONS, Sessions
from worker.messages import Outcome, Progress

RANKS = {"ada": 2, "bob": 4}
ALARM = "two workers speak as 'ada'"


# ---------------------------------------------------------------- the rule


def test_of_two_sessions_the_one_that_was_heard_first_later_is_the_newer() -> None:
    sessions = Sessions()
    sessions.hear("ada", "one", 0.0)
    sessions.hear("ada", "two", 1.0)
    assert not sessions.is_newest("ada", "one")
    with pytest.raises(IdentityConflict, match="was its state_dir copied"):
        sessions.hear("ada", "one", 2.0)
    sessions.hear("ada", "two", 3.0)
    assert sessions.is_newest("ada", "two")
    assert [ALARM in alarm for alarm in sessions.alarms(4.0)] == [True]


def test_a_worker_that_is_restarted_again_and_again_raises_no_alarm() -> None:
    sessions = Sessions()
    for number in range(3 * REMEMBERED_SESSIONS):
        for _ in range(2):
            sessions.hear("ada", f"session {number}", float(number))
    assert list(sessions.alarms(100.0)) == []


def test_an_alarm_is_told_for_an_hour_and_clients_do_not_mix() -> None:
    sessions = Sessions()
    for client_id in ("ada", "bob"):
        sessions.hear(client_id, "one", 0.0)
    sessions.hear("ada", "two", 1.0)
    with pytest.raises(IdentityConflict):
        sessions.hear("ada", "one", 2.0)
    assert len(list(sessions.alarms(2.0 + ALARM_SECONDS))) == 1
    assert list(sessions.alarms(3.0 + ALARM_SECONDS)) == []


def test_who_gives_no_session_is_left_alone() -> None:
    sessions = Sessions()
    for session in ("one", "", "two", ""):
        sessions.hear("ada", session, 0.0)
    assert sessions.is_newest("ada", "")
    assert list(sessions.alarms(0.0)) == []


# ---------------------------------------------------------------- over the wire


async def test_one_name_with_another_key_is_refused(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, clients_of(address, RANKS) as (ada, _):
        stranger = NumpyClient(address, "ada", 2, enrol_key="another-key")
        with pytest.raises(IdentityConflict, match="another worker joined under this name"):
            await stranger.join()
        with pytest.raises(IdentityConflict):
            await stranger.rpc.poll_task(0.0)
        assert await ada.rpc.poll_task(0.0) is not None
        await stranger.rpc.close()


async def test_a_poll_that_is_still_waiting_takes_no_task_from_the_successor_of_its_worker(tmp_path: Path) -> None:
    async with (
        serving(config_of(tmp_path, rounds__min_clients=2)) as address,
        clients_of(address, {"ada": 2}) as (ada,),
    ):
        forgotten = asyncio.create_task(ada.rpc.poll_task(30.0))
        await ada.rpc.heartbeat(0, Progress("waiting"))  # after it, on the same connection, the poll has arrived
        successor = NumpyClient(address, "ada", 2)
        polling = asyncio.create_task(successor.rpc.poll_task(30.0))
        await successor.rpc.heartbeat(0, Progress("waiting"))
        async with clients_of(address, {"bob": 4}):
            (task,) = (await polling).tasks
            with pytest.raises(IdentityConflict):
                await forgotten
            assert await successor.do(task) is Outcome.ACCEPTED
        await successor.rpc.close()


async def test_a_copied_state_folder_ends_the_older_worker_and_the_newer_one_finishes(tmp_path: Path) -> None:
    config = tiny_federation(tmp_path, rounds__lease_ttl_seconds=1)
    older, newer = tmp_path / "older", tmp_path / "newer"
    mishap(older, "wait_for_stop")
    with capture_logs() as logs:
        async with serving(config) as address, observing(address) as observer:
            async with working(address, older, "ada") as first:
                while "training" not in [a.activity for a in (await observer.see()).assignments]:
                    pass
                shutil.copytree(older / "state", newer / "state")
                async with working(address, newer, "ada") as second:
                    with pytest.raises(IdentityConflict, match="a newer worker speaks with the same name"):
                        await first
                    await second
            status = await observer.finished()
    assert any(ALARM in warning for warning in status.warnings)
    assert "two workers speak as one client" in [line["event"] for line in logs if line["log_level"] == "warning"]
    assert [c.client_id for c in status.last_round.contributions] == ["ada"]


async def test_a_worker_that_is_restarted_in_the_middle_of_its_task_raises_no_alarm(tmp_path: Path) -> None:
    config = tiny_federation(tmp_path, rounds__lease_ttl_seconds=1)
    folder = tmp_path / "ada"
    mishap(folder, "wait_for_stop")
    async with serving(config) as address, observing(address) as observer:
        async with working(address, folder, "ada"):
            while "training" not in [a.activity for a in (await observer.see()).assignments]:
                pass
            while (folder / "mishaps").read_text():  # or the next trainer would wait instead of this one
                await observer.see()
        async with working(address, folder, "ada") as again:
            await again
        status = await observer.finished()
    assert not any(ALARM in warning for warning in status.warnings)
