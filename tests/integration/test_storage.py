"""What is promised about the disk, over the real service: the order of a submission, whose blobs, a disk that fails."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coordinators import NumpyClient, clients_of, config_of, entries_of, observing, serving
from raflora.v1 import admin_pb2

from common import failpoints
from common.codec import digest_of
from common.errors import ConfigError, StorageFailed, Unavailable, UnknownBlob
from coordinator.config import CoordinatorConfig
from coordinator.publishing import PublishedAdapter
from coordinator.server import run_coordinator
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import SqlJournal
from coordinator.stores.owner import OWNER_FILE
from worker.messages import Blob, Outcome

RANKS = {"ada": 2, "bob": 4}


class Tape:
    """What is asked of the operating system, in order; files by their place in the state folder."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._state = state
        self.calls: list[str] = []
        self._spy(monkeypatch, os, "fsync", lambda fd: f"fsync {self._name(os.readlink(f'/proc/self/fd/{fd}'))}")
        for call in ("replace", "link"):
            self._spy(monkeypatch, os, call, lambda _, target, call=call: f"{call} {self._name(target)}")
        self._spy(monkeypatch, SqlJournal, "append", lambda _, __, entries: " ".join(e.kind for e in entries))

    def _spy(self, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, said: Callable[..., str]) -> None:
        real = getattr(owner, call)

        def spy(*args: Any) -> Any:
            sentence = said(*args)
            result = real(*args)
            self.calls.append(sentence)  # when it is done
            return result

        monkeypatch.setattr(owner, call, spy)

    def _name(self, path: str | Path) -> str:
        return str(path).removeprefix(f"{self._state}/")


@pytest.fixture
def config(tmp_path: Path) -> CoordinatorConfig:
    return config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2)


async def test_a_submission_is_durable_step_by_step_before_it_is_answered(
    config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(config) as address, clients_of(address, RANKS) as (ada, _):
        task = await ada.fetch_task()
        content = await ada.train(task)
        tape = Tape(config.state_dir, monkeypatch)
        await ada.upload(task, content)
        uploaded = list(tape.calls)
        tape.calls.clear()
        assert await ada.submit(task, content) is Outcome.ACCEPTED
        submitted = [*tape.calls, "answer"]
        monkeypatch.undo()
    digest = digest_of(content)
    (complete,) = (call.removeprefix("replace ") for call in uploaded if call.startswith("replace "))
    folder = str(Path(complete).parent)
    part = f"fsync {complete}.{len(content)}.part"
    assert Path(complete).name == digest
    assert [c for c in uploaded if c in (part, f"replace {complete}", f"fsync {folder}")][-3:] == [
        part,
        f"replace {complete}",
        f"fsync {folder}",
    ]
    shard = f"blobs/{digest[:2]}"
    assert [c for c in submitted if c != "fsync blobs"] == [
        f"link {shard}/{digest}",
        f"fsync {shard}",
        "UpdateAccepted",
        "answer",
    ]
    assert submitted.index("fsync blobs") < submitted.index("UpdateAccepted")  # the shard may be new


def test_a_blob_is_durable_step_by_step_before_its_name_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = FileBlobs(tmp_path / "blobs")
    tape = Tape(tmp_path, monkeypatch)
    digest = blobs.put(b"factors of ada")
    shard = f"blobs/{digest[:2]}"
    written = tape.calls[1]
    assert tape.calls == ["fsync blobs", written, f"replace {shard}/{digest}", f"fsync {shard}"]
    assert written.startswith(f"fsync {shard}/{digest}.")
    assert written.endswith(".part")


# ---------------------------------------------------------------- whose blobs


async def test_what_another_client_sent_can_be_downloaded_by_nobody(config: CoordinatorConfig) -> None:
    async with serving(config) as address, clients_of(address, {"ada": 2, "bob": 2}) as (ada, bob):
        await ada.do(await ada.fetch_task())
        sent = Blob(digest_of(ada.sent[1]), len(ada.sent[1]))
        with pytest.raises(UnknownBlob, match=rf"'bob': {sent.digest[:12]} is not a slice"):
            async for _ in bob.rpc.download(sent, 0):
                pass


async def finish(config: CoordinatorConfig) -> set[str]:
    """A whole federation; its blobs afterwards."""
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        await observer.finished()
    return FileBlobs(config.state_dir / "blobs").digests()


@pytest.mark.parametrize("change", [{"name": "letters"}, {"store__journal": "sqlite:///{folder}/other.sqlite"}])
async def test_another_federation_does_not_start_on_the_blobs_of_the_first(
    tmp_path: Path, config: CoordinatorConfig, change: dict[str, str]
) -> None:
    kept = await finish(config)
    change = {key: value.format(folder=tmp_path) for key, value in change.items()}
    other = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2, **change)
    with pytest.raises(ConfigError, match=r"holds the adapters of federation 'digits' .* another state_dir"):
        await run_coordinator(other)
    assert FileBlobs(config.state_dir / "blobs").digests() == kept


async def test_nothing_is_swept_before_there_is_a_federation(tmp_path: Path, config: CoordinatorConfig) -> None:
    kept = await finish(config)
    (config.state_dir / OWNER_FILE).unlink()
    other = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2, name="letters")
    async with serving(other) as address, observing(address) as observer:
        assert "waiting for the first worker" in (await observer.see()).explanation
    assert FileBlobs(config.state_dir / "blobs").digests() == kept


# ---------------------------------------------------------------- a disk that fails


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
async def test_a_disk_that_fails_ends_the_coordinator_and_is_not_asked_again(
    config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tries: list[OSError] = []

    def fail(*_: Any) -> None:
        tries.append(OSError(errno.EIO, os.strerror(errno.EIO)))
        raise tries[-1]

    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_coordinator(config, on_listening=listening.set_result))
    async with clients_of(await listening, RANKS) as (ada, _):
        task = await ada.fetch_task()
        content = await ada.train(task)
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(Unavailable):
            await send(ada, task, content)
        with pytest.raises(StorageFailed, match=r"the disk did not keep what it was given: Input/output error"):
            await running
        monkeypatch.undo()
    assert len(tries) == 1
    assert "UpdateAccepted" not in [entry.kind for entry in entries_of(config)]


async def send(client: NumpyClient, task: Any, content: bytes) -> None:
    await client.upload(task, content)
    await client.submit(task, content)


# ---------------------------------------------------------------- what a crash left undone


async def test_an_adapter_that_nobody_exported_is_exported_at_the_next_start(config: CoordinatorConfig) -> None:
    await finish(config)
    exported: asyncio.Queue[PublishedAdapter] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def export(published: PublishedAdapter) -> None:
        loop.call_soon_threadsafe(exported.put_nowait, published)

    running = asyncio.create_task(run_coordinator(config, on_published=export))
    assert (await asyncio.wait_for(exported.get(), 30)).round == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_a_client_that_never_comes_back_was_sending_goes_when_its_round_ends(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2, rounds__quorum=0.5)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as (ada, bob):
        task = await bob.fetch_task()
        content = await bob.train(task)
        await bob.upload(task, content, stop_at=len(content) // 2)
        await ada.do(await ada.fetch_task())
        uploads = config.state_dir / "uploads"
        assert len(list(uploads.iterdir())) == 1  # bob's: its round is open
        await observer.admin.CloseRound(admin_pb2.CloseRoundRequest(round=1))
        await observer.finished()
        async with asyncio.timeout(30):
            while list(uploads.iterdir()):
                await observer.see()


async def test_what_a_crash_left_behind_goes_at_the_next_start(config: CoordinatorConfig) -> None:
    kept = await finish(config)
    blobs = FileBlobs(config.state_dir / "blobs")
    orphan = blobs.put(b"merged, and never published")
    torn = blobs.open(orphan).with_name(f"{orphan}.1-2.part")
    torn.write_bytes(b"half")
    stray = config.state_dir / "owner.json.1-2.part"
    stray.write_bytes(b"half")
    swept = threading.Event()
    failpoints.arm(lambda step: swept.set() if step == "blob.unlinked" else None)
    try:
        async with serving(config):
            assert await asyncio.to_thread(swept.wait, 30)
    finally:
        failpoints.arm(None)
    assert blobs.digests() <= kept
    assert not torn.exists()
    assert not stray.exists()


async def test_helper_processes_change_no_byte(tmp_path: Path) -> None:
    published = []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        config = config_of(folder, rounds__num_rounds=1, rounds__min_clients=2, aggregation__processes=processes)
        async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
            await asyncio.gather(*(client.work() for client in clients))
            published.append((await observer.finished()).adapter_digest)
    assert published[0] == published[1]
