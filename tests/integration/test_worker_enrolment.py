"""A worker comes in with a join token, stays in by itself, and is told in words why it may not. Real TLS and files."""

import asyncio
import hashlib
import io
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from coordinators import settings_of
from identities import Identities, WallClock, serving
from scripted_coordinator import Script, ScriptedCoordinator
from structlog.testing import capture_logs
from worker_site import TRAINER

from common import failpoints
from common.channel import Tls
from common.errors import BadJoinToken, ConfigError, IdentityConflict, NotAuthenticated, Revoked, Unavailable
from common.identity import Role, Subject
from coordinator.config import CoordinatorConfig
from worker.certificates import certificate_in, identity_in
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, TlsConfig, WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import Admission, Renewal, Watch, admit, keeper_of
from worker.messages import Blob
from worker.run import work

DAY = 86_400.0


class Killed(BaseException):
    """Stands for kill -9 at a failpoint."""


@dataclass
class SteppedClock:
    """Time passes only by sleeping; the test holds a sleep to look around."""

    at: float = field(default_factory=time.time)
    pauses: list[float] = field(default_factory=list)
    before_sleep: Callable[[], Any] = lambda: None

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.before_sleep()
        self.at += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.at, sleep=self.sleep, chance=lambda: 0.5, wall_time=lambda: self.at)


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


def federation(folder: Path, identities: Identities, **changes: Any) -> CoordinatorConfig:
    changes = {"rounds__num_rounds": 1, "rounds__min_clients": 1, "adapter__global_rank": 4, **changes}
    settings = settings_of(folder / "federation", server__identity=identities.settings(), **changes)
    settings["adapter"].update(target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    return CoordinatorConfig.model_validate(settings)


@pytest.fixture
async def address(tmp_path: Path, identities: Identities) -> AsyncIterator[str]:
    async with serving(federation(tmp_path, identities)) as address:
        yield address


def worker(folder: Path, name: str = "gpu1", **where: Any) -> WorkerConfig:
    return WorkerConfig(
        name=name,
        rank=4,
        state_dir=folder / "state",
        coordinator=CoordinatorAddress(rpc_timeout_seconds=5, **where),
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train="none"),
    )


async def come_in(config: WorkerConfig, clock: Clock = Clock(), *, anew: bool = False) -> Admission:
    config.state_dir.mkdir(exist_ok=True)
    return await admit(config, Contact(config.state_dir, clock), clock, anew=anew)


def client_of(admission: Admission) -> CoordinatorClient:
    return CoordinatorClient(admission.where, Credentials(admission.client_id, "key", "0"))


def token_at(identities: Identities, address: str, site: str = "clinic-a", **how: Any) -> str:
    workers, again = how.get("workers", 1), how.get("again", False)
    return identities.issuer.invite(site, workers=workers, days=how.get("days", 7.0), again=again, address=address)[
        1
    ].text


# --- coming in


async def test_a_token_is_all_that_a_worker_needs(identities: Identities, address: str, tmp_path: Path) -> None:
    config = worker(tmp_path, join_token=token_at(identities, address))
    admission = await come_in(config)
    client = client_of(admission)
    assert (await client.handshake()).federation == "digits"
    await client.close()
    assert admission.client_id == "clinic-a"
    assert sorted(path.name for path in identity_in(config.state_dir).path.iterdir()) == [
        "address", "ca.pem", "certificate.pem", "key.pem",
    ]  # fmt: skip


async def test_the_next_start_needs_neither_token_nor_address(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(token_at(identities, address))
    first = await come_in(worker(tmp_path, join_token_file=token))
    token.unlink()
    for config in (worker(tmp_path, join_token_file=token), worker(tmp_path)):
        again = await come_in(config)
        assert (again.client_id, again.where.address) == (first.client_id, address)


async def test_of_several_workers_each_has_a_name_and_the_token_is_then_used_up(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    token = token_at(identities, address, workers=2)
    for folder in ("one", "two", "three", "four"):
        (tmp_path / folder).mkdir()
    assert (await come_in(worker(tmp_path / "one", "gpu1", join_token=token))).client_id == "clinic-a.gpu1"
    with pytest.raises(IdentityConflict, match=r"clinic-a\.gpu1"):
        await come_in(worker(tmp_path / "two", "gpu1", join_token=token))
    assert (await come_in(worker(tmp_path / "three", "gpu2", join_token=token))).client_id == "clinic-a.gpu2"
    with pytest.raises(BadJoinToken, match="raflora site add clinic-a --again"):
        await come_in(worker(tmp_path / "four", "gpu3", join_token=token))


@pytest.mark.parametrize("step", ["identity.key_made", "identity.certificate_writing", "identity.certificate_written"])
async def test_killed_on_its_way_in_it_comes_in_with_the_same_key(
    identities: Identities, address: str, tmp_path: Path, step: str
) -> None:
    config = worker(tmp_path, join_token=token_at(identities, address))

    def die(reached: str) -> None:
        if reached == step:
            failpoints.arm(None)
            raise Killed(step)

    failpoints.arm(die)
    with pytest.raises(Killed):
        await come_in(config)
    key = (identity_in(config.state_dir).path / "key.pem").read_bytes()
    assert (await come_in(config)).client_id == "clinic-a"
    assert (identity_in(config.state_dir).path / "key.pem").read_bytes() == key
    assert identities.registry.site("clinic-a").token.is_used_up  # type: ignore[union-attr]


async def test_a_coordinator_that_is_not_there_yet_is_waited_for(identities: Identities, tmp_path: Path) -> None:
    config, stepped = worker(tmp_path, join_token=token_at(identities, "127.0.0.1:1")), SteppedClock()

    def give_up() -> None:
        if len(stepped.pauses) == 3:
            raise Killed

    stepped.before_sleep = give_up
    with pytest.raises(Killed):
        await come_in(config, stepped.clock)
    assert not identity_in(config.state_dir).is_complete


async def test_the_settings_address_is_stronger_than_the_tokens(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    config = worker(tmp_path, join_token=token_at(identities, "no-such-host.invalid:1"), address=address)
    assert (await come_in(config)).where.address == address
    assert (await come_in(worker(tmp_path))).where.address == address


async def test_an_expired_token_is_refused_before_anybody_is_asked(identities: Identities, tmp_path: Path) -> None:
    config = worker(tmp_path, join_token=token_at(identities, "no-such-host.invalid:1", days=1))
    stepped = SteppedClock(at=time.time() + 2 * DAY)
    with pytest.raises(
        BadJoinToken, match=r"clinic-a expired on .* \(this machine's clock: .*site add clinic-a --again"
    ):
        await come_in(config, stepped.clock)
    assert not identity_in(config.state_dir).path.exists()


async def test_a_replaced_token_is_refused_for_good(identities: Identities, address: str, tmp_path: Path) -> None:
    old = token_at(identities, address)
    token_at(identities, address, again=True)
    with pytest.raises(BadJoinToken, match="replaced by a newer one"):
        await come_in(worker(tmp_path, join_token=old))


async def test_a_token_of_another_federation_is_refused_with_what_to_do(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    await come_in(worker(tmp_path, join_token=token_at(identities, address)))
    other = Identities(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"another federation .* state_dir of its own .* or delete .*identity"):
        await come_in(worker(tmp_path, join_token=token_at(other, address, "clinic-b")))


@pytest.mark.parametrize("how", [{"insecure": True}, {"tls": TlsConfig()}])
async def test_a_token_and_another_way_in_contradict_each_other(
    identities: Identities, tmp_path: Path, how: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="contradict each other"):
        await come_in(worker(tmp_path, join_token=token_at(identities, "a:1"), **how))


async def test_a_coordinator_that_issues_nothing_is_named(identities: Identities, tmp_path: Path) -> None:
    files = write_pem(identities, tmp_path / "server", identities.issued_at(time.time(), COORDINATOR), server=True)
    tls = {
        "certificate_file": str(files.certificate_file),
        "key_file": str(files.key_file),
        "ca_file": str(files.ca_file),
    }
    settings = settings_of(tmp_path / "federation", server__tls=tls)
    async with serving(CoordinatorConfig.model_validate(settings)) as address:
        with pytest.raises((BadJoinToken, Exception), match=r"issues no certificates|may not call"):
            await come_in(worker(tmp_path, join_token=token_at(identities, address)))


async def test_from_a_token_to_a_finished_federation(identities: Identities, tmp_path: Path) -> None:
    async with serving(federation(tmp_path, identities, rounds__evaluate_every=0)) as address:
        config = worker(tmp_path, join_token=token_at(identities, address))
        config.state_dir.mkdir()
        with capture_logs() as logs:
            await asyncio.wait_for(work(config, TRAINER), 60)
    assert [line["event"] for line in logs if line["event"] in {"came in", "joined", "submitted"}] == [
        "came in", "joined", "submitted",
    ]  # fmt: skip
    assert identities.registry.site("clinic-a").keys.keys() == {"clinic-a"}  # type: ignore[union-attr]


# --- staying in


def renewal(admission: Admission, config: WorkerConfig, clock: Clock) -> tuple[Renewal, CoordinatorClient]:
    client = client_of(admission)
    keeper = keeper_of(admission, client, Contact(config.state_dir, clock), clock)
    assert isinstance(keeper, Renewal)
    return keeper, client


async def test_a_certificate_is_renewed_with_the_same_key_when_a_third_is_left(tmp_path: Path) -> None:
    wall = WallClock()
    now, wall.at = wall.at, wall.at - 21 * DAY
    identities = Identities(tmp_path / "by-the-wall", wall)
    async with serving(federation(tmp_path, identities), wall) as address:
        config = worker(tmp_path, join_token=token_at(identities, address, days=60))
        admission = await come_in(config, SteppedClock(at=wall.at).clock)
        folder, stepped = identity_in(config.state_dir), SteppedClock(at=now - 2 * DAY)
        first = certificate_in(folder)
        wall.at = now

        def stop_when_renewed() -> None:
            if certificate_in(folder) != first:
                raise Killed

        stepped.before_sleep = stop_when_renewed
        keeper, client = renewal(admission, config, stepped.clock)
        with pytest.raises(Killed):
            await keeper.keep()
        renewed = certificate_in(folder)
        assert (renewed.key_digest, renewed.subject) == (first.key_digest, first.subject)
        assert renewed.not_after > first.not_after + 19 * DAY
        assert max(stepped.pauses) == 3600.0  # looked at once an hour: a machine may have been asleep
        assert first.not_after - 10 * DAY < stepped.at < first.not_after - 9 * DAY
        assert (await client.handshake()).federation == "digits"
        await client.close()


async def test_while_nobody_answers_it_asks_again_and_at_the_end_says_what_to_type(
    identities: Identities, tmp_path: Path
) -> None:
    async with serving(federation(tmp_path, identities)) as address:
        config = worker(tmp_path, join_token=token_at(identities, address), address=address)
        admission = await come_in(config)
    certificate = certificate_in(identity_in(config.state_dir))
    stepped = SteppedClock(at=certificate.not_after - 60)
    keeper, client = renewal(admission, config, stepped.clock)
    with (
        capture_logs() as logs,
        pytest.raises(NotAuthenticated, match="expired on .*`raflora site add clinic-a --again`"),
    ):
        await keeper.keep()
    await client.close()
    assert [line["event"] for line in logs].count("the certificate is not renewed yet; trying again") >= 3
    assert stepped.pauses == sorted(stepped.pauses)  # each pause is longer


async def test_a_revoked_worker_ends_and_comes_back_with_a_new_token(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    config = worker(tmp_path, join_token=token_at(identities, address))
    admission = await come_in(config)
    identities.registry.revoke_site("clinic-a")
    client = client_of(admission)
    with pytest.raises(Revoked, match="operator took this identity back"):
        await client.handshake()
    await client.close()
    with pytest.raises(Revoked, match="clinic-a was revoked by the operator"):
        await asyncio.wait_for(work(config, TRAINER), 60)  # tries the token that it has, which went with the site
    config = worker(tmp_path, join_token=token_at(identities, address))
    await asyncio.wait_for(work(config, TRAINER), 60)


async def test_a_revoked_worker_without_a_token_ends(identities: Identities, address: str, tmp_path: Path) -> None:
    await come_in(worker(tmp_path, join_token=token_at(identities, address)))
    identities.registry.revoke_site("clinic-a")
    with pytest.raises(Revoked):
        await asyncio.wait_for(work(worker(tmp_path), TRAINER), 60)


async def test_an_expired_certificate_ends_the_worker_unless_there_is_a_token(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    config = worker(tmp_path, join_token=token_at(identities, address))
    await come_in(config)
    certificate = certificate_in(identity_in(config.state_dir))
    later = SteppedClock(at=certificate.not_after + 1).clock
    with pytest.raises(NotAuthenticated, match=r"clinic-a expired on .*new join token \(`raflora site add clinic-a"):
        await come_in(worker(tmp_path), later)
    fresh = token_at(identities, address, again=True, days=365)
    await come_in(worker(tmp_path, join_token=fresh), later)
    assert certificate_in(identity_in(config.state_dir)).serial != certificate.serial


async def test_a_certificate_that_is_not_valid_yet_is_told_beside_the_clock(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    await come_in(worker(tmp_path, join_token=token_at(identities, address)))
    with capture_logs() as logs:
        await come_in(worker(tmp_path), SteppedClock(at=0.0).clock)
    assert logs[0]["event"].startswith("this certificate is not valid yet")
    assert logs[0]["clock"] == "1970-01-01 00:00 UTC"


# --- the channel is exchanged under the worker's hands


class HeldFile(io.BytesIO):
    """Its second read waits until the test lets it go on; it runs in a thread, as every read does."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.is_held, self.may_go_on = threading.Event(), threading.Event()
        self.reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads == 2:
            self.is_held.set()
            assert self.may_go_on.wait(60)
        return super().read(size)


async def test_an_upload_in_the_middle_does_not_notice_a_new_certificate(tmp_path: Path) -> None:
    coordinator = ScriptedCoordinator(Script())
    await coordinator.start()
    where = CoordinatorAddress(address=f"127.0.0.1:{coordinator.port}", rpc_timeout_seconds=5)
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))
    content = bytes(range(256)) * 10_000
    blob, file = Blob(hashlib.sha256(content).hexdigest(), len(content)), HeldFile(content)
    assert await client.begin_upload(1, blob) == 0
    uploading = asyncio.create_task(client.upload(blob, 0, file))
    await asyncio.to_thread(file.is_held.wait, 60)
    await client.reconnect()
    await client.handshake()  # over the new connection, while the old one carries the upload on
    assert not uploading.done()
    file.may_go_on.set()
    await uploading
    assert coordinator.uploads[blob.digest] == content
    assert coordinator.offsets == [0]
    await client.close()
    await coordinator.stop()


COORDINATOR = Subject(Role.COORDINATOR, "coordinator", "coordinator")


def write_pem(identities: Identities, folder: Path, pem: Any, *, server: bool = False) -> Tls:
    folder.mkdir(exist_ok=True)
    if server:
        from common.certificates import new_key, private_key  # noqa: PLC0415

        key = new_key()
        certificate = identities.authority.issue(
            COORDINATOR, private_key(key).public_key(), DAY, ["localhost", "127.0.0.1"]
        )
    else:
        key, certificate = pem.key, pem.certificate
    (folder / "ca.pem").write_bytes(identities.authority.certificate)
    (folder / "certificate.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    return Tls(folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")


async def test_certificate_files_of_the_sites_own_are_read_again_when_they_change(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    files = write_pem(identities, tmp_path / "own", identities.worker("clinic-a"))
    where = CoordinatorAddress(
        address=address,
        tls=TlsConfig(ca_file=files.ca_file, certificate_file=files.certificate_file, key_file=files.key_file),
    )
    client = CoordinatorClient(where, Credentials("", "key", "0"))
    stepped = SteppedClock()
    looks = iter(["nothing", "key alone", "both"])
    new = identities.worker("clinic-b")

    def change() -> None:
        match next(looks, "enough"):
            case "key alone":
                assert files.key_file is not None
                files.key_file.write_bytes(new.key or b"")
            case "both":
                assert files.certificate_file is not None
                files.certificate_file.write_bytes(new.certificate or b"")
            case "enough":
                raise Killed

    stepped.before_sleep = change
    watch = keeper_of(Admission(where, "clinic-a"), client, Contact(tmp_path, stepped.clock), stepped.clock)
    assert isinstance(watch, Watch)
    with capture_logs() as logs, pytest.raises(Killed):
        await watch.keep()
    assert [line["event"] for line in logs] == [
        "the certificate files have changed, and are not used",
        "certificate files read again",
    ]
    assert "do not belong together" in logs[0]["why"]
    identities.registry.revoke_site("clinic-a")
    assert (await client.handshake()).federation == "digits"  # as clinic-b
    await client.close()


# --- why not, in words


async def said_to(address: str, tls: Tls) -> str:
    where = CoordinatorAddress(
        address=address,
        rpc_timeout_seconds=5,
        tls=TlsConfig(ca_file=tls.ca_file, certificate_file=tls.certificate_file, key_file=tls.key_file),
    )
    client = CoordinatorClient(where, Credentials("", "key", "0"))
    with pytest.raises(Unavailable) as caught:
        await client.handshake()
    await client.close()
    return str(caught.value)


async def test_a_handshake_that_fails_is_explained(identities: Identities, address: str, tmp_path: Path) -> None:
    good = write_pem(identities, tmp_path / "good", identities.worker("clinic-a"))
    stranger = Identities(tmp_path / "stranger")
    (tmp_path / "strange-ca.pem").write_bytes(stranger.authority.certificate)
    worker_a = Subject(Role.WORKER, "clinic-a", "clinic-a")
    old = write_pem(identities, tmp_path / "old", identities.issued_at(time.time() - 9 * DAY, worker_a))
    early = write_pem(identities, tmp_path / "early", identities.issued_at(time.time() + 9 * DAY, worker_a))
    strange = write_pem(identities, tmp_path / "strange", identities.of_a_stranger(worker_a))

    assert (
        "another authority than the one that this side trusts (it is of 'raflora authority of tests')"
        in await said_to(address, Tls(tmp_path / "strange-ca.pem", good.certificate_file, good.key_file))
    )
    assert "wants to see a certificate, and this side shows none" in await said_to(address, Tls(good.ca_file))
    assert "this side's certificate has expired (good from " in await said_to(address, old)
    assert "this side's certificate is not valid yet" in await said_to(address, early)
    assert "does not accept this side's certificate" in await said_to(address, strange)
    elsewhere = identities.settings(names=["coordinator.example"])
    settings = settings_of(tmp_path / "elsewhere", server__identity=elsewhere)
    async with serving(CoordinatorConfig.model_validate(settings)) as other:
        assert "is for coordinator.example, not for 127.0.0.1: use one of its names" in await said_to(other, good)


async def test_the_command_ends_with_3_and_the_sentence(identities: Identities, address: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token_at(identities, address))
    identities.registry.revoke_site("clinic-a")
    (tmp_path / "worker.toml").write_text(
        f'rank = 4\nstate_dir = "{tmp_path}/state"\n[coordinator]\njoin_token_file = "{tmp_path}/token"\n'
        '[model]\npath = "none"\n[data]\ntrain = "none.jsonl"\n'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "worker", "--config", str(tmp_path / "worker.toml")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 3
    assert "site clinic-a was revoked by the operator" in said.decode()
