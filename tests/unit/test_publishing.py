"""Merging, publishing, sweeping and exporting, in a whole coordinator without a network."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coordinators import BASE_MODEL, SPEC
from lone_site import CONTENT, DIGEST, KEY, RANK, HeldJournal, blobs_of, lonely, running, stream

import coordinator.intake
import coordinator.stores.uploads
from common.codec import digest_of, encode
from common.errors import InvalidRequest, LeaseSuperseded, QuotaExceeded, StorageFailed, TooBusy, UnknownBlob
from coordinator.federation.requests import Outcome
from coordinator.federation.state import Profile
from coordinator.intake import Intake
from coordinator.publishing import PublishedAdapter
from coordinator.service import CoordinatorService
from coordinator.slices import BlobReference
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import MemoryJournal
from coordinator.stores.uploads import Arrival


class SlowBlobs(FileBlobs):
    """Can be held up between writing a blob and saying its name."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_written = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def put(self, content: bytes) -> str:
        digest = super().put(content)
        self.is_written.set()
        assert self.may_go_on.wait(timeout=30)
        return digest


# ---------------------------------------------------------------- a sweep at the worst moment


async def test_an_update_that_is_not_recorded_yet_outlives_a_sweep(tmp_path: Path) -> None:
    config, journal = lonely(tmp_path), HeldJournal("UpdateAccepted")
    service = CoordinatorService(config, journal, blobs_of(config))
    async with running(service) as ada:
        task = await ada.fetch()
        await ada.upload()
        submitting = asyncio.create_task(ada.submit(task))
        assert await asyncio.to_thread(journal.is_held.wait, 30)
        await service._publisher.sweep()
        assert DIGEST in service.blobs.digests()
        journal.may_go_on.set()
        assert await submitting is Outcome.ACCEPTED


async def test_an_adapter_that_is_not_published_yet_outlives_a_sweep(tmp_path: Path) -> None:
    config, journal = lonely(tmp_path), HeldJournal("AdapterPublished")
    service = CoordinatorService(config, journal, blobs_of(config))
    async with running(service) as ada:
        await ada.work()
        assert await asyncio.to_thread(journal.is_held.wait, 30)
        await service._publisher.sweep()
        journal.may_go_on.set()
        assert await ada.published() in service.blobs.digests()


async def test_a_slice_that_is_being_written_outlives_a_sweep(tmp_path: Path) -> None:
    config = lonely(tmp_path)
    blobs = SlowBlobs(config.state_dir / "blobs")
    service = CoordinatorService(config, MemoryJournal(), blobs)
    async with running(service):
        blobs.is_written.clear()
        blobs.may_go_on.clear()
        asking = asyncio.create_task(service.foundation.slices.slice_of(service.engine.state.adapter_digest, RANK))
        assert await asyncio.to_thread(blobs.is_written.wait, 30)
        sweeping = asyncio.create_task(service._publisher.sweep())
        await asyncio.sleep(0)  # lets it come to where it waits
        blobs.may_go_on.set()
        reference = await asking
        await sweeping
        assert blobs.verify(reference.digest)


async def test_what_a_client_that_left_was_sending_is_swept(tmp_path: Path) -> None:
    config = lonely(tmp_path)
    service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
    async with running(service) as ada:
        await service.join("bob", KEY, Profile(RANK, 10), SPEC, BASE_MODEL)
        await ada.fetch()
        await ada.upload(CONTENT[:100])
        await service._publisher.sweep()
        assert await service.intake.committed_bytes("ada", KEY, DIGEST) == 100
        await service.leave("ada", KEY)
        await service._publisher.sweep()
    assert list((config.state_dir / "uploads").iterdir()) == []


# ---------------------------------------------------------------- helpers that die, exports that fail


async def test_a_helper_that_is_killed_costs_nothing_but_time(tmp_path: Path) -> None:
    digests = []
    for processes in (0, 1):
        config = lonely(tmp_path / str(processes), aggregation__processes=processes)
        service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
        async with running(service) as ada:
            pool = service._publisher._pool
            if processes:
                os.kill(await asyncio.wrap_future(pool.submit(os.getpid)), signal.SIGKILL)
            await ada.work()
            digests.append(await ada.published())
            assert [r.attempts for r in service.engine.state.history] == [1]
    assert digests[0] == digests[1]


async def test_an_export_that_fails_ends_nothing_and_the_next_round_is_exported(tmp_path: Path) -> None:
    exported: list[int] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def export(published: PublishedAdapter) -> None:
        exported.append(published.round)
        if published.round == 1:
            raise ValueError("the exporter has a bug")
        loop.call_soon_threadsafe(done.set)

    config = lonely(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config), export)) as ada:
        for number in (1, 2):
            await ada.work()
            await ada.published(number)
        await asyncio.wait_for(done.wait(), 30)
    assert exported == [1, 2]


async def test_an_adapter_that_was_published_and_not_exported_is_exported_at_the_next_start(tmp_path: Path) -> None:
    config, journal, exported = lonely(tmp_path), MemoryJournal(), []
    async with running(CoordinatorService(config, journal, blobs_of(config))) as ada:
        await ada.work()
        digest = await ada.published()
    service = CoordinatorService(config, journal, blobs_of(config), exported.append)
    async with running(service):
        await service._publisher.sweep()  # as at every start; a second one finds nothing to do
        await service._publisher.sweep()
    assert [(p.round, digest_of(encode(p.adapter))) for p in exported] == [(1, digest)]


# ---------------------------------------------------------------- senders and submitters


async def test_the_same_submission_twice_at_once_is_accepted_once(tmp_path: Path) -> None:
    config, journal = lonely(tmp_path), HeldJournal("UpdateAccepted")
    async with running(CoordinatorService(config, journal, blobs_of(config))) as ada:
        task = await ada.fetch()
        await ada.upload()
        first = asyncio.create_task(ada.submit(task))
        assert await asyncio.to_thread(journal.is_held.wait, 30)
        others = [asyncio.create_task(ada.submit(task)) for _ in range(3)]
        await asyncio.sleep(0)  # lets them ask
        journal.may_go_on.set()
        assert await first is Outcome.ACCEPTED
        assert await asyncio.gather(*others) == [Outcome.DUPLICATE] * 3


async def test_a_submitter_that_hangs_up_does_not_let_the_next_one_in_early(tmp_path: Path) -> None:
    config, journal = lonely(tmp_path), HeldJournal("UpdateAccepted")
    async with running(CoordinatorService(config, journal, blobs_of(config))) as ada:
        task = await ada.fetch()
        await ada.upload()
        first = asyncio.create_task(ada.submit(task))
        assert await asyncio.to_thread(journal.is_held.wait, 30)
        first.cancel()
        again = asyncio.create_task(ada.submit(task))
        await asyncio.sleep(0)  # lets it ask
        journal.may_go_on.set()
        assert await again is Outcome.DUPLICATE


async def test_a_sender_that_falls_silent_gives_its_place_away_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent() -> AsyncIterator[bytes]:
        monkeypatch.setattr(coordinator.intake, "CHUNK_WAIT_SECONDS", 0.0)  # from the second chunk on
        yield CONTENT[:100]
        await asyncio.Event().wait()

    config = lonely(tmp_path, server__max_uploads=1)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        await ada.fetch()
        intake, reference = ada.service.intake, BlobReference(DIGEST, len(CONTENT))
        await intake.begin_upload("ada", KEY, ada.lease_token, reference)
        with pytest.raises(TooBusy, match=r"'ada': an upload that .* gives its place to others"):
            await intake.receive("ada", KEY, DIGEST, 0, silent())
        monkeypatch.undo()
        assert await intake.begin_upload("ada", KEY, ada.lease_token, reference) == 100
        assert await intake.receive("ada", KEY, DIGEST, 100, stream(CONTENT[100:])) == len(CONTENT)


def has_room(intake: Intake, client_id: str) -> bool:
    try:
        with intake.ledger.stream(client_id):
            return True
    except QuotaExceeded:
        return False


async def test_a_sender_that_is_gone_keeps_its_place_until_nothing_of_it_is_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_held, may_go_on = threading.Event(), threading.Event()

    class SlowArrival(Arrival):
        def take(self, offset: int, data: bytes | memoryview) -> None:
            is_held.set()
            assert may_go_on.wait(timeout=30)
            super().take(offset, data)

    monkeypatch.setattr(coordinator.stores.uploads, "Arrival", SlowArrival)
    config = lonely(tmp_path, limits__max_uploads=1)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        await ada.fetch()
        intake = Intake(ada.service.foundation, ada.service.known_member, lambda _: "the clinic of both")
        await intake.begin_upload("ada", KEY, ada.lease_token, BlobReference(DIGEST, len(CONTENT)))
        tasks_before = asyncio.all_tasks()
        sending = asyncio.create_task(intake.receive("ada", KEY, DIGEST, 0, stream(CONTENT)))
        assert await asyncio.to_thread(is_held.wait, 30)
        while not sending.done():
            sending.cancel()
            await asyncio.sleep(0)
        assert not has_room(intake, "bob")
        may_go_on.set()
        await asyncio.wait(asyncio.all_tasks() - tasks_before, timeout=30)
        assert has_room(intake, "bob")
        intake.close()


async def test_a_sender_of_many_small_chunks_is_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.intake, "STREAM_SECONDS", 0.0)
    config = lonely(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        await ada.fetch()
        with pytest.raises(TooBusy):
            await ada.upload(*(bytes([byte]) for byte in CONTENT))


async def test_bytes_are_taken_only_under_the_lease_that_holds_and_only_of_what_was_announced_under_it(
    tmp_path: Path,
) -> None:
    config = lonely(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        intake, reference = ada.service.intake, BlobReference(DIGEST, len(CONTENT))
        older = await ada.fetch()
        with pytest.raises(UnknownBlob, match="announce it first"):
            await intake.receive("ada", KEY, DIGEST, 0, stream(CONTENT))
        await intake.begin_upload("ada", KEY, older.lease_token, reference)
        await ada.fetch()  # another process of the same name
        with pytest.raises(LeaseSuperseded, match=f"'ada': lease {older.lease_token} was followed by"):
            await intake.receive("ada", KEY, DIGEST, 0, stream(CONTENT))
        assert await ada.upload() == len(CONTENT)


async def test_an_empty_chunk_is_refused(tmp_path: Path) -> None:
    config = lonely(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        await ada.fetch()
        with pytest.raises(InvalidRequest, match="'ada': an empty chunk at byte 100"):
            await ada.upload(CONTENT[:100], b"", CONTENT[100:])


async def test_a_broken_disk_ends_the_coordinator_even_if_nobody_waits_for_the_answer(tmp_path: Path) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        assert may_go_on.wait(timeout=30)
        raise StorageFailed("the disk is gone")

    config = lonely(tmp_path)
    service = CoordinatorService(config, MemoryJournal(), blobs_of(config))
    serving = asyncio.create_task(service.run())
    caller = asyncio.create_task(service.foundation.on_disk(fail))
    assert await asyncio.to_thread(begun.wait, 30)
    caller.cancel()
    may_go_on.set()
    with pytest.raises(ExceptionGroup) as ended:
        await serving
    assert ended.group_contains(StorageFailed, match="the disk is gone")
