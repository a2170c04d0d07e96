"""Who waits for the state to change: observers for any change, a client only for news that concern it.

A round of two thousand clients is four thousand changes; if each of them woke every poll that is open, the looks
alone would be millions. Nothing here knows the state: the engine says whom a change concerns.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable

_ANY = ""  # no client's name: who waits under it is woken by every change


class Changes:
    """Counts the versions of the state. Belongs to one event loop."""

    def __init__(self) -> None:
        self.version = 0
        self.is_over = False
        self._news: dict[str, int] = {}  # client id: the newest version that concerns it
        self._news_for_all = 0
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def announce(self, client_ids: Iterable[str], *, is_for_all: bool) -> None:
        """A new version, which concerns these clients or everybody."""
        self.version += 1
        if is_for_all:
            self._news_for_all = self.version
            self._wake(list(self._waiting))
        else:
            concerned = set(client_ids)
            self._news.update(dict.fromkeys(concerned, self.version))
            self._wake([_ANY, *concerned])

    def end(self) -> None:
        """Ends every wait, and those to come."""
        self.is_over = True
        self._wake(list(self._waiting))

    async def wait(self, version: int, timeout_seconds: float) -> None:
        """Until there is a newer version than this, at most until the timeout."""
        if self.version == version:
            await self._sleep(_ANY, timeout_seconds)

    async def wait_for_news(self, client_id: str, version: int, timeout_seconds: float) -> None:
        """Likewise, but only for a version that concerns the client."""
        if max(self._news_for_all, self._news.get(client_id, 0)) <= version:
            await self._sleep(client_id, timeout_seconds)

    async def _sleep(self, name: str, timeout_seconds: float) -> None:
        if self.is_over:
            return
        awoken = asyncio.Event()
        self._waiting[name].add(awoken)
        try:
            async with asyncio.timeout(timeout_seconds):
                await awoken.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting[name].discard(awoken)
            if not self._waiting[name]:
                del self._waiting[name]

    def _wake(self, names: Iterable[str]) -> None:
        for name in names:
            for awoken in self._waiting.get(name, ()):
                awoken.set()
