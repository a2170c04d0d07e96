"""The operator's verbs: pause, resume, close-round, abort-round, evict, set-rank.

Each is one call of AdminService and prints how the federation stands after it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from cyclopts.types import UInt32
from raflora.v1 import admin_pb2, admin_pb2_grpc

from cli.connection import Connection, reach
from cli.words import plain


async def pause(*, connection: Connection = Connection()) -> None:
    """Opens no further round; the open one goes on."""
    async with _admin(connection) as stub:
        _print(await stub.Pause(admin_pb2.PauseRequest(), timeout=connection.timeout_seconds))


async def resume(*, connection: Connection = Connection()) -> None:
    """Takes a pause back."""
    async with _admin(connection) as stub:
        _print(await stub.Resume(admin_pb2.ResumeRequest(), timeout=connection.timeout_seconds))


async def close_round(round: UInt32, /, *, connection: Connection = Connection()) -> None:
    """Closes the open round ROUND now, with the updates that are here."""
    request = admin_pb2.CloseRoundRequest(round=round)
    async with _admin(connection) as stub:
        _print(await stub.CloseRound(request, timeout=connection.timeout_seconds))


async def abort_round(round: UInt32, /, *, connection: Connection = Connection()) -> None:
    """Throws the updates of the open round ROUND away and opens it anew."""
    request = admin_pb2.AbortRoundRequest(round=round)
    async with _admin(connection) as stub:
        _print(await stub.AbortRound(request, timeout=connection.timeout_seconds))


async def evict(client_id: str, /, *, reason: str = "", connection: Connection = Connection()) -> None:
    """Shuts a client out; its update of the open round is dropped."""
    request = admin_pb2.EvictClientRequest(client_id=client_id, reason=reason)
    async with _admin(connection) as stub:
        _print(await stub.EvictClient(request, timeout=connection.timeout_seconds))


async def set_rank(client_id: str, lora_rank: UInt32, /, *, connection: Connection = Connection()) -> None:
    """Grants a client another rank from the next round on."""
    request = admin_pb2.SetClientRankRequest(client_id=client_id, lora_rank=lora_rank)
    async with _admin(connection) as stub:
        _print(await stub.SetClientRank(request, timeout=connection.timeout_seconds))


class _Explained(Protocol):
    """Every answer of AdminService."""

    explanation: str


@asynccontextmanager
async def _admin(connection: Connection) -> AsyncIterator["admin_pb2_grpc.AdminServiceAsyncStub"]:
    async with reach(connection) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def _print(answer: _Explained) -> None:
    print(plain(answer.explanation) or "done")
