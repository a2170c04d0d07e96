"""Keeps callers from filling the log: what is said again within a while is counted instead."""

import math

QUIET_SECONDS = 60.0
MAX_REMEMBERED = 1000


class Quiet:
    """Counts what is said again within a while, for a bounded number of topics."""

    def __init__(self, seconds: float = QUIET_SECONDS, most: int = MAX_REMEMBERED) -> None:
        self._seconds = seconds
        self._most = most
        self._said: dict[str, tuple[float, int]] = {}  # when, and how often unsaid since; the oldest first

    def unsaid(self, topic: str, now: float) -> int:
        """How often it was kept quiet since it was last said, if it is to be said now; else -1.

        A topic must not hold a caller's own words: it could have a new one for every call.
        """
        at, count = self._said.get(topic, (-math.inf, 0))
        if now - at < self._seconds:
            self._said[topic] = (at, count + 1)
            return -1
        self._said.pop(topic, None)
        while len(self._said) >= self._most:
            del self._said[next(iter(self._said))]
        self._said[topic] = (now, 0)
        return count
