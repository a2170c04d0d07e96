"""Requests that come twice, late or in another order, and answers that nobody hears: everything counts once."""

import asyncio
import random
from pathlib import Path

import grpc.aio
import pytest
from coordinators import BASE_MODEL, SPEC, NumpyClient, clients_of, config_of, entries_of, observing, serving
from faults.answers import CallProxy
from raflora.v1 import federation_pb2, status_pb2
from raflora.v1 import federation_pb2_grpc as rpc

from common.codec import digest_of
from common.errors import LeaseSuperseded, Unavailable, UnknownTask
from common.version import PROTOCOL
from coordinator.config import CoordinatorConfig
from worker.messages import Blob, Enrolment, Outcome, Progress, RankProfile

RANKS = {"ada": 2, "bob": 4, "cem": 8}
SEED = 20_261_123
UNARY = ["Join", "PollTask", "BeginUpload", "SubmitUpdate", "SubmitEvaluation", "Heartbeat"]
# A field that this version does not know, as a newer one may send it: number 1000, three bytes.
UNKNOWN_FIELD = b"\xc2\x3e\x03new"


async def undisturbed(folder: Path) -> list[str]:
    """The adapters of a federation to which nothing happened."""
    config = two_rounds(folder)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(work(client) for client in clients))
        return await adapters(observer)


def two_rounds(folder: Path) -> CoordinatorConfig:
    return config_of(folder, rounds__evaluate_every=1)


async def adapters(observer) -> list[str]:
    await observer.finished()
    answer = await observer.status.ListRounds(status_pb2.ListRoundsRequest())
    return [summary.adapter_digest for summary in answer.rounds]


async def work(client: NumpyClient) -> None:
    """Until the end; what was accepted before its answer was lost is a duplicate."""
    while True:
        polled = await client.rpc.poll_task(30.0)
        for task in polled.tasks:
            await client.rpc.heartbeat(task.lease_token, Progress("training"))
            assert await client.do(task) in (Outcome.ACCEPTED, Outcome.DUPLICATE)
        if polled.is_finished:
            return


# ---------------------------------------------------------------- one answer


async def test_joining_a_hundred_times_makes_one_client_and_no_event(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    async with serving(config) as address, observing(address) as observer, clients_of(address, {"ada": 2}) as (ada,):
        before = entries_of(config)
        places = {
            await ada.rpc.join(Enrolment(PROTOCOL, RankProfile(2, "cpu", 1 << 30, 10), BASE_MODEL, SPEC))
            for _ in range(100)
        }
        assert (await observer.see()).clients_known == 1
    assert len(places) == 1
    assert entries_of(config) == before


@pytest.mark.parametrize("method", ["BeginUpload", "UploadAdapter", "SubmitUpdate"])
async def test_an_update_whose_acknowledgement_was_lost_gets_the_same_receipt_and_counts_once(
    tmp_path: Path, method: str
) -> None:
    config = config_of(tmp_path)
    async with serving(config) as address, observing(address) as observer, CallProxy(address) as line:  # noqa: SIM117
        async with clients_of(line.address, RANKS) as (ada, _, _):
            task = await ada.fetch_task()
            content = await ada.train(task)
            line.lose_answers[method] = 1
            if method == "UploadAdapter":  # a stream is not repeated by gRPC but by who holds the file
                with pytest.raises(Unavailable):
                    await ada.upload(task, content)
            assert await ada.upload(task, content) == len(content)
            assert await ada.submit(task, content) is (
                Outcome.DUPLICATE if method == "SubmitUpdate" else Outcome.ACCEPTED
            )
            assert await ada.submit(task, content) is Outcome.DUPLICATE
            assert line.lose_answers[method] == 0
            assert line.answers[method] == {"BeginUpload": 2, "UploadAdapter": 1, "SubmitUpdate": 3}[method]
            assert (await observer.see()).explanation.startswith("1 of 3 updates")
    assert [entry.kind for entry in entries_of(config)].count("UpdateAccepted") == 1


# ---------------------------------------------------------------- a whole federation


@pytest.mark.parametrize("method", UNARY)
async def test_a_federation_that_hears_everything_twice_ends_with_the_same_adapters(
    tmp_path: Path, method: str
) -> None:
    config = two_rounds(tmp_path)
    async with serving(config) as address, observing(address) as observer, CallProxy(address) as line:
        line.repeat.add(method)
        async with clients_of(line.address, RANKS) as clients:
            await asyncio.gather(*(work(client) for client in clients))
            found = await adapters(observer)
            assert line.calls[method] >= 3
    assert found == await undisturbed(tmp_path / "undisturbed")


async def test_a_federation_that_loses_answers_at_random_ends_with_the_same_adapters(tmp_path: Path) -> None:
    chance = random.Random(SEED)  # noqa: S311 - a seed, not a secret
    config = two_rounds(tmp_path)
    async with serving(config) as address, observing(address) as observer, CallProxy(address) as line:  # noqa: SIM117
        async with clients_of(line.address, RANKS) as clients:
            for method in ("PollTask", "BeginUpload", "SubmitUpdate", "SubmitEvaluation"):
                line.lose_answers[method] = chance.randrange(1, 4)
            await asyncio.gather(*(work(client) for client in clients))
            found = await adapters(observer)
            assert line.lose_answers.total() == 0
    assert found == await undisturbed(tmp_path / "undisturbed")


async def test_a_submission_that_overtakes_and_one_that_comes_after_the_next_lease(tmp_path: Path) -> None:
    """Reordered: a newer lease is fetched while the older one's submission is still on its way."""
    async with (
        serving(config_of(tmp_path)) as address,
        CallProxy(address) as line,
        clients_of(line.address, RANKS) as (ada, _, _),
    ):
        older = await ada.fetch_task()
        content = await ada.train(older)
        await ada.upload(older, content)
        line.hold["SubmitUpdate"] = held = asyncio.Event()
        late = asyncio.create_task(ada.submit(older, content))
        again = NumpyClient(address, ada.client_id, ada.rank, ada.num_examples)  # it was started once more
        newer = await again.fetch_task()
        assert not await again.rpc.heartbeat(older.lease_token, Progress("training"))
        held.set()
        assert await late is Outcome.SUPERSEDED
        assert await again.rpc.begin_upload(newer.lease_token, Blob(digest_of(content), len(content))) == len(content)
        assert await again.submit(newer, content) is Outcome.ACCEPTED
        assert await ada.submit(older, content) is Outcome.DUPLICATE
        await again.rpc.close()


async def test_a_worker_with_an_older_lease_cannot_drop_the_upload_of_its_successor(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, clients_of(address, RANKS) as (ada, _, _):
        older = await ada.fetch_task()
        content = await ada.train(older)
        another = Blob(digest_of(bytes(len(content))), len(content))  # as long, and other bytes
        await ada.rpc.begin_upload(older.lease_token, another)
        again = NumpyClient(address, ada.client_id, ada.rank, ada.num_examples)  # it was started once more
        newer = await again.fetch_task()
        assert await again.upload(newer, content) == len(content)
        with pytest.raises(LeaseSuperseded, match=f"'ada': lease {older.lease_token} was followed by"):
            await ada.rpc.begin_upload(older.lease_token, another)
        assert await again.submit(newer, content) is Outcome.ACCEPTED
        await again.rpc.close()


async def test_nobody_uploads_under_a_lease_that_was_never_given(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, clients_of(address, RANKS) as (ada, bob, _):
        task = await ada.fetch_task()
        content = await ada.train(task)
        blob = Blob(digest_of(content), len(content))
        with pytest.raises(UnknownTask, match=f"'ada': lease {task.lease_token + 1} was never given"):
            await ada.rpc.begin_upload(task.lease_token + 1, blob)
        with pytest.raises(UnknownTask, match="'bob': lease 0 was never given"):
            await bob.rpc.begin_upload(0, blob)  # and has fetched nothing
        assert await ada.upload(task, content) == len(content)


# ---------------------------------------------------------------- versions


async def test_workers_ignore_what_a_newer_coordinator_adds_to_its_answers(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1)
    async with serving(config) as address, observing(address) as observer, CallProxy(address) as line:
        line.appended = UNKNOWN_FIELD
        async with clients_of(line.address, RANKS) as clients:
            await asyncio.gather(*(work(client) for client in clients))
            await observer.finished()


async def test_a_coordinator_ignores_what_a_newer_worker_adds_to_its_requests(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, grpc.aio.insecure_channel(address) as channel:
        handshake = channel.unary_unary("/raflora.v1.FederationService/Handshake")
        known = federation_pb2.HandshakeRequest(protocol_min=PROTOCOL, protocol_max=PROTOCOL + 5)
        answer = await handshake(known.SerializeToString() + UNKNOWN_FIELD)
        assert federation_pb2.HandshakeResponse.FromString(answer).protocol == PROTOCOL


@pytest.mark.parametrize(
    ("lowest", "highest", "whose"), [(0, 0, "worker"), (PROTOCOL + 1, PROTOCOL + 3, "coordinator")]
)
async def test_a_handshake_without_a_common_version_says_who_must_be_upgraded(
    tmp_path: Path, lowest: int, highest: int, whose: str
) -> None:
    async with serving(config_of(tmp_path)) as address, grpc.aio.insecure_channel(address) as channel:
        stub = rpc.FederationServiceStub(channel)
        request = federation_pb2.HandshakeRequest(protocol_min=lowest, protocol_max=highest)
        with pytest.raises(grpc.aio.AioRpcError, match=f"upgrade the {whose}") as refused:
            await stub.Handshake(request)
        assert ("raflora-reason", "protocol_unsupported") in tuple(refused.value.trailing_metadata() or ())
