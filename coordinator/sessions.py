"""Which process speaks for a client: two with one identity (a copied state folder) must not take tasks from each other.

A worker gives itself a session when it starts. Of two sessions of one client the one that was first heard later is
the newer: it goes on, and the older one is told to end. A worker that was restarted never speaks with its old session
again, so it raises no alarm. Volatile: after a restart of the coordinator everybody is new, and the same rule holds.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import structlog

from common.errors import IdentityConflict
from coordinator.quiet import Quiet

REMEMBERED_SESSIONS = 8  # of one client that have ended; an even older one would count as new
ALARM_SECONDS = 3600.0  # of the federation's clock: so long the status tells of the last conflict
_LONGEST_SESSION = 64

log = structlog.get_logger()


@dataclass
class _Spokesman:
    newest: str
    lease_token: int = 0  # that the newest was given last
    older: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_SESSIONS))
    conflict_at: float | None = None


class Sessions:
    """The newest session of every client that was heard since this process started."""

    def __init__(self) -> None:
        self._by_client: dict[str, _Spokesman] = {}
        self._quiet = Quiet()

    def hear(self, client_id: str, session: str, now: float) -> None:
        """A call came from this session of a member. Raises IdentityConflict if there is a newer one.

        A worker that gives no session is left alone.
        """
        if not session:
            return
        session = session[:_LONGEST_SESSION]
        known = self._by_client.setdefault(client_id, _Spokesman(session))
        if session in known.older:
            known.conflict_at = now
            if (unsaid := self._quiet.unsaid(client_id, now)) >= 0:
                why = _sentence(client_id)
                log.warning("two workers speak as one client", client=client_id, why=why, unsaid=unsaid)
            raise conflict_of(client_id)
        if session != known.newest:
            known.older.append(known.newest)
            known.newest = session
            known.lease_token = 0

    def lease_of(self, client_id: str, session: str) -> int:
        """The lease that this very session was given last; 0 if it has none, or gives no session."""
        known = self._by_client.get(client_id)
        is_newest = known is not None and bool(session) and known.newest == session[:_LONGEST_SESSION]
        return known.lease_token if known is not None and is_newest else 0

    def note_lease(self, client_id: str, session: str, lease_token: int) -> None:
        """The session was given a lease; forgotten as soon as another session speaks."""
        known = self._by_client.get(client_id)
        if known is not None and known.newest == session[:_LONGEST_SESSION]:
            known.lease_token = lease_token

    def is_newest(self, client_id: str, session: str) -> bool:
        """Whether a call of this session may still be given something."""
        known = self._by_client.get(client_id)
        return not session or known is None or known.newest == session[:_LONGEST_SESSION]

    def alarms(self, now: float) -> Iterator[str]:
        """What an operator should know of, by client id."""
        for client_id, known in sorted(self._by_client.items()):
            if known.conflict_at is not None and now - known.conflict_at <= ALARM_SECONDS:
                yield _sentence(client_id)


def conflict_of(client_id: str) -> IdentityConflict:
    """What the older of two workers is told."""
    return IdentityConflict(
        f"client {client_id!r}: a newer worker speaks with the same name and enrolment key, so this one must end; "
        "was its state_dir copied? Give every worker a state_dir and a name of its own"
    )


def _sentence(client_id: str) -> str:
    return (
        f"two workers speak as {client_id!r} with the same key (a copied state_dir?); the newer one goes on, the older "
        "one was told to end: give each a state_dir and a name of its own"
    )
