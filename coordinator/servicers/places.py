"""How many calls one caller may have in progress, over all of its connections. Nothing here waits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from common.errors import TooBusy
from common.identity import Role

# A worker needs a long poll, a heartbeat and a transfer, and again those that a connection that broke left behind.
MAX_CALLS: Mapping[Role, int] = {
    Role.WORKER: 32,
    Role.OBSERVER: 64,  # one identity may be behind many screens
    Role.OPERATOR: 64,
    Role.JOIN: 256,  # one token may be for a thousand workers that start in the same moment
}
MAX_CALLS_IN_THE_CLEAR = 10_000  # of everybody together: who they are is not known


class Places:
    """Counts calls in progress by caller."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    @contextmanager
    def one_for(self, who: str, most: int) -> Iterator[None]:
        """A place for one call. Raises TooBusy if this caller holds so many already."""
        taken = self._taken.get(who, 0)
        if taken >= most:
            raise TooBusy(f"{who}: {taken} calls are in progress, at most {most} at a time; try again later")
        self._taken[who] = taken + 1
        try:
            yield
        finally:
            self._taken[who] -= 1
            if not self._taken[who]:
                del self._taken[who]
