"""A backup of a living coordinator is a moment that can be gone on from, and workers of the lost time do no harm."""

import asyncio
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from coordinators import (
    CoordinatorProcess,
    NumpyClient,
    clients_of,
    config_of,
    entries_of,
    observing,
    serving,
    settings_of,
    to_toml,
)

from cli.errors import ExitCode
from cli.main import main
from common.errors import ConfigError, CorruptStore, LeaseSuperseded, TooBusy, UnknownTask
from coordinator.config import CoordinatorConfig
from coordinator.federation.events import LeasesSkipped
from coordinator.stores import backup as backup_module
from coordinator.stores.backup import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    SKIPPED_LEASES,
    Source,
    back_up,
    read_backup,
    restore,
)
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.event_codec import event_of
from worker.messages import Outcome

RANKS = {"ada": 2, "bob": 4, "cem": 8}


def source_of(config: CoordinatorConfig) -> Source:
    return Source(config.name, config.state_dir, config.state_dir / JOURNAL_FILE)


def at(config: CoordinatorConfig, state_dir: Path) -> CoordinatorConfig:
    return config.model_copy(update={"state_dir": state_dir})


async def adapter_of(config: CoordinatorConfig) -> str:
    """The last adapter of a federation that is played to its end."""
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        return (await observer.finished()).adapter_digest


async def test_a_federation_goes_on_from_a_backup_of_a_living_coordinator(tmp_path: Path) -> None:
    expected = await adapter_of(config_of(tmp_path / "undisturbed"))
    config = config_of(tmp_path)
    async with serving(config) as address, clients_of(address, RANKS) as (ada, bob, cem):
        assert await ada.do(await ada.fetch_task()) is Outcome.ACCEPTED
        task = await bob.fetch_task()
        content = await bob.train(task)
        made = await asyncio.to_thread(back_up, source_of(config), tmp_path / "backup")
        # The time that will be lost: a round is finished, the next one is under way.
        await bob.upload(task, content)
        assert await bob.submit(task, content) is Outcome.ACCEPTED
        await cem.do(await cem.fetch_task())
        lost = await bob.fetch_task()
        assert lost.round == 2
    assert (made.federation, made.round) == ("digits", 0)
    restored = at(config, tmp_path / "restored")
    assert restore(tmp_path / "backup", restored.state_dir).sequence == made.sequence
    async with serving(restored) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        _, bob, _ = clients
        with pytest.raises(Exception, match="round 2"):
            await bob.submit(lost, content)  # of a round that has not been yet
        await asyncio.gather(*(client.work() for client in clients))
        assert (await observer.finished()).adapter_digest == expected
    taken = [event_of(entry) for entry in entries_of(restored)][made.sequence :]
    assert isinstance(taken[0], LeasesSkipped)


async def test_a_lease_of_the_lost_time_is_never_given_again_nor_taken(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    async with serving(config) as address, clients_of(address, RANKS) as (ada, _, _):
        await asyncio.to_thread(back_up, source_of(config), tmp_path / "backup")
        lost = await ada.fetch_task()
        content = await ada.train(lost)
    restored = at(config, tmp_path / "restored")
    restore(tmp_path / "backup", restored.state_dir)
    async with serving(restored) as address:
        ada = NumpyClient(address, "ada", 2)
        with pytest.raises(UnknownTask, match="was never given for this task; poll"):
            await ada.upload(lost, content)
        task = await ada.fetch_task()
        assert task.lease_token > SKIPPED_LEASES > lost.lease_token
        with pytest.raises(LeaseSuperseded):
            await ada.upload(lost, content)
        assert await ada.do(task) is Outcome.ACCEPTED
        await ada.rpc.close()


async def test_workers_that_outlive_their_coordinator_go_on_with_the_restored_one(tmp_path: Path) -> None:
    """Real processes: the port stays the same, nobody tells the clients anything."""
    expected = await adapter_of(config_of(tmp_path / "undisturbed", rounds__num_rounds=4))
    settings = settings_of(tmp_path, rounds__num_rounds=4)
    process = CoordinatorProcess(tmp_path, settings)
    try:
        address = process.wait_until_listening()
        settings["server"]["listen"] = address
        async with clients_of(address, RANKS) as (ada, bob, cem), observing(address) as observer:
            for client in (ada, bob, cem):
                await client.do(await client.fetch_task())
            await cem.fetch_task()  # of round 2
            config = CoordinatorConfig.model_validate(settings)
            await asyncio.to_thread(back_up, source_of(config), tmp_path / "backup")
            for client in (ada, bob, cem):
                await client.do(await client.fetch_task())
            assert (await bob.fetch_task()).round == 3
            process.close()
            shutil.rmtree(config.state_dir)
            restore(tmp_path / "backup", config.state_dir)
            process = CoordinatorProcess(tmp_path, settings)
            process.wait_until_listening()
            await asyncio.gather(*(client.work() for client in (ada, bob, cem)))
            assert (await observer.finished()).adapter_digest == expected
    finally:
        process.close()


# ---------------------------------------------------------------- what a backup is made of


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    """A backup in the middle of a round."""
    config = config_of(tmp_path)
    async with serving(config) as address, clients_of(address, RANKS) as (ada, _, _):
        await ada.do(await ada.fetch_task())
        await asyncio.to_thread(back_up, source_of(config), tmp_path / "backup")
    return tmp_path / "backup"


async def test_every_changed_or_missing_file_is_found_by_name(made: Path, tmp_path: Path) -> None:
    names = [*read_backup(made).files, MANIFEST_FILE]
    assert len(names) >= 6  # journal, head, manifest, adapter, update, slice, the list itself
    for name in names:
        whole = (made / name).read_bytes()
        (made / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(CorruptStore, match=Path(name).name):
            restore(made, tmp_path / "restored")
        (made / name).unlink()
        with pytest.raises((CorruptStore, ConfigError), match=Path(name).name):
            restore(made, tmp_path / "restored")
        (made / name).write_bytes(whole)
    assert not (tmp_path / "restored").exists()
    restore(made, tmp_path / "restored")


async def test_nobody_else_may_read_a_backup_or_what_is_restored(made: Path, tmp_path: Path) -> None:
    restore(made, tmp_path / "restored")
    for folder in (made, tmp_path / "restored"):
        assert folder.stat().st_mode & 0o777 == 0o700
        journals = [path for path in folder.rglob("*") if path.name.startswith("journal")]
        assert {path.stat().st_mode & 0o777 for path in journals} == {0o600}


async def test_nothing_is_ever_restored_or_backed_up_over_something(made: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = sorted(state.rglob("*"))
    with pytest.raises(ConfigError, match="nothing is ever restored over it"):
        restore(made, state)
    with pytest.raises(ConfigError, match="exists already"):
        back_up(Source("digits", state, state / JOURNAL_FILE), made)
    assert sorted(state.rglob("*")) == before
    assert not [path for path in tmp_path.iterdir() if ".restoring-" in path.name]  # noqa: ASYNC240


async def test_a_backup_that_was_not_finished_is_no_backup(made: Path, tmp_path: Path) -> None:
    (made / MANIFEST_FILE).unlink()
    with pytest.raises(ConfigError, match="not a finished backup"):
        restore(made, tmp_path / "restored")


async def test_a_restored_journal_that_lacks_its_end_is_refused_even_if_the_list_was_made_for_it(
    made: Path, tmp_path: Path
) -> None:
    """Someone puts an older journal into the backup and makes the list anew: the chain's head still tells."""
    backup = read_backup(made)
    older = tmp_path / "older.sqlite"
    shutil.copy(made / JOURNAL_FILE, older)
    with sqlite3.connect(older) as database:
        database.execute("DELETE FROM journal WHERE sequence = (SELECT max(sequence) FROM journal)")
    database.close()
    shutil.copy(older, made / JOURNAL_FILE)
    files = {name: backup_module._described(made / name) for name in backup.files}
    (made / MANIFEST_FILE).write_bytes(backup_module._manifest(replace(backup, files=files)))
    with pytest.raises(CorruptStore, match="entries were lost"):
        restore(made, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


async def test_a_blob_that_is_swept_meanwhile_makes_the_backup_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    expected = await adapter_of(config)
    real, tries = backup_module._open, []

    def once_gone(blobs: FileBlobs, digest: str) -> Path:
        tries.append(digest)
        if len(tries) == 2:
            raise backup_module._Swept
        return real(blobs, digest)

    monkeypatch.setattr(backup_module, "_open", once_gone)
    back_up(source_of(config), tmp_path / "backup")
    assert len(tries) > 2
    restore(tmp_path / "backup", tmp_path / "restored")
    async with serving(at(config, tmp_path / "restored")) as address, observing(address) as observer:
        assert (await observer.see()).adapter_digest == expected
    monkeypatch.setattr(backup_module, "_open", lambda *_: (_ for _ in ()).throw(backup_module._Swept))
    with pytest.raises(TooBusy, match="faster than they could be copied"):
        back_up(source_of(config), tmp_path / "never")
    assert not (tmp_path / "never").exists()


async def test_a_damaged_state_is_not_backed_up(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    digest = await adapter_of(config)
    FileBlobs(config.state_dir / "blobs").open(digest).write_bytes(b"rot")
    with pytest.raises(CorruptStore, match=f"{digest}: its bytes changed on disk"):
        back_up(source_of(config), tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


# ---------------------------------------------------------------- the verbs


async def test_the_verbs_carry_state_and_authority_away_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, rounds__num_rounds=1)
    expected = await adapter_of(CoordinatorConfig.model_validate(settings))
    authority = tmp_path / "authority"
    (authority / "sites").mkdir(parents=True)
    (authority / "ca-key.pem").write_bytes(b"secret")
    (authority / "sites" / "ada.json").write_bytes(b"{}")
    config = tmp_path / "federation.toml"
    config.write_text(to_toml(settings) + f'[server.identity]\nfolder = "{authority}"\n')
    capsys.readouterr()
    assert main(["backup", str(config), str(tmp_path / "backup"), "--format", "json"]) == ExitCode.OK
    told = json.loads(capsys.readouterr().out)
    assert (told["federation"], told["round"], told["has_authority"]) == ("digits", 1, True)
    assert main(["backup", str(config), str(tmp_path / "without"), "--without-authority"]) == ExitCode.OK
    assert "federation digits after round 1" in capsys.readouterr().out
    assert not (tmp_path / "without" / "authority").exists()

    back = ["restore", str(tmp_path / "backup"), str(tmp_path / "restored"), "--authority", str(tmp_path / "again")]
    assert main(back) == ExitCode.OK
    assert (tmp_path / "again" / "ca-key.pem").read_bytes() == b"secret"
    assert (tmp_path / "again" / "ca-key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "again" / "sites" / "ada.json").is_file()
    assert main(back) == ExitCode.USAGE
    assert "something is there already" in capsys.readouterr().err
    restored = at(CoordinatorConfig.model_validate(settings), tmp_path / "restored")
    async with serving(restored) as address, observing(address) as observer:
        assert (await observer.see()).adapter_digest == expected


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder, "no coordinator's state folder"),
        (lambda folder: folder / "nothing", "nothing"),
    ],
)
def test_what_is_no_state_is_no_backup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], sentence: str
) -> None:
    assert main(["backup", str(make(tmp_path)), str(tmp_path / "backup")]) == ExitCode.USAGE
    assert sentence in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
