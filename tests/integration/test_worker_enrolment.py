"""A worker comes in with a join token, once, whatever happens on the way. Real TLS, real files."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from identities import Identities, serving
from joining_sites import DAY, Killed, SteppedClock, client_of, come_in, federation, token_at, worker
from structlog.testing import capture_logs
from worker_site import TRAINER

from common import failpoints
from common.errors import BadJoinToken, ConfigError, IdentityConflict, Unavailable
from worker.certificates import identity_in
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, TlsConfig
from worker.run import work


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


@pytest.fixture
async def address(tmp_path: Path, identities: Identities) -> AsyncIterator[str]:
    async with serving(federation(tmp_path, identities)) as address:
        yield address


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


async def run_command(folder: Path, model: str) -> tuple[int | None, str]:
    """Exit status and standard error of `raflora worker` with the token in folder/token."""
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "worker.toml").write_text(
        f'rank = 4\nstate_dir = "{folder}/state"\n[coordinator]\njoin_token_file = "{folder}/token"\n'
        f'[model]\npath = "{model}"\n[data]\ntrain = "{folder}/train.jsonl"\n'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "worker", "--config", str(folder / "worker.toml")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, " ".join(said.decode().split())


async def test_the_command_ends_with_3_and_the_sentence(identities: Identities, address: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token_at(identities, address))
    identities.registry.revoke_site("clinic-a")
    status, said = await run_command(tmp_path, model="some-hub-id")
    assert status == 3
    assert "site clinic-a was revoked by the operator" in said
    assert "client=" not in said, "before it has come in it has no name in the federation"


async def test_a_worker_that_could_not_load_uses_no_token_up(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(token_at(identities, address))
    status, said = await run_command(tmp_path, model=f"{tmp_path}/none")
    assert status == 2
    assert said == f"model: {tmp_path}/none: there is no such folder; set model.path to the base model's folder"
    assert not identities.registry.site("clinic-a").token.keys  # type: ignore[union-attr]


async def test_without_a_token_the_cause_and_the_cure_are_named(address: str) -> None:
    client = CoordinatorClient(CoordinatorAddress(address=address), Credentials("ada", "", "0"))
    with pytest.raises(
        Unavailable, match=r"it speaks TLS, but this side .* in the clear: set coordinator.join_token_f"
    ):
        await client.handshake()
    await client.close()


async def test_a_token_of_another_authority_is_waited_with_and_the_log_names_the_cause(
    identities: Identities, address: str, tmp_path: Path
) -> None:
    other = Identities(tmp_path / "another-authority")
    config, stepped = worker(tmp_path, join_token=token_at(other, address)), SteppedClock()
    config.state_dir.mkdir()
    stepped.before_sleep = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with capture_logs() as logs:
        await asyncio.wait_for(work(config, TRAINER, stepped.clock), 60)
    assert (
        "the coordinator's certificate is of another authority than the one that this side trusts" in logs[0]["event"]
    )


async def test_sigterm_ends_a_worker_that_is_still_waiting_to_come_in(identities: Identities, tmp_path: Path) -> None:
    config, stepped = worker(tmp_path, join_token=token_at(identities, "127.0.0.1:1")), SteppedClock()
    config.state_dir.mkdir()
    stepped.before_sleep = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with capture_logs() as logs:
        await asyncio.wait_for(work(config, TRAINER, stepped.clock), 60)
    assert logs[-1]["event"] == "terminated"
