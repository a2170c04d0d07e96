"""Clients that share a process do not share a connection: who waits for work keeps nobody out who brings it."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from coordinators import BASE_MODEL, SPEC, config_of, serving

from common.channel import MAX_CALLS_PER_CONNECTION
from common.version import PROTOCOL
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress
from worker.messages import Enrolment, RankProfile

PATIENCE_SECONDS = 30.0  # a bound, below the wait of the polls


async def test_more_clients_wait_than_a_connection_takes_calls_and_one_more_is_answered(tmp_path: Path) -> None:
    count = MAX_CALLS_PER_CONNECTION + 1
    config = config_of(tmp_path / "federation", rounds__min_clients=count + 2)
    async with serving(config) as address, AsyncExitStack() as stack:
        clients = [
            CoordinatorClient(CoordinatorAddress(address=address), Credentials(f"client-{i}", f"key-{i}", "0"))
            for i in range(count + 1)
        ]
        for client in clients:
            stack.push_async_callback(client.close)
            await client.join(Enrolment(PROTOCOL, RankProfile(4, "cpu", 0, 100), BASE_MODEL, SPEC))

        polls = [asyncio.create_task(client.poll_task()) for client in clients[:-1]]
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Its polls are answered at once, but only if they get to the coordinator.
            for _ in range(MAX_CALLS_PER_CONNECTION):
                assert not (await clients[-1].poll_task(wait_seconds=0.0)).tasks

        assert not any(poll.done() for poll in polls)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
