"""kill -9 where no federation comes by in test_kills.py: enrolment, the operator's commands, backup and restore.

Each is killed once at every step that it comes to undisturbed, and then the same command is started again.
"""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

import pytest
import pytest_asyncio
from coordinators import clients_of, config_of, serving, settings_of, to_toml
from faults.account import killed_elsewhere, owed_by
from faults.house import House, no_parts_in
from faults.kills import Nursery, nursery
from faults.lives import Life, Lives, living

from cli.errors import ExitCode
from common.certificates import check_pair, read_certificate
from common.errors import Revoked
from common.identity_folder import IdentityFolder
from common.join_token import parse_join_token
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from coordinator.engine import replay
from coordinator.federation.events import LeasesSkipped
from coordinator.identity.authority import load_authority
from coordinator.identity.registry import Registry
from coordinator.stores.backup import JOURNAL_FILE
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal
from worker.certificates import identity_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
AT_ONCE = 4  # scenes that are played beside each other
MOST_OF_A_LIFE_SECONDS = 25 * 86_400.0  # of a certificate that is good for 30 days


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Nursery]:
    async with nursery() as nursery_:
        yield nursery_


@pytest_asyncio.fixture(loop_scope="module")
async def lives(tmp_path: Path, place: Nursery) -> AsyncIterator[Lives]:
    folder = tmp_path / "lives"
    folder.mkdir()
    async with living(place, folder) as lives_:
        yield lives_


async def at_each(numbers: Iterable[int], scene: Callable[[int], Awaitable[None]]) -> None:
    """Plays the scene for every number, a few at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def play(number: int) -> None:
        async with places:
            await scene(number)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(play(number))


# ---------------------------------------------------------------- coming in


async def test_a_worker_killed_on_its_way_in_comes_in_with_one_key(tmp_path: Path, lives: Lives) -> None:
    house = House(tmp_path / "house", lives)
    assert await house.open().until_ready()
    house.invite("first")
    steps = (await house.comes_in("first")).steps
    house.check_in("first")

    async def scene(number: int) -> None:
        site = f"site-{number}"
        house.invite(site)
        await lives.killed(house.send(site, f"kill@{number}"))
        key = house.key_of(site)
        await house.comes_in(site)
        assert key in {None, house.key_of(site)}
        house.check_in(site)

    await at_each(range(1, steps.index("identity.certificate_written") + 2), scene)
    no_parts_in(house.identities.folder)
    assert lives.killed_at & killed_elsewhere() == owed_by("test_a_worker_killed_on_its_way_in_comes_in_with_one_key")


async def test_a_coordinator_killed_while_it_enrols_lets_in_one_key(tmp_path: Path, lives: Lives) -> None:
    house = House(tmp_path / "undisturbed", lives)
    coordinator = house.open()
    assert await coordinator.until_ready()
    house.invite("clinic")
    await house.comes_in("clinic")
    steps = coordinator.steps

    async def scene(number: int) -> None:
        house = House(tmp_path / f"house-{number}", lives)
        house.invite(site := f"clinic-{number}")
        coordinator = house.open(f"kill@{number}")
        assert await coordinator.until_ready()
        worker = house.send(site)
        await lives.killed(coordinator)
        again = house.open()
        assert await worker.until_ready(), worker.said
        await lives.kill(worker)
        house.check_in(site)
        house.invite("another")  # whatever is written next tidies up
        no_parts_in(house.identities.folder)
        await lives.kill(again)

    await at_each(range(1, steps.index("identity.answering") + 2), scene)
    assert lives.killed_at & killed_elsewhere() == owed_by("test_a_coordinator_killed_while_it_enrols_lets_in_one_key")


async def test_a_worker_killed_while_it_renews_stays_in_with_its_key(tmp_path: Path, lives: Lives) -> None:
    house = House(tmp_path / "house", lives)
    assert await house.open().until_ready()

    async def renews(site: str, plan: str) -> list[str]:
        life = house.send(site, plan, MOST_OF_A_LIFE_SECONDS)
        await lives.killed(life)
        return life.steps

    house.let_in("first")
    renewed = "kill@identity.certificate_written"
    steps = await renews("first", renewed)

    async def scene(number: int) -> None:
        house.let_in(site := f"site-{number}")
        key, first = house.key_of(site), identity_in(house.folder / site).tls.read().certificate
        await renews(site, f"kill@{number},{renewed}")
        await renews(site, renewed)
        assert identity_in(house.folder / site).tls.read().certificate != first
        await house.comes_in(site)
        assert house.key_of(site) == key
        house.check_in(site)

    await at_each(range(1, len(steps) + 1), scene)


# ---------------------------------------------------------------- the operator's commands


async def test_a_killed_init_goes_on_with_if_missing(tmp_path: Path, lives: Lives) -> None:
    command = ("--name", "127.0.0.1", "--if-missing")
    steps = (await lives.command("init", tmp_path / "first", *command)).steps
    check_initialised(tmp_path / "first", is_whole=True)

    async def scene(number: int) -> None:
        folder = tmp_path / f"fed-{number}"
        assert (await lives.command("init", folder, *command, plan=f"kill@{number}")).ended.result() == -signal.SIGKILL
        check_initialised(folder, is_whole=False)
        again = await lives.command("init", folder, *command)
        assert again.ended.result() == ExitCode.OK, again.said
        check_initialised(folder, is_whole=True)
        assert sorted(path.name for path in folder.iterdir()) == ["authority", "federation.toml", "operator"]
        no_parts_in(folder)

    await at_each(range(1, len(steps) + 1), scene)


def check_initialised(folder: Path, *, is_whole: bool) -> None:
    """What has its name is whole."""
    authority, operator, settings = folder / "authority", folder / "operator", folder / "federation.toml"
    if is_whole or authority.exists():
        load_authority(authority, lambda: 0.0)
        assert (authority / "address").read_text() == "127.0.0.1:7070\n"
    if is_whole or operator.exists():
        check_identity(operator, authority)
    if is_whole or settings.exists():
        assert load_settings(CoordinatorConfig, settings, environ={}).server.identity is not None


def check_identity(folder: Path, authority: Path) -> None:
    """All files are there, they fit each other, and the registry lets them in."""
    IdentityFolder(folder).check()
    pem = IdentityFolder(folder).tls.read()
    assert pem.certificate
    assert pem.key
    check_pair(pem.certificate, pem.key)
    Registry(authority).check(read_certificate(pem.certificate))
    assert IdentityFolder(folder).address == "127.0.0.1:7070"


@pytest_asyncio.fixture(loop_scope="module")
async def fed(tmp_path: Path, lives: Lives) -> Path:
    """What `raflora init` makes, to be copied."""
    await lives.command("init", tmp_path / "fed", "--name", "127.0.0.1")
    return tmp_path / "fed"


def works(token: str, authority: Path) -> None:
    """The token lets somebody in."""
    Registry(authority).check(read_certificate(parse_join_token(token).certificate.encode()))


async def test_a_site_whose_adding_was_killed_has_a_token_that_works_after_the_same_command(
    tmp_path: Path, lives: Lives, fed: Path
) -> None:
    async def add(folder: Path, plan: str = "") -> Life:
        out = ("--out", folder / "token", "--if-missing")
        return await lives.command("site", "add", "clinic-a", "--folder", folder, *out, plan=plan)

    steps = (await add(copied(fed, tmp_path / "first"))).steps

    async def scene(number: int) -> None:
        folder = copied(fed, tmp_path / f"fed-{number}")
        assert (await add(folder, f"kill@{number}")).ended.result() == -signal.SIGKILL
        if (folder / "token").exists():
            works((folder / "token").read_text(), folder / "authority")
        again = await add(folder)
        assert again.ended.result() == ExitCode.OK, again.said
        works((folder / "token").read_text(), folder / "authority")
        no_parts_in(folder)

    await at_each(range(1, len(steps) + 1), scene)


async def test_a_site_whose_adding_was_killed_before_its_token_was_printed_gets_one_again(
    tmp_path: Path, lives: Lives, fed: Path
) -> None:
    async def add(folder: Path, *more: str, plan: str = "") -> Life:
        return await lives.command("site", "add", "clinic-a", "--folder", folder, *more, plan=plan)

    steps = (await add(copied(fed, tmp_path / "first"))).steps

    async def scene(number: int) -> None:
        folder = copied(fed, tmp_path / f"fed-{number}")
        killed = await add(folder, plan=f"kill@{number}")
        assert killed.ended.result() == -signal.SIGKILL
        assert killed.said == "", "a token was printed that may not be known"
        again = await add(folder)
        if again.ended.result() != ExitCode.OK:
            assert "site clinic-a is known; --again gives it a new token" in again.said
            again = await add(folder, "--again")
        works(next(line for line in again.said.splitlines() if line.startswith("raflora-join-")), folder / "authority")
        no_parts_in(folder)

    await at_each(range(1, len(steps) + 1), scene)


async def test_a_site_whose_revocation_was_killed_is_in_or_out(tmp_path: Path, lives: Lives, fed: Path) -> None:
    added = await lives.command("site", "add", "clinic-a", "--folder", fed)
    token = next(line for line in added.said.splitlines() if line.startswith("raflora-join-"))

    async def revoke(folder: Path, plan: str = "") -> Life:
        return await lives.command("site", "revoke", "clinic-a", "--folder", folder, plan=plan)

    steps = (await revoke(copied(fed, tmp_path / "first"))).steps

    async def scene(number: int) -> None:
        folder = copied(fed, tmp_path / f"fed-{number}")
        assert (await revoke(folder, f"kill@{number}")).ended.result() == -signal.SIGKILL
        assert [site.name for site in Registry(folder / "authority").sites()] == ["clinic-a"]
        again = await revoke(folder)
        assert again.ended.result() == ExitCode.OK, again.said
        with pytest.raises(Revoked):
            works(token, folder / "authority")
        no_parts_in(folder)

    await at_each(range(1, len(steps) + 1), scene)


@pytest.mark.parametrize("again", [(), ("--again",)], ids=["new", "again"])
async def test_access_whose_giving_was_killed_is_whole_after_the_same_command(
    tmp_path: Path, lives: Lives, fed: Path, again: tuple[str, ...]
) -> None:
    async def add(folder: Path, plan: str = "") -> Life:
        words = ("eve", folder / "eve", "--role", "observer", "--folder", folder)
        return await lives.command("access", "add", *words, *again, plan=plan)

    if again:
        await add(fed)
    steps = (await add(copied(fed, tmp_path / "first"))).steps

    async def scene(number: int) -> None:
        folder = copied(fed, tmp_path / f"fed-{number}")
        assert (await add(folder, f"kill@{number}")).ended.result() == -signal.SIGKILL
        if not again and IdentityFolder(folder / "eve").is_complete:
            check_identity(folder / "eve", folder / "authority")
        second = await add(folder)
        if second.ended.result() != ExitCode.OK:
            assert "holds an identity already" in second.said
        check_identity(folder / "eve", folder / "authority")
        no_parts_in(folder)

    await at_each(range(1, len(steps) + 1), scene)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# ---------------------------------------------------------------- backup and restore


@pytest_asyncio.fixture(loop_scope="module")
async def played(tmp_path: Path) -> Path:
    """The settings file of a federation of one round that is over."""
    changes = {"rounds__num_rounds": 1, "rounds__min_clients": 1}
    async with serving(config_of(tmp_path, **changes)) as address, clients_of(address, {"ada": 2}) as (ada,):
        await ada.work()
    (tmp_path / "authority" / "sites").mkdir(parents=True)
    (tmp_path / "authority" / "ca.key").write_bytes(b"secret")
    (tmp_path / "authority" / "sites" / "ada.json").write_bytes(b"{}")
    identity = to_toml({"server.identity": {"folder": str(tmp_path / "authority")}})
    (tmp_path / "federation.toml").write_text(to_toml(settings_of(tmp_path, **changes)) + identity)
    return tmp_path / "federation.toml"


async def test_a_killed_backup_is_never_taken_for_whole(tmp_path: Path, lives: Lives, played: Path) -> None:
    steps = (await lives.command("backup", played, tmp_path / "first")).steps

    async def scene(number: int) -> None:
        made, state = tmp_path / f"backup-{number}", tmp_path / f"state-{number}"
        assert (await lives.command("backup", played, made, plan=f"kill@{number}")).ended.result() == -signal.SIGKILL
        restored = await lives.command("restore", made, state)
        if (made / "backup.json").exists():
            assert restored.ended.result() == ExitCode.OK, restored.said
            check_state(state)
        else:
            assert restored.ended.result() == ExitCode.USAGE
            assert "not a finished backup" in restored.said
            assert not state.exists()

    await at_each(range(1, len(steps) + 1), scene)
    again = await lives.command("backup", played, tmp_path / "backup-1")
    assert "exists already; name a folder that does not" in again.said
    assert (await lives.command("backup", played, tmp_path / "last")).ended.result() == ExitCode.OK
    assert (await lives.command("restore", tmp_path / "last", tmp_path / "state")).ended.result() == ExitCode.USAGE
    assert (await lives.command("restore", tmp_path / "last", tmp_path / "state-of-last")).ended.result() == ExitCode.OK
    check_state(tmp_path / "state-of-last")
    assert lives.killed_at & killed_elsewhere() == owed_by("test_a_killed_backup_is_never_taken_for_whole")


async def test_a_killed_restore_left_nothing_or_everything(tmp_path: Path, lives: Lives, played: Path) -> None:
    await lives.command("backup", played, tmp_path / "backup")

    async def restore(folder: Path, plan: str = "") -> Life:
        to = (folder / "state", "--authority", folder / "authority")
        return await lives.command("restore", tmp_path / "backup", *to, plan=plan)

    steps = (await restore(tmp_path / "first")).steps

    async def scene(number: int) -> None:
        folder = tmp_path / f"restored-{number}"
        assert (await restore(folder, f"kill@{number}")).ended.result() == -signal.SIGKILL
        if was_there := (folder / "state").exists():
            check_state(folder / "state")
        again = await restore(folder)
        if was_there:
            assert "something is there already; nothing is ever restored over it" in again.said
        else:
            assert again.ended.result() == ExitCode.OK, again.said
        check_state(folder / "state")
        assert (folder / "authority" / "ca.key").read_bytes() == b"secret"
        assert (folder / "authority" / "sites" / "ada.json").read_bytes() == b"{}"
        left = {path.name.partition("-")[0] for path in folder.iterdir()} - {"state", "authority"}
        assert left <= {"state.restoring", "authority.restoring"}, "which the page says to delete"

    await at_each(range(1, len(steps) + 1), scene)
    assert lives.killed_at & killed_elsewhere() >= owed_by("test_a_killed_restore_left_nothing_or_everything")


def check_state(state_dir: Path) -> None:
    """A coordinator can go on from it, after the leases that were skipped."""
    journal = SqlJournal(f"sqlite:///{state_dir / JOURNAL_FILE}")
    try:
        assert isinstance(event_of(list(journal.read("digits"))[-1]), LeasesSkipped)
        state, _, _ = replay("digits", journal)
        blobs = FileBlobs(state_dir / "blobs")
        for digest in state.required_blobs:
            blobs.verify(digest)
    finally:
        journal.close()
