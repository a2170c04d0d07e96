"""Takes those out of the federation whose identity the operator took back, whether or not they ever call again.

The registry's files are looked at about once a second, and once more before a closed round is merged.
"""

import asyncio
from collections.abc import Iterable

import structlog

from common.errors import RafloraError, TooBusy, Unavailable
from coordinator.engine import Engine
from coordinator.federation.requests import Outcome, Revoke
from coordinator.federation.state import Membership, State
from coordinator.identity.gate import Gate

_CHECK_SECONDS = 1.0
REASON = "revoked: the operator took its identity back"

log = structlog.get_logger()


class Revocation:
    """Compares the members with the registry. Without a gate nobody is ever revoked."""

    def __init__(self, engine: Engine, gate: Gate | None) -> None:
        self._engine = engine
        self._gate = gate

    async def watch(self) -> None:
        """Until cancelled. What cannot be read or recorded now is looked at again."""
        while self._gate is not None:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                await self.apply()
            except (TooBusy, Unavailable) as error:
                log.warning("revocations wait", why=str(error))

    async def apply(self) -> None:
        """Durable when it returns: no update of a client that was revoked before is in the open round.

        Raises TooBusy or Unavailable if that cannot be recorded now.
        """
        if self._gate is None:
            return
        present = tuple(_present(self._engine.state))
        for client_id in await asyncio.to_thread(_revoked, self._gate, present):
            transition = await self._engine.submit(Revoke(client_id, REASON))
            if transition.outcome is Outcome.ACCEPTED:
                log.warning("client revoked", client=client_id, why="its update is not part of the open round any more")


def _present(state: State) -> Iterable[str]:
    """Who may be counted on, and who has a part in the open round although it left."""
    parts = {a.client_id for a in state.open.assignments} if state.open is not None else set()
    for client_id, client in state.clients.items():
        if client.membership in (Membership.ACTIVE, Membership.LOST) or client_id in parts:
            yield client_id


def _revoked(gate: Gate, client_ids: Iterable[str]) -> list[str]:
    # In a thread: it looks at a file for each of them.
    return [client_id for client_id in client_ids if _is_revoked(gate, client_id)]


def _is_revoked(gate: Gate, client_id: str) -> bool:
    try:
        return not gate.knows(client_id)
    except RafloraError:
        return False  # a file that cannot be read lets nobody in, and is no operator's word either
