"""Keepalive: a frozen peer is noticed, and whoever pings politely is left alone.

Each claim has a control beside it: the same story with one option as it is widely copied, which goes wrong.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from raflora.v1 import status_pb2, status_pb2_grpc

from common.channel import Keepalive, Options, client_options, server_options

# This gRPC pings at most once a second, so a faster tempo would only look faster.
TEMPO = Keepalive(client_ping_seconds=1.0, server_ping_seconds=2.0, timeout_seconds=1.0)
LONG_SECONDS = 50.0  # far longer than the tempo, well within pytest's limit
PING_INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"


class Silent(status_pb2_grpc.StatusServiceServicer):
    """Answers once and then says nothing more."""

    async def GetStatus(
        self, _request: status_pb2.GetStatusRequest, _context: grpc.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    async def WatchStatus(
        self, _request: status_pb2.WatchStatusRequest, _context: grpc.ServicerContext
    ) -> AsyncIterator[status_pb2.WatchStatusResponse]:
        yield status_pb2.WatchStatusResponse()
        await asyncio.Event().wait()


async def start_server(options: Options) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=options)
    status_pb2_grpc.add_StatusServiceServicer_to_server(Silent(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def serve_until_killed() -> None:
    server, port = await start_server(server_options(TEMPO))
    print(port, flush=True)
    await server.wait_for_termination()


@pytest.fixture
def frozen_soon() -> Iterator[subprocess.Popen[str]]:
    """A real server in a process of its own, which the test freezes."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.kill()


def without(options: Options, *names: str) -> Options:
    kept = [(name, value) for name, value in options if name not in names]
    assert len(kept) == len(options) - len(names)
    return kept


@asynccontextmanager
async def watching(
    port: int, options: Options, deadline_seconds: float
) -> AsyncIterator[grpc.aio.UnaryStreamCall[status_pb2.WatchStatusRequest, status_pb2.WatchStatusResponse]]:
    """A call that has heard its first and only message and waits for the next."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        call = stub.WatchStatus(status_pb2.WatchStatusRequest(), timeout=deadline_seconds)
        await call.read()
        yield call


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


async def test_a_frozen_server_ends_a_waiting_call_long_before_its_deadline(
    frozen_soon: subprocess.Popen[str],
) -> None:
    async with watching(port_of(frozen_soon), client_options(TEMPO), LONG_SECONDS) as call:
        frozen_soon.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_long_poll_to_a_frozen_server_ends_too_though_it_may_be_retried(
    frozen_soon: subprocess.Popen[str],
) -> None:
    port = port_of(frozen_soon)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=client_options(TEMPO)) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        await channel.channel_ready()
        call = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=LONG_SECONDS)
        frozen_soon.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_control_without_ping_timeout_a_frozen_server_goes_unnoticed(
    frozen_soon: subprocess.Popen[str],
) -> None:
    options = without(client_options(TEMPO), "grpc.http2.ping_timeout_ms")
    seconds = 2.5 * (TEMPO.client_ping_seconds + TEMPO.timeout_seconds)
    async with watching(port_of(frozen_soon), options, seconds) as call:
        frozen_soon.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_waits_and_pings_is_left_alone() -> None:
    server, port = await start_server(server_options(TEMPO))
    seconds = 5 * TEMPO.client_ping_seconds  # the controls are thrown out at the third ping
    async with watching(port, client_options(TEMPO), seconds) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "interval",
    [(PING_INTERVAL, 60_000), ("grpc.http2.min_recv_ping_interval_without_data_ms", 100)],
    ids=["interval above the client's", "the name that does nothing"],
)
async def test_control_a_client_that_pings_too_often_is_thrown_out(interval: tuple[str, int]) -> None:
    options = [*without(server_options(TEMPO), PING_INTERVAL), interval]
    server, port = await start_server(options)
    async with watching(port, client_options(TEMPO), LONG_SECONDS) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "too many pings" in (caught.value.details() or "").lower()


if __name__ == "__main__":
    asyncio.run(serve_until_killed())
