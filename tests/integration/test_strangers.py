"""What somebody may do to a coordinator who is not let in, or only as one of many: take its memory, files or places."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from coordinators import CoordinatorProcess, clients_of, config_of, observing, settings_of
from identities import CALL_SECONDS, Identities, reason_of, refused, serving
from raflora.v1 import federation_pb2, status_pb2, status_pb2_grpc

from benchmarks.load.usage import forget_peak, usage_of
from common.adapter import MAX_TENSORS
from common.channel import MAX_CALLS_PER_CONNECTION, Pem
from common.identity import Role
from coordinator.servicers.places import MAX_CALLS
from coordinator.servicers.requests import MAX_REQUEST_BYTES

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
JOIN = "/raflora.v1.FederationService/Join"
LITTLE = 256  # descriptors
IDLE = 400  # connections of those who say nothing
MIB = 1 << 20


@contextmanager
def process(folder: Path, settings: dict[str, Any], descriptors: int | None = None) -> Iterator[CoordinatorProcess]:
    coordinator = CoordinatorProcess(folder, settings, descriptors)
    try:
        yield coordinator
    finally:
        coordinator.close()


@asynccontextmanager
async def channels(address: str, pem: Pem, count: int) -> AsyncIterator[Sequence[grpc.aio.Channel]]:
    """As many connections of one caller."""
    credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(grpc.aio.secure_channel(address, credentials, options=own))
            for _ in range(count)
        ]


def huge_join() -> bytes:
    """Less than gRPC's four megabytes, and ninety once it is parsed."""
    modules = [federation_pb2.ModuleShape()] * 2_000_000
    return federation_pb2.JoinRequest(protocol=1, spec=federation_pb2.AdapterSpec(modules=modules)).SerializeToString()


# ---------------------------------------------------------------- descriptors


@linux
async def test_silent_connections_leave_room_for_members_the_status_and_the_journal(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "federation", rounds__min_clients=1)
    with process(tmp_path / "federation", settings, LITTLE) as coordinator:
        address = coordinator.wait_until_listening()
        host, _, port = address.rpartition(":")
        async with clients_of(address, {"ada": 2}) as (ada,), observing(address) as observer:
            await observer.see()
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(IDLE)]
            try:
                async with asyncio.timeout(CALL_SECONDS):  # until it has turned away all that it has no place for
                    turned_away = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
                    for one in islice(asyncio.as_completed(turned_away), IDLE - LITTLE):
                        await one
                assert usage_of(coordinator.pid).handles < LITTLE - 64
                await ada.do(await ada.fetch_task())
                status = await observer.see()
                assert status.round or status.phase == status_pb2.PHASE_FINISHED
                async with observing(address) as newcomer:  # as soon as those that stay silent are thrown out
                    await newcomer.see()
            finally:
                for _, writer in silent:
                    writer.close()
        assert coordinator.terminate() == 0


# ---------------------------------------------------------------- memory


@linux
async def test_what_a_revoked_site_sends_is_never_taken_in(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    going = identities.joining("going")
    identities.registry.revoke_site("going")
    settings = settings_of(tmp_path / "federation", **{"server.identity": identities.settings()})
    raw = huge_join()
    with process(tmp_path / "federation", settings) as coordinator:
        address = coordinator.wait_until_listening()
        async with channels(address, going, 3) as callers:
            calls: list[Any] = [channel.unary_unary(JOIN) for channel in callers]
            assert await refused(calls[0](b"", timeout=CALL_SECONDS)) == "revoked"
            before = usage_of(coordinator.pid).rss_bytes
            forget_peak(coordinator.pid)
            answers = [call(raw, timeout=CALL_SECONDS) for call in calls for _ in range(8)]
            outcomes = await asyncio.gather(*answers, return_exceptions=True)
        assert {reason_of(error) for error in outcomes if isinstance(error, grpc.aio.AioRpcError)} == {"revoked"}
        assert len(outcomes) == len(answers)
        assert usage_of(coordinator.pid).peak_bytes - before < 64 * MIB


async def test_a_message_that_is_too_large_for_its_call_is_refused_with_both_numbers(tmp_path: Path) -> None:
    raw = huge_join()
    spoken = federation_pb2.FailTaskRequest(client_id="ada", message="m" * MAX_REQUEST_BYTES).SerializeToString()
    async with serving(config_of(tmp_path)) as address, grpc.aio.insecure_channel(address) as channel:
        for method, content, most in (
            (JOIN, raw, 64 * MAX_TENSORS),
            ("/raflora.v1.FederationService/FailTask", spoken, MAX_REQUEST_BYTES),
        ):
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(content, timeout=CALL_SECONDS)
            assert reason_of(caught.value) == "invalid_request"
            assert f"{len(content)} bytes" in (caught.value.details() or "")
            assert f"at most {most}" in (caught.value.details() or "")


async def test_a_call_without_its_message_is_refused(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, grpc.aio.insecure_channel(address) as channel:
        assert await refused(channel.stream_unary(JOIN)(iter(()), timeout=CALL_SECONDS)) == "invalid_request"


# ---------------------------------------------------------------- places


async def is_let_in(stub: Any) -> bool:
    try:
        await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "too_busy":
            return False
        raise
    return True


async def test_one_identity_has_so_many_calls_in_progress_over_all_its_connections(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    eve, oscar = identities.person("eve", Role.OBSERVER), identities.person("oscar", Role.OPERATOR)
    most, connections = MAX_CALLS[Role.OBSERVER], MAX_CALLS[Role.OBSERVER] // MAX_CALLS_PER_CONNECTION + 1
    config = config_of(tmp_path / "federation", server__identity=identities.settings())
    async with serving(config) as address, channels(address, eve, connections) as callers:
        stubs = [status_pb2_grpc.StatusServiceStub(channel) for channel in callers]
        watching = [
            stubs[i // MAX_CALLS_PER_CONNECTION].WatchStatus(status_pb2.WatchStatusRequest(), timeout=10 * CALL_SECONDS)
            for i in range(most)
        ]
        await asyncio.gather(*(call.read() for call in watching))
        ask = status_pb2.GetStatusRequest()
        assert await refused(stubs[-1].GetStatus(ask, timeout=CALL_SECONDS)) == "too_busy"
        async with channels(address, oscar, 1) as (other,):
            assert await status_pb2_grpc.StatusServiceStub(other).GetStatus(ask, timeout=CALL_SECONDS)
        for call in watching:
            call.cancel()
        async with asyncio.timeout(CALL_SECONDS):
            while not await is_let_in(stubs[-1]):
                pass  # nobody tells when a call that was cancelled has given its place back
