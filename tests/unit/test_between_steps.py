"""What must survive between two steps, when a restart, a sweep, a full journal or a hang-up comes in between."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from lone_site import DIGEST, blobs_of, lonely, running

from common import failpoints
from common.errors import TooBusy
from coordinator.federation.requests import Outcome
from coordinator.service import CoordinatorService
from coordinator.stores.journal import Entry, MemoryJournal


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


class FullJournal(MemoryJournal):
    """Finds no room for the first event of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        if any(entry.kind == self._kind for entry in entries):
            self._kind = ""
            raise TooBusy("the disk is full")
        super().append(federation, entries)


async def test_what_was_handed_out_for_an_open_round_outlives_a_restart_and_a_sweep(tmp_path: Path) -> None:
    """Where lora_A is frozen an update is compared with its slice, and nobody cuts that one again."""
    config, journal = lonely(tmp_path, aggregation__method="ffa-lora"), MemoryJournal()
    async with running(CoordinatorService(config, journal, blobs_of(config))) as ada:
        task = await ada.fetch()
    service = CoordinatorService(config, journal, blobs_of(config))
    async with running(service) as ada:
        await service._publisher.sweep()
        content = service.blobs.open(task.slice.digest).read_bytes()  # an update that changes nothing is one
        await ada.upload_other(content)
        assert await ada.submit(task, task.slice.digest) is Outcome.ACCEPTED


async def test_a_blob_that_two_need_is_kept_until_the_second_has_done(tmp_path: Path) -> None:
    config = lonely(tmp_path)
    service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
    async with running(service):
        digest, foundation = service.blobs.put(b"needed twice"), service.foundation
        with foundation.pinned(digest):
            with foundation.pinned(digest):
                pass
            foundation.sweep()
            assert digest in service.blobs.digests()
        foundation.sweep()
        assert digest not in service.blobs.digests()


async def test_an_update_that_found_no_room_in_the_journal_need_not_be_sent_again(tmp_path: Path) -> None:
    config = lonely(tmp_path)
    async with running(CoordinatorService(config, FullJournal("UpdateAccepted"), blobs_of(config))) as ada:
        task = await ada.fetch()
        await ada.upload()
        with pytest.raises(TooBusy, match="the disk is full"):
            await ada.submit(task)
        assert await ada.submit(task) is Outcome.ACCEPTED


async def test_a_submission_goes_on_to_its_end_when_the_submitter_has_hung_up(tmp_path: Path) -> None:
    is_linked, may_go_on = threading.Event(), threading.Event()

    def hold(step: str) -> None:
        if step == "blob.linked":
            is_linked.set()
            assert may_go_on.wait(timeout=30)

    config = lonely(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        task = await ada.fetch()
        await ada.upload()
        failpoints.arm(hold)
        submitting = asyncio.create_task(ada.submit(task))
        assert await asyncio.to_thread(is_linked.wait, 30)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        may_go_on.set()
        async with asyncio.timeout(30):
            await ada.published()


async def test_an_adapter_that_rots_while_its_successor_is_trained_is_not_merged_into_it(tmp_path: Path) -> None:
    config = lonely(tmp_path, rounds__max_attempts=1)
    service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
    async with running(service) as ada:
        task = await ada.fetch()
        await ada.upload()
        rotten = service.blobs.open(service.engine.state.adapter_digest)
        content = bytearray(rotten.read_bytes())
        content[-1] ^= 1
        rotten.write_bytes(content)
        assert await ada.submit(task) is Outcome.ACCEPTED
        engine, version = service.engine, -1
        async with asyncio.timeout(60):
            while not engine.state.round and "its bytes changed on disk" not in service.explanation():
                version = await engine.wait_for_change(version, 30.0)
        assert engine.state.round == 0


@pytest.mark.parametrize("keep_rounds", [1, 2])
async def test_so_many_adapters_are_kept_and_not_one_more(tmp_path: Path, keep_rounds: int) -> None:
    config = lonely(tmp_path, rounds__num_rounds=3, store__keep_rounds=keep_rounds)
    service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
    async with running(service) as ada:
        digests = [service.engine.state.adapter_digest]
        for number in (1, 2, 3):
            await ada.work()
            digests.append(await ada.published(number))
        await service._publisher.sweep()
        assert service.blobs.digests() & set(digests) == set(digests[-keep_rounds:])
        assert DIGEST not in service.blobs.digests()  # an update, and all of its rounds are over
