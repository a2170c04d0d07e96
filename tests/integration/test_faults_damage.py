"""A flipped byte anywhere on the coordinator's disk: refused by name, or the adapter of the undisturbed run.

`tests/faults/flip_bytes.py` does the same a thousand times, with any seed.
"""

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest
from coordinators import NumpyClient, clients_of, config_of, observing, serving
from faults.flip_bytes import KINDS, RANKS, Ruin, make_ruin, trials
from structlog.testing import capture_logs

from common.codec import digest_of
from common.errors import CorruptStore, CorruptTransfer
from coordinator.stores.blobs import FileBlobs
from worker.messages import Outcome, Task

SEED = int(os.environ.get("RAFLORA_TEST_SEED", "20261123"))
TRIALS = 96


@pytest.fixture(scope="module")
def ruin(tmp_path_factory: pytest.TempPathFactory) -> Ruin:
    return asyncio.run(make_ruin(tmp_path_factory.mktemp("ruin")))


def test_no_flipped_byte_makes_a_wrong_adapter_in_silence(ruin: Ruin, tmp_path: Path) -> None:
    made = list(trials(ruin, SEED, TRIALS, tmp_path))
    assert [str(trial) for trial in made if not trial.is_good] == []
    ended = Counter((trial.file.split("/")[0], trial.ended) for trial in made)
    assert ended[("journal.sqlite-wal", "refused")] >= TRIALS // len(KINDS) - 2  # but for bytes that mean nothing
    assert ended[("blobs", "refused")] > 0
    assert ended[("journal.sqlite-shm", "identical")] == TRIALS // len(KINDS)  # SQLite makes it anew


# ---------------------------------------------------------------- bytes that arrived and were not submitted yet


async def test_a_half_upload_that_rots_is_sent_again(tmp_path: Path) -> None:
    await _finishes_in_spite_of_a_rotten_upload(tmp_path, stop_at=700)


async def test_a_complete_upload_that_rots_before_it_is_submitted_is_sent_again(tmp_path: Path) -> None:
    await _finishes_in_spite_of_a_rotten_upload(tmp_path, stop_at=None)


async def _finishes_in_spite_of_a_rotten_upload(folder: Path, stop_at: int | None) -> None:
    expected = await _adapter_of(folder / "undisturbed")
    config = config_of(folder / "rotten", rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        ada, *others = clients
        task = await ada.fetch_task()
        content = await ada.train(task)
        await ada.upload(task, content, stop_at=stop_at)
        (file,) = [path for path in (config.state_dir / "uploads").rglob("*") if path.is_file()]
        rotten = bytearray(file.read_bytes())
        rotten[300] ^= 4
        file.write_bytes(rotten)
        with pytest.raises(CorruptTransfer):
            await _send(ada, task, content)
        await ada.upload(task, content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED
        await asyncio.gather(*(client.work() for client in others))
        assert (await observer.finished()).adapter_digest == expected


async def test_a_rotten_update_is_asked_for_again_and_the_round_heals(tmp_path: Path) -> None:
    expected = await _adapter_of(tmp_path / "undisturbed")
    config = config_of(tmp_path / "rotten", rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        ada = clients[0]
        task = await ada.fetch_task()
        content = await ada.train(task)
        await ada.upload(task, content)
        assert await ada.submit(task, content) is Outcome.ACCEPTED
        _flip(FileBlobs(config.state_dir / "blobs").open(digest_of(content)))
        await asyncio.gather(*(client.work() for client in clients))
        status = await observer.finished()
        assert status.adapter_digest == expected
        assert status.last_round.attempts == 2


async def test_a_slice_that_rots_under_a_running_coordinator_is_made_anew_when_a_worker_tells(tmp_path: Path) -> None:
    expected = await _adapter_of(tmp_path / "undisturbed")
    config = config_of(tmp_path / "rotten", rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        ada = clients[0]
        task = await ada.fetch_task()
        slice_blob = FileBlobs(config.state_dir / "blobs").open(task.adapter.digest)
        _flip(slice_blob)
        with capture_logs() as logs:
            assert await ada.rpc.fail_task(task.lease_token, CorruptTransfer.reason, "damaged 3 times in a row")
        assert [str(slice_blob) in entry["why"] for entry in logs if "made anew" in entry["event"]] == [True]
        await asyncio.gather(*(client.work() for client in clients))  # each checks the digest of what it gets
        assert (await observer.finished()).adapter_digest == expected


async def test_a_global_adapter_that_rots_under_a_running_coordinator_is_refused_by_name(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as (ada, *_):
        task = await ada.fetch_task()
        blobs = FileBlobs(config.state_dir / "blobs")
        adapter = blobs.open((await observer.see()).adapter_digest)
        _flip(adapter)
        _flip(blobs.open(task.adapter.digest))
        assert await ada.rpc.fail_task(task.lease_token, CorruptTransfer.reason, "damaged 3 times in a row")
        with pytest.raises(CorruptStore, match=f"blob {adapter}: its bytes changed on disk"):
            await ada.fetch_task()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


async def _send(client: NumpyClient, task: Task, content: bytes) -> None:
    await client.upload(task, content)
    await client.submit(task, content)


async def _adapter_of(folder: Path) -> str:
    config = config_of(folder, rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        return (await observer.finished()).adapter_digest
