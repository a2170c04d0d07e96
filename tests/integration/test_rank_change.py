"""A site that gets a bigger GPU: it joins again with a new measurement, and the next round uses it. A real coordinator.

The open round keeps its ranks, what an operator set stays, and everybody is told why.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from coordinators import BASE_MODEL, SPEC, NumpyClient, Observer, config_of, observing, serving
from raflora.v1 import admin_pb2, status_pb2
from structlog.testing import capture_logs
from worker_site import scripted_site, train

from cli.main import main
from common.errors import InvalidRequest
from common.version import PROTOCOL
from coordinator.config import CoordinatorConfig
from worker.messages import Enrolment, MemoryMeasurement, Outcome, Place, RankProfile

GIB = 1 << 30
# 1 GiB and 1 GiB a rank: the levels 2, 4 and 8 take 3, 5 and 9 GiB.
MEASURED = MemoryMeasurement(base_bytes=GIB, bytes_per_rank=GIB, micro_batch=2, quantization="4bit")


@dataclass
class MeasuredClient(NumpyClient):
    """A client that shows what its device was measured to hold."""

    memory_bytes: int = 4 * GIB
    measured: MemoryMeasurement | None = MEASURED
    places: list[Place] = field(default_factory=list)

    async def join(self, base_model: str = BASE_MODEL) -> None:
        profile = RankProfile(
            self.rank, "cuda", self.memory_bytes, self.num_examples, examples_per_second=9.0, measured=self.measured
        )
        self.places.append(await self.rpc.join(Enrolment(PROTOCOL, profile, base_model, SPEC)))

    async def move_to(self, memory_bytes: int) -> None:
        """Another card: the worker starts again and joins with a new measurement."""
        self.memory_bytes = memory_bytes
        await self.restart()
        await self.join()


@asynccontextmanager
async def federation(folder: Path, **changes: Any) -> AsyncIterator[tuple[str, list[MeasuredClient], Observer]]:
    """Three clients of 4 GiB under the policy hardware, in round 1."""
    config = hardware(folder, **changes)
    async with serving(config) as address, observing(address) as observer:
        clients = [MeasuredClient(address, name, 8) for name in ("ada", "bob", "cem")]
        try:
            for client in clients:
                await client.join()
            yield address, clients, observer
        finally:
            for client in clients:
                await client.rpc.close()


def hardware(folder: Path, **changes: Any) -> CoordinatorConfig:
    return config_of(folder, ranks__policy="hardware", ranks__levels=[2, 4, 8], **changes)


async def one_task(client: NumpyClient) -> int:
    """Does what is asked, and returns at which rank it was asked."""
    task = await client.fetch_task()
    assert await client.do(task) is Outcome.ACCEPTED
    return task.lora_rank


async def rank_and_reason(observer: Observer, client_id: str) -> tuple[int, str]:
    listing = await observer.status.ListClients(status_pb2.ListClientsRequest(page_size=10))
    (found,) = [client for client in listing.clients if client.client_id == client_id]
    return found.lora_rank, found.rank_reason


async def test_a_larger_card_between_rounds_is_used_in_the_next_round(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (ada, bob, cem), observer):
        assert [client.places[0].lora_rank for client in (ada, bob, cem)] == [2, 2, 2]
        small = "hardware: 2 of 2, 4, 8 is the largest that fits 90 % of 4.0 GiB (measured 1.0 GiB + 1.0 GiB a rank)"
        assert ada.places[0].rank_reason == small
        assert [await one_task(client) for client in (ada, bob)] == [2, 2]
        await bob.move_to(12 * GIB)
        large = "hardware: 8 of 2, 4, 8 is the largest that fits 90 % of 12.0 GiB (measured 1.0 GiB + 1.0 GiB a rank)"
        assert (bob.places[-1].lora_rank, bob.places[-1].rank_reason) == (8, large)
        assert await rank_and_reason(observer, "bob") == (8, large)
        # Round 1 is open and keeps its ranks: bob's update of rank 2 counts, and cem trains at 2.
        status = await observer.see()
        assert [a.lora_rank for a in status.assignments] == [2, 2, 2]
        assert await one_task(cem) == 2
        assert [await one_task(client) for client in (ada, bob, cem)] == [2, 8, 2]
        assert len((await observer.finished()).last_round.contributions) == 3


async def test_a_larger_card_in_the_middle_of_a_task_does_not_change_that_task(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (ada, bob, cem), _observer):
        task = await bob.fetch_task()
        await bob.move_to(12 * GIB)
        again = await bob.fetch_task()
        assert (task.lora_rank, again.lora_rank, again.adapter) == (2, 2, task.adapter)
        assert await bob.do(again) is Outcome.ACCEPTED
        assert [await one_task(client) for client in (ada, cem)] == [2, 2]
        assert await one_task(bob) == 8


async def test_a_smaller_card_is_heeded_too_from_the_round_after_the_open_one_on(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds__num_rounds=3) as (_, (ada, bob, cem), observer):
        await bob.move_to(12 * GIB)
        assert [await one_task(client) for client in (ada, bob, cem)] == [2, 2, 2]
        assert await one_task(ada) == 2  # so round 2 is open
        await bob.move_to(6 * GIB)
        assert (await rank_and_reason(observer, "bob"))[0] == 4
        assert [await one_task(client) for client in (bob, cem)] == [8, 2]
        assert await one_task(bob) == 4


async def test_what_an_operator_set_stays(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (_, bob, _cem), observer):
        await observer.admin.SetClientRank(admin_pb2.SetClientRankRequest(client_id="bob", lora_rank=3))
        assert await rank_and_reason(observer, "bob") == (3, "set by the operator")
        await bob.move_to(12 * GIB)
        assert (bob.places[-1].lora_rank, bob.places[-1].rank_reason) == (3, "set by the operator")


async def test_who_was_not_measured_is_named_in_the_status_until_it_is(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (_, bob, _cem), observer):
        bob.measured = None
        await bob.move_to(4 * GIB)
        assert bob.places[-1].rank_reason == "hardware: not measured; the smallest level 2; run `raflora probe` there"
        assert [w for w in (await observer.see()).warnings if w.startswith("not measured: bob; ")]
        bob.measured = MEASURED
        await bob.move_to(4 * GIB)
        assert not [w for w in (await observer.see()).warnings if w.startswith("not measured")]


async def test_a_measurement_that_no_device_has_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (_, bob, _cem), observer):
        before = await rank_and_reason(observer, "bob")
        bob.measured = MemoryMeasurement(base_bytes=1 << 60, bytes_per_rank=1, micro_batch=1, quantization="none")
        with pytest.raises(InvalidRequest, match="'bob': measured base_bytes 1152921504606846976; 0 to"):
            await bob.move_to(4 * GIB)
        assert await rank_and_reason(observer, "bob") == before


async def test_ranks_and_reasons_outlive_a_restart(tmp_path: Path) -> None:
    async with federation(tmp_path) as (_, (_, bob, _cem), observer):
        await bob.move_to(12 * GIB)
        before = await rank_and_reason(observer, "bob")
    async with serving(hardware(tmp_path)) as address, observing(address) as observer:
        assert await rank_and_reason(observer, "bob") == before
        assert before[0] == 8


async def test_a_worker_logs_why_it_has_its_rank(tmp_path: Path) -> None:
    async with scripted_site(tmp_path) as site:
        site.script.tasks = [train(1)]
        with capture_logs() as logs:
            await site.work()
    (joined,) = [line for line in logs if line["event"] == "joined"]
    assert (joined["rank"], joined["why"]) == (4, "declared 4")


def test_the_list_of_clients_says_why_in_json_and_whose_decision_it_was_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from canned_coordinator import Canned, client  # noqa: PLC0415
    from canned_coordinator import serving as serving_canned  # noqa: PLC0415

    ada = client("ada", 2)
    ada.rank_reason = "hardware: 2 of 2, 4, 8 is the largest that fits 90 % of 4.0 GiB"
    with serving_canned(Canned(clients=[ada])) as address:
        assert main(["clients", "--format", "json", "--coordinator", address]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["clients", "--coordinator", address]) == 0
    assert found["clients"][0]["rank_reason"] == ada.rank_reason
    assert "hardware" in capsys.readouterr().out
