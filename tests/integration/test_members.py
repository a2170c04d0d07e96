"""What one authenticated member can do to a coordinator: not fill its journal, nor its log, nor stay when revoked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coordinators import (
    BASE_MODEL,
    SPEC,
    NumpyClient,
    Observer,
    clients_of,
    config_of,
    entries_of,
    global_adapter,
    serving,
)  # fmt: skip
from identities import House, Identities, channel_as, request_of
from raflora.v1 import status_pb2
from structlog.testing import capture_logs

from common.adapter import Adapter, Factors
from common.certificates import new_key
from common.codec import Layout, decode, digest_of, encode
from common.errors import InvalidRequest, QuotaExceeded, TooBusy
from common.identity import Role
from coordinator import revocation
from coordinator.config import CoordinatorConfig
from coordinator.federation.events import evolve
from coordinator.federation.state import State
from coordinator.pace import BURST
from coordinator.stores.event_codec import event_of
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.messages import Blob, Enrolment, Outcome, RankProfile


@asynccontextmanager
async def eve_at(folder: Path, **changes: Any) -> AsyncIterator[tuple[CoordinatorConfig, NumpyClient]]:
    """A federation of which eve is the only member."""
    config = config_of(folder, rounds__min_clients=1, **changes)
    async with serving(config) as address, clients_of(address, {"eve": 4}) as (eve,):
        yield config, eve


async def until_refused(attempt: Any) -> int:
    """How often it was let through; ten times the burst at most."""
    for count in range(10 * BURST):
        try:
            await attempt(count)
        except QuotaExceeded:
            return count
    return 10 * BURST


async def test_a_profile_that_changes_all_the_time_is_recorded_for_a_while_only(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (config, eve):

        async def join(count: int) -> None:
            profile = RankProfile(4, "x" * 200, 1 << 30, 100 + count)
            await eve.rpc.join(Enrolment(1, profile, BASE_MODEL, SPEC))

        assert BURST <= await until_refused(join) < 2 * BURST
        before = len(entries_of(config))
        with pytest.raises(TooBusy):
            await join(10_000)
        assert len(entries_of(config)) == before
        assert (await eve.fetch_task()).round == 1, "and it may still work"


async def test_leaving_and_joining_in_turn_is_recorded_for_a_while_only(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (config, eve):

        async def turn(_: int) -> None:
            await eve.rpc.leave(30.0)
            await eve.join()

        assert await until_refused(turn) < 2 * BURST
        assert len(entries_of(config)) < 3 * BURST


async def test_asking_for_the_same_task_again_records_nothing(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (config, eve):
        first = await eve.fetch_task()
        before = len(entries_of(config))
        for _ in range(3 * BURST):
            assert (await eve.fetch_task()).lease_token == first.lease_token
        assert len(entries_of(config)) == before
        assert await eve.do(first) is Outcome.ACCEPTED


async def test_a_new_process_for_every_question_is_given_a_lease_for_a_while_only(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (_, eve):
        tokens: list[int] = []

        async def poll(_: int) -> None:
            await eve.restart()
            tokens.append((await eve.fetch_task()).lease_token)

        assert await until_refused(poll) < 2 * BURST
        assert sorted(set(tokens)) == tokens, "each fences off the one before"


async def test_rounds_faster_than_the_pace_are_not_slowed(tmp_path: Path) -> None:
    async with eve_at(tmp_path, rounds__num_rounds=BURST + 5) as (_, eve):
        await eve.work()
        assert len(eve.sent) == BURST + 5


async def test_a_lease_that_is_not_held_leaves_no_word_of_the_sender_in_the_log(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (_, eve):
        task = await eve.fetch_task()
        with capture_logs() as lines:
            for token in (0, task.lease_token + 1):
                await eve.rpc.fail_task(token, "flood", "y" * 500)
        assert not [line for line in lines if line["event"] == "task failed"]
        with capture_logs() as lines:
            await eve.rpc.fail_task(task.lease_token, "out_of_memory", "rank 4")
        assert [line["failure"] for line in lines if line["event"] == "task failed"] == ["out_of_memory: rank 4"]


async def test_refusals_in_ever_other_words_make_one_line_a_minute(tmp_path: Path) -> None:
    async with eve_at(tmp_path) as (_, eve):
        task = await eve.fetch_task()
        with capture_logs() as lines:
            for count in range(50):
                with pytest.raises(InvalidRequest, match=f"no digest {count}"):
                    await eve.rpc.begin_upload(task.lease_token, Blob(f"no digest {count}", 5))
        assert len([line for line in lines if line["event"] == "refused"]) <= 1


# ---------------------------------------------------------------- certificates


@asynccontextmanager
async def house_of(folder: Path, **changes: Any) -> AsyncIterator[House]:
    identities = Identities(folder / "authority")
    config = config_of(folder / "federation", server__identity=identities.settings(), rounds__num_rounds=1, **changes)
    async with serving(config) as address:
        yield House(address, identities, config)


@asynccontextmanager
async def member_of(house: House, site: str) -> AsyncIterator[NumpyClient]:
    """The one worker of a site that was just added, joined."""
    pem = await house.enrol(house.identities.joining(site), new_key())
    client = NumpyClient(house.address, site, 4)
    await client.rpc.close()
    where, who = CoordinatorAddress(address=house.address), Credentials(site, client.enrol_key, "0")
    client.rpc = CoordinatorClient(where, who, join_token=pem)
    try:
        await client.join()
        yield client
    finally:
        await client.rpc.close()


@asynccontextmanager
async def looking_on(house: House) -> AsyncIterator[Observer]:
    async with channel_as(house.address, house.identities.person("olga", Role.OBSERVER)) as channel:
        yield Observer(channel)


async def membership_of(observer: Observer, client_id: str) -> tuple[str, str]:
    clients = (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients
    return next((c.membership, c.last_failure) for c in clients if c.client_id == client_id)


def contributions_in(config: CoordinatorConfig) -> set[str]:
    """The digests of all updates that went into a published adapter."""
    state = State()
    for entry in entries_of(config):
        state = evolve(state, event_of(entry))
    return {c.update.digest for record in state.history for c in record.contributions}


async def huge_update(client: NumpyClient) -> str:
    """Submits one that nobody could overlook in an adapter; its digest."""
    task = await client.fetch_task()
    trained = decode(await client.train(task), Layout(SPEC, task.lora_rank), client.client_id)
    modules = {name: Factors(f.lora_A, np.full_like(f.lora_B, 999.0)) for name, f in trained.modules.items()}
    content = encode(Adapter(modules, trained.tensors))
    await client.upload(task, content)
    assert await client.submit(task, content) is Outcome.ACCEPTED
    return digest_of(content)


async def test_a_revoked_site_leaves_the_open_round_without_another_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "_CHECK_SECONDS", 0.01)
    async with (
        house_of(tmp_path) as house,
        member_of(house, "ada") as ada,
        member_of(house, "bob") as bob,
        member_of(house, "dan") as dan,
        looking_on(house) as observer,
    ):
        revoked = await huge_update(dan)
        house.identities.registry.revoke_site("dan")
        async with asyncio.timeout(30):
            while (await membership_of(observer, "dan"))[0] != "left":
                pass  # each look is a call that waits for its answer
        assert await membership_of(observer, "dan") == ("left", revocation.REASON)
        for client in (ada, bob):
            assert await client.do(await client.fetch_task()) is Outcome.ACCEPTED
        status = await observer.finished()
        assert revoked not in contributions_in(house.config)
        assert len(contributions_in(house.config)) == 2
        merged = global_adapter(house.config, status.adapter_digest)
        assert max(float(np.abs(f.lora_B @ f.lora_A).max()) for f in merged.modules.values()) < 10.0
        assert [e.kind for e in entries_of(house.config)].count("ClientRevoked") == 1


async def test_a_round_that_closes_at_once_after_it_is_merged_without_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "_CHECK_SECONDS", 1e6)  # only the look before the merge is left
    async with (
        house_of(tmp_path, rounds__min_clients=2) as house,
        member_of(house, "ada") as ada,
        looking_on(house) as observer,
    ):
        async with member_of(house, "dan") as dan:
            revoked = await huge_update(dan)
            house.identities.registry.revoke_site("dan")
            assert await ada.do(await ada.fetch_task()) is Outcome.ACCEPTED
        async with member_of(house, "dan") as dan:  # the operator lets it in again: another key, the same name
            assert (await membership_of(observer, "dan"))[0] == "active"
            task = await dan.fetch_task()
            assert (task.round, task.attempt) == (1, 2)
            await asyncio.gather(ada.work(), dan.do(task))
            await observer.finished()
        assert revoked not in contributions_in(house.config)
        assert len(contributions_in(house.config)) == 2


async def test_nobody_renews_without_end(tmp_path: Path) -> None:
    async with house_of(tmp_path) as house:
        key = new_key()
        pem = await house.enrol(house.identities.joining("eve"), key)
        where = CoordinatorAddress(address=house.address)
        client = CoordinatorClient(where, Credentials("eve", "key-of-eve", "0"), join_token=pem)
        with capture_logs() as lines:
            renewed = await until_refused(lambda _: client.renew(request_of(key)))
        await client.close()
        assert BURST <= renewed < 2 * BURST
        assert len([line for line in lines if line["event"] == "certificate renewed"]) == renewed
