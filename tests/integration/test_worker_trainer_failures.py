"""A trainer that fails, hangs or must stop, and the agent that lives on: real processes, a real gRPC server."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from raflora.v1 import federation_pb2 as pb
from worker_site import Site, scripted_site, train

from worker import supervisor
from worker.config import SitePolicy
from worker.supervisor import TaskFailed


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with scripted_site(tmp_path) as made:
        yield made


async def test_training_goes_on_while_the_coordinator_restarts(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("wait_at_gate")
    gate = site.folder / "gate"
    os.mkfifo(gate)
    async with site.working() as worker:
        await site.coordinator.training.wait()
        await site.coordinator.stop()
        await asyncio.to_thread(gate.write_bytes, b"go")
        await site.time.backed_off.wait()  # it has trained, and cannot upload yet
        await site.coordinator.start()
        await worker
    assert [u.lease_token for u in site.coordinator.updates] == [1]
    assert len(site.coordinator.joins) == 1, "a restart is no reason to join again"


@pytest.mark.parametrize(
    ("mishap", "reason", "message"),
    [
        ("crash", "trainer_died", "signal SIGKILL (often the system, short of memory); the worker's log"),
        ("exit", "trainer_died", "exit code 7; the worker's log has its last words"),
        ("babble", "trainer_died", "no message"),
        ("out_of_memory", "out_of_memory", "rank 4 does not fit"),
        ("nan", "not_finite", "head holds nan"),
        ("secret", "a_new_word", "the worker's log says more"),
    ],
)
async def test_a_trainer_that_fails_costs_one_task(site: Site, mishap: str, reason: str, message: str) -> None:
    site.script.tasks = [train(1), train(2)]
    site.mishaps(mishap)

    await site.work()

    (failure,) = site.coordinator.failures
    assert (failure.lease_token, failure.reason) == (1, reason)
    assert message in failure.message
    assert "patients" not in failure.message
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_what_a_failure_tells_is_in_the_egress_report_and_quotes_no_local_data(site: Site) -> None:
    site.script.tasks = [train(1), train(2)]
    site.mishaps("crash", "load_fails")

    await site.work()

    died, unreadable = (f"{failure.reason}: {failure.message}" for failure in site.coordinator.failures)
    report = [json.loads(line) for line in (site.state_dir / "egress.jsonl").read_text().splitlines()]
    assert [line["words"] for line in report if line["kind"] == "failure"] == [died, unreadable]
    assert "the last words" not in died
    assert unreadable == "data_error: the worker's log says more"


async def test_a_trainer_that_cannot_load_again_fails_that_task_and_is_started_anew_for_the_next(site: Site) -> None:
    site.script.tasks = [train(1), train(2), train(3)]
    site.mishaps("crash", "load_fails")

    await site.work()

    assert [(f.lease_token, f.reason) for f in site.coordinator.failures] == [(1, "trainer_died"), (2, "data_error")]
    assert [u.lease_token for u in site.coordinator.updates] == [3]


async def test_a_site_that_cannot_load_says_why_and_does_not_join(site: Site) -> None:
    site.mishaps("load_fails")

    with pytest.raises(TaskFailed, match=r"data\.train: there is no such file"):
        await site.work()
    assert site.coordinator.joins == []


async def test_a_task_that_takes_too_long_is_given_back(site: Site) -> None:
    site.script.tasks = [train(1), train(2)]
    site.mishaps("hang")

    await site.work(SitePolicy(max_task_seconds=2))

    (failure,) = site.coordinator.failures
    assert (failure.reason, failure.message) == ("time_limit", "trainer: train took longer than 2 s")
    assert [u.lease_token for u in site.coordinator.updates] == [2]


@pytest.mark.parametrize(("mishap", "survives"), [("wait_for_stop", True), ("hang", False)])
async def test_stop_ends_the_work_and_kills_only_a_trainer_that_does_not_listen(
    site: Site, monkeypatch: pytest.MonkeyPatch, mishap: str, survives: bool
) -> None:
    if not survives:
        monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.1)
    site.script.tasks = [train(1)]
    site.script.finishes = False
    site.mishaps(mishap)
    async with site.working() as worker:
        await site.coordinator.training.wait()
        first_pid = (site.folder / "pid").read_text()
        site.coordinator.polled.clear()
        site.script.directive = pb.LEASE_DIRECTIVE_STOP
        await site.coordinator.polled.wait()
        site.script.directive = pb.LEASE_DIRECTIVE_CONTINUE
        site.script.tasks = [train(2)]
        site.script.finishes = True
        await worker
    assert [u.lease_token for u in site.coordinator.updates] == [2]
    assert ((site.folder / "pid").read_text() == first_pid) is survives
    assert site.coordinator.failures == [], "a task that was taken back is not a failed one"


async def test_a_cancelled_worker_leaves_and_no_trainer_survives(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("hang")
    async with site.working():
        await site.coordinator.training.wait()
    assert site.coordinator.departures == ["ada"]
    assert not site.has_trainer()


async def test_sigterm_stops_the_trainer_and_leaves_in_an_orderly_way(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("hang")
    async with site.working() as worker:
        await site.coordinator.training.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await worker  # an order that was followed is no error
    assert site.coordinator.departures == ["ada"]
    assert not site.has_trainer()
