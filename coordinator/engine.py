"""The engine: the one task that owns the federation's state.

Requests come through a bounded queue. For each batch: step, append the events to the journal, adopt the state, start
the commands, and only then answer. There is no lock, because there is no second owner.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import ParamSpec

import structlog

from common.errors import JournalConflict, RafloraError, StorageFailed, TooBusy, Unavailable
from common.failpoints import reach
from coordinator.changes import Changes
from coordinator.clock import FederationClock
from coordinator.federation.due import next_deadline
from coordinator.federation.events import ClientJoined, Event, RoundOpened, evolve
from coordinator.federation.requests import NoteSilence, Request, Tick
from coordinator.federation.state import Membership, Phase, State
from coordinator.federation.step import Command, Transition, pending, step
from coordinator.stores.event_codec import entry_of, event_of, snapshot_of, state_of
from coordinator.stores.journal import Journal

MAX_QUEUE = 1024
MAX_BATCH = 64  # requests that share one commit
SNAPSHOT_EVERY = 500  # events; bounds the replay at start
_LONGEST_NAP_SECONDS = 5.0
_FULL_DISK_PAUSE_SECONDS = 0.5  # what is overdue would be tried again at once, and again

P = ParamSpec("P")

log = structlog.get_logger()


@dataclass
class _Waiting:
    request: Request
    answer: asyncio.Future[Transition] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Engine:
    """A federation that runs. `run` is its task; everybody else calls `submit`."""

    def __init__(
        self,
        federation: str,
        journal: Journal,
        carry_out: Callable[[Command], None],
        clock: Callable[[float], FederationClock] = FederationClock,
    ) -> None:
        """Rebuilds the state from the journal. `carry_out` starts a command and returns at once."""
        self._federation = federation
        self._journal = journal
        self._carry_out = carry_out
        self.state, self._sequence, at = replay(federation, journal)
        self._clock = clock(at)
        self._started_at = self._clock.now()
        self._snapshot_at = self._sequence
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(MAX_QUEUE)
        self._changes = Changes()
        self._heard_at: dict[str, float] = {}
        self._all_heard_since = -inf  # no active client is silent for longer, and no lost one was heard later
        self._has_ended = False
        self._failure: StorageFailed | None = None
        # One thread of its own: a commit, for which everybody waits, must not queue behind slow work.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")

    @property
    def now(self) -> float:
        """Federation seconds."""
        return self._clock.now()

    @property
    def has_ended(self) -> bool:
        """Whether it takes no further request."""
        return self._has_ended or self._failure is not None

    @property
    def uptime_seconds(self) -> float:
        """Of this process."""
        return self.now - self._started_at

    async def submit(self, request: Request) -> Transition:
        """What became of the request, durable.

        Raises the typed error of a refused one, Unavailable if the engine has ended or ends meanwhile.
        """
        waiting = _Waiting(request)
        if not self._has_ended:
            await self._queue.put(waiting)
        if self._has_ended:
            _refuse(waiting, _ending())
        return await waiting.answer

    @property
    def version(self) -> int:
        """Of the state, for those who wait for a change."""
        return self._changes.version

    @property
    def is_stopping(self) -> bool:
        """Whether nobody should wait for a change any more."""
        return self._changes.is_over

    async def wait_for_change(self, version: int, timeout_seconds: float) -> int:
        """The version of the state as soon as it is another one, or the same after the timeout."""
        await self._changes.wait(version, timeout_seconds)
        return self.version

    async def wait_for_news(self, client_id: str, version: int, timeout_seconds: float) -> None:
        """Until a newer version concerns the client: a round was opened, the last one is over, or it is named in it."""
        await self._changes.wait_for_news(client_id, version, timeout_seconds)

    async def stop_waiting(self) -> None:
        """Ends every wait for a change, so that a clean end need not outlast the longest poll."""
        self._changes.end()

    def hear(self, client_id: str) -> None:
        """Notes a sign of life; volatile."""
        self._heard_at[client_id] = self.now
        client = self.state.clients.get(client_id)
        if client is not None and client.membership is Membership.LOST:
            self._all_heard_since = -inf

    def silent_seconds(self, client_id: str) -> float:
        """Since the client was last heard by this process."""
        heard_at = self._heard_at.get(client_id)
        return 0.0 if heard_at is None else self.now - heard_at

    def end_with(self, failure: StorageFailed) -> None:
        """Makes `run` raise this: whoever finds that the disk broke its promise ends the coordinator."""
        self._failure = self._failure or failure
        with suppress(asyncio.QueueFull):  # a full queue needs nobody to wake it
            self._queue.put_nowait(_Waiting(Tick()))

    async def run(self) -> None:
        """Until it is cancelled. Any error here is fatal: the state may only be what the journal says."""
        for client in self.state.active_clients:
            self._heard_at.setdefault(client.client_id, self.now)  # a restart is nobody's silence
        for command in pending(self.state):
            self._carry_out(command)
        batch = [_Waiting(Tick())]
        try:
            while self._failure is None:
                await self._take(batch)
                batch = await self._next_batch()
            raise self._failure
        finally:
            self._has_ended = True
            self._refuse_everybody(batch)
            await asyncio.to_thread(self._writer.shutdown)  # a commit that has begun ends first

    async def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        try:
            async with asyncio.timeout(self._nap_seconds()):
                batch.append(await self._queue.get())
        except TimeoutError:
            batch.append(_Waiting(Tick()))
        while len(batch) < MAX_BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        batch += [_Waiting(silence) for silence in self._silences()]
        return batch

    def _nap_seconds(self) -> float:
        deadline = next_deadline(self.state)
        nap = _LONGEST_NAP_SECONDS if deadline is None else min(deadline - self.now, _LONGEST_NAP_SECONDS)
        if self.state.rules is not None:
            nap = min(nap, self.state.rules.lease_ttl_seconds / 4)
        return max(nap, 0.01)

    def _silences(self) -> Iterable[NoteSilence]:
        """What the engine has to ask itself. Looks at the clients only if it may find somebody: it is called often."""
        rules, now = self.state.rules, self.now
        if rules is None or now - self._all_heard_since <= rules.lease_ttl_seconds:
            return
        heard_since, found = now, False
        for client_id, client in self.state.clients.items():
            heard_at = self._heard_at.get(client_id)
            if heard_at is None:
                continue
            is_silent = now - heard_at > rules.lease_ttl_seconds
            if (client.is_active and is_silent) or (client.membership is Membership.LOST and not is_silent):
                found = True
                yield NoteSilence(client_id, is_lost=is_silent)
            elif client.is_active:
                heard_since = min(heard_since, heard_at)
        # What was found may be refused, or be outdated by a call before it is recorded: then it is looked for again.
        self._all_heard_since = -inf if found else heard_since

    async def _take(self, batch: list[_Waiting]) -> None:
        """Steps through a batch, commits it as one transaction, starts what it commands and answers."""
        before = state = self.state
        events: list[Event] = []
        answers: list[tuple[_Waiting, Transition]] = []
        now = self.now
        for waiting in batch:
            try:
                transition = step(state, waiting.request, now)
            except RafloraError as error:
                _refuse(waiting, error)
                continue
            state = transition.state
            events += transition.events
            answers.append((waiting, transition))
        if events:
            try:
                await self._commit(events, state, now)
                reach("events.adopted")
            except (TooBusy, Unavailable) as error:  # a full or locked journal: nothing was recorded or has happened
                for waiting, _ in answers:
                    _refuse(waiting, error)
                log.error("nothing can be recorded", why=str(error))
                await asyncio.sleep(_FULL_DISK_PAUSE_SECONDS)
                return
        for command in pending(state):
            if command not in pending(before):
                self._carry_out(command)
        for waiting, transition in answers:
            if not waiting.answer.done():
                waiting.answer.set_result(transition)

    async def _commit(self, events: list[Event], state: State, now: float) -> None:
        entries = [entry_of(event, self._sequence + 1 + i, now) for i, event in enumerate(events)]
        try:
            await self._write(self._journal.append, self._federation, entries)
        except JournalConflict:
            log.error("another coordinator writes to this journal; ending")
            raise
        self._sequence += len(entries)
        self.state = state
        for entry, event in zip(entries, events, strict=True):
            log.debug("event", kind=entry.kind, sequence=entry.sequence)
            if isinstance(event, ClientJoined):
                self.hear(event.client.client_id)  # or what it was silent before would count at once
        if self._sequence - self._snapshot_at >= SNAPSHOT_EVERY:
            await self._save_snapshot()
        is_for_all = state.phase is Phase.FINISHED or any(isinstance(event, RoundOpened) for event in events)
        self._changes.announce(map(_client_of, events), is_for_all=is_for_all)

    async def _save_snapshot(self) -> None:
        try:
            await self._write(self._write_snapshot, self._sequence, self.state)
        except (TooBusy, Unavailable) as error:  # the events are recorded; only a restart has more to read
            log.warning("no snapshot", why=str(error))
            return
        self._snapshot_at = self._sequence

    def _write_snapshot(self, sequence: int, state: State) -> None:
        # In the writer's thread: the state holds every round there ever was, and it is frozen.
        self._journal.save_snapshot(self._federation, sequence, snapshot_of(state))

    async def _write(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, partial(work, *args, **kwargs))

    def _refuse_everybody(self, batch: list[_Waiting]) -> None:
        while not self._queue.empty():
            batch.append(self._queue.get_nowait())
        for waiting in batch:
            _refuse(waiting, _ending())


def _client_of(event: Event) -> str:
    """Whom an event is about; "" for one about everybody or nobody."""
    return event.client.client_id if isinstance(event, ClientJoined) else getattr(event, "client_id", "")


def _refuse(waiting: _Waiting, error: RafloraError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
        waiting.answer.exception()  # a caller that has gone must not make a warning


def _ending() -> Unavailable:
    return Unavailable("the coordinator is ending; ask again when it is back")


def replay(federation: str, journal: Journal) -> tuple[State, int, float]:
    """State, sequence and federation time at the journal's end. Raises CorruptStore."""
    state, sequence, at = State(), 0, 0.0
    snapshot = journal.latest_snapshot(federation)
    if snapshot is not None:
        sequence, state = snapshot[0], state_of(snapshot[1])
    for entry in journal.read(federation, after=max(0, sequence - 1)):
        at = entry.at
        if entry.sequence > sequence:
            state = evolve(state, event_of(entry))
            sequence = entry.sequence
    return state, sequence, at
