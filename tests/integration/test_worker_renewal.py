"""A worker stays in by itself, and is told in words why it may not. Real TLS, real files."""

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coordinators import settings_of
from identities import Identities, WallClock, serving
from joining_sites import DAY, Killed, SteppedClock, client_of, come_in, federation, token_at, worker
from scripted_coordinator import Script, ScriptedCoordinator
from structlog.testing import capture_logs
from worker_site import TRAINER

from common.certificates import new_key, private_key
from common.channel import Pem, Tls
from common.errors import BadJoinToken, NotAuthenticated, Revoked, Unavailable
from common.identity import Role, Subject
from coordinator.config import CoordinatorConfig
from worker.certificates import certificate_in, identity_in
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, TlsConfig, WorkerConfig
from worker.contact import Clock, Contact
from worker.enrolment import Admission, Renewal, Watch, keeper_of
from worker.messages import Blob
from worker.run import work


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@pytest.fixture
async def address(tmp_path: Path, identities: Identities) -> AsyncIterator[str]:
    async with serving(federation(tmp_path, identities)) as address:
        yield address


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
        folder, stepped = identity_in(config.state_dir), SteppedClock(at=now - DAY / 4)
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
        pytest.raises(NotAuthenticated, match=r"expired on .*`raflora site add clinic-a --again --folder FOLDER`"),
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


def write_pem(folder: Path, pem: Pem) -> Tls:
    folder.mkdir()
    files = Tls(folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")
    for path, content in (
        (files.ca_file, pem.authority),
        (files.certificate_file, pem.certificate),
        (files.key_file, pem.key),
    ):
        assert path is not None
        path.write_bytes(content or b"")
    return files


async def test_certificate_files_of_the_sites_own_are_read_again_when_they_change(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    files = write_pem(tmp_path / "own", identities.worker("clinic-a"))
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
        await client.renew(b"")  # gRPC itself does not repeat this one
    await client.close()
    return str(caught.value)


async def test_a_handshake_that_fails_is_explained(identities: Identities, address: str, tmp_path: Path) -> None:
    good = write_pem(tmp_path / "good", identities.worker("clinic-a"))
    stranger = Identities(tmp_path / "stranger")
    (tmp_path / "strange-ca.pem").write_bytes(stranger.authority.certificate)
    worker_a = Subject(Role.WORKER, "clinic-a", "clinic-a")
    old = write_pem(tmp_path / "old", identities.issued_at(time.time() - 9 * DAY, worker_a))
    early = write_pem(tmp_path / "early", identities.issued_at(time.time() + 9 * DAY, worker_a))
    strange = write_pem(tmp_path / "strange", identities.of_a_stranger(worker_a))

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


async def test_a_coordinator_that_issues_nothing_is_named(identities: Identities, tmp_path: Path) -> None:
    key = new_key()
    public = private_key(key).public_key()
    subject = Subject(Role.COORDINATOR, "coordinator", "coordinator")
    certificate = identities.authority.issue(subject, public, DAY, ["127.0.0.1"])
    write_pem(tmp_path / "server", Pem(identities.authority.certificate, certificate, key))
    tls = {f"{name}_file": str(tmp_path / "server" / f"{name}.pem") for name in ("ca", "certificate", "key")}
    settings = settings_of(tmp_path / "federation", server__tls=tls)
    async with serving(CoordinatorConfig.model_validate(settings)) as address:
        with pytest.raises(BadJoinToken, match="issues no certificates: is it the coordinator that the token is for"):
            await come_in(worker(tmp_path, join_token=token_at(identities, address)))
