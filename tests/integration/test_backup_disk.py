"""A backup and what is restored from it on the disk: durable before it is told, and nothing of a failure stays."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from coordinators import clients_of, config_of, observing, serving

from common.errors import CorruptStore, TooBusy
from coordinator.config import CoordinatorConfig
from coordinator.stores import backup as backup_module
from coordinator.stores.backup import JOURNAL_FILE, MANIFEST_FILE, Source, back_up, read_backup, restore
from coordinator.stores.blobs import FileBlobs

RANKS = {"ada": 2, "bob": 4}


@pytest.fixture
async def config(tmp_path: Path) -> CoordinatorConfig:
    """Of a federation in the middle of its second round; its coordinator has ended."""
    config = config_of(tmp_path, rounds__min_clients=2)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        for client in (*clients, clients[0]):
            await client.do(await client.fetch_task())
        assert len((await observer.see()).assignments) == len(RANKS)
    return config


def source_of(config: CoordinatorConfig) -> Source:
    return Source(config.name, config.state_dir, config.state_dir / JOURNAL_FILE)


class Tape:
    """Which files and folders were synced, and what was renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        fsync, replace_ = os.fsync, os.replace

        def spy_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

        def spy_replace(source: str | Path, target: str | Path) -> None:
            self.calls.append(("replace", str(target)))
            replace_(source, target)

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "replace", spy_replace)

    def synced_before(self, renamed: Path) -> set[str]:
        """What was synced before the last of all, this name, was given."""
        return {path for call, path in self.calls[: self.calls.index(("replace", str(renamed)))] if call == "fsync"}

    def synced_after(self, renamed: Path) -> set[str]:
        return {path for call, path in self.calls[self.calls.index(("replace", str(renamed))) :] if call == "fsync"}


def everything_in(folder: Path) -> set[str]:
    """Its files and folders and itself, by their place in it; what SQLite syncs itself is left out."""
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)) for path in paths if path.name not in {JOURNAL_FILE, MANIFEST_FILE}}


async def test_a_further_attempt_copies_only_what_the_one_before_has_not(
    config: CoordinatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = FileBlobs(config.state_dir / "blobs")
    stale, real, copied = blobs.put(b"needed by the first moment only"), backup_module._copy, list[str]()
    wanted = backup_module._older_adapters

    def copy(source: Path, target: Path) -> None:
        copied.append(target.name)
        real(source, target)
        if target.name == stale:  # the last one; the moment after does not need it
            monkeypatch.setattr(backup_module, "_older_adapters", wanted)
            raise backup_module._Swept

    monkeypatch.setattr(backup_module, "_older_adapters", lambda *_: [stale])
    monkeypatch.setattr(backup_module, "_copy", copy)
    back_up(source_of(config), tmp_path / "backup")
    names = [Path(name).name for name in read_backup(tmp_path / "backup").files]
    assert stale in copied
    assert stale not in names
    assert sorted(name for name in copied if len(name) == 64) == sorted(
        {stale, *(name for name in names if len(name) == 64)}
    )
    assert sorted(path.name for path in (tmp_path / "backup").rglob("*") if path.is_file()) == sorted(
        [*names, MANIFEST_FILE]
    )


async def test_a_backup_is_durable_before_its_last_file_says_so(
    config: CoordinatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = tmp_path / "backup"
    tape = Tape(monkeypatch)
    back_up(source_of(config), backup)
    monkeypatch.undo()
    synced = tape.synced_before(backup / MANIFEST_FILE)
    assert {str(backup / name) for name in everything_in(backup) - {"."}} <= synced
    assert {str(backup), str(backup / JOURNAL_FILE)} <= synced
    assert {str(backup), str(tmp_path)} <= tape.synced_after(backup / MANIFEST_FILE)


async def test_what_is_restored_is_durable_before_it_has_its_place(
    config: CoordinatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "backup"
    back_up(source_of(config), made)
    state = tmp_path / "restored"
    tape = Tape(monkeypatch)
    restore(made, state)
    monkeypatch.undo()
    half_made = tmp_path / f"restored.restoring-{os.getpid()}"
    renamed = {path for call, path in tape.calls if call == "replace"}  # synced under the name of a part
    assert {str(half_made / name) for name in everything_in(state)} - renamed <= tape.synced_before(state)
    folders = {half_made / path.relative_to(state) for path in [state, *state.rglob("*")] if path.is_dir()}
    at = tape.calls.index(("replace", str(state)))
    assert set(tape.calls[at - len(folders) : at]) == {("fsync", str(folder)) for folder in folders}  # with all in them
    assert str(tmp_path) in tape.synced_after(state)


async def test_a_restore_that_fails_leaves_nothing_behind_and_the_same_command_works_afterwards(
    config: CoordinatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, places = tmp_path / "authority", (tmp_path / "restored", tmp_path / "again")
    (authority / "sites").mkdir(parents=True)
    (authority / "ca-key.pem").write_bytes(b"secret")
    back_up(replace(source_of(config), authority=authority), tmp_path / "backup")
    real = backup_module._put_in_place

    for failing in (places[1], places[0]):  # the authority's place first, as they come

        def put(made: Path, target: Path, failing: Path = failing) -> None:
            if target == failing:
                raise TooBusy("the disk is full")
            real(made, target)

        monkeypatch.setattr(backup_module, "_put_in_place", put)
        with pytest.raises(TooBusy):
            restore(tmp_path / "backup", *places)
        assert not [path for path in tmp_path.iterdir() if ".restoring-" in path.name]  # noqa: ASYNC240
        assert not places[0].exists()
    monkeypatch.undo()
    restore(tmp_path / "backup", *places)
    assert (places[1] / "ca-key.pem").read_bytes() == b"secret"


async def test_a_backup_that_lacks_a_needed_blob_is_refused_even_if_its_list_is_whole(
    config: CoordinatorConfig, tmp_path: Path
) -> None:
    made = tmp_path / "backup"
    back_up(source_of(config), made)
    backup = read_backup(made)
    for blob in [name for name in backup.files if name.startswith("blobs/")]:
        files = {name: described for name, described in backup.files.items() if name != blob}
        (made / MANIFEST_FILE).write_bytes(backup_module._manifest(replace(backup, files=files)))
        with pytest.raises(CorruptStore, match="the backup lacks what its journal needs"):
            restore(made, tmp_path / "restored")
        assert not (tmp_path / "restored").exists()
