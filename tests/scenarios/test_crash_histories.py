"""The real engine on a real database that dies at any commit: what was answered is there afterwards, nothing twice.

The other machine (test_random_histories) plays the rules without a disk. Here requests are sent whose answers may be
lost, commits fail before or after they are durable, the process is dropped and the database opened again, and clocks
jump. The model is what was answered.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines import Monotonic
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rounds import EVERYBODY, RULES, claims, joins, publishes, uploads

from common.errors import RafloraError
from coordinator.clock import FederationClock
from coordinator.engine import Engine
from coordinator.federation.requests import Found, Outcome, Request, SubmitUpdate, Tick
from coordinator.federation.state import Phase, State
from coordinator.federation.step import Transition
from coordinator.stores.journal import Entry, SqlJournal

CLIENTS = st.sampled_from(EVERYBODY)
ENDINGS = st.sampled_from(["before the commit", "after the commit"])


class PowerCut(BaseException):
    """The process is gone: nothing of it runs on."""


class DyingJournal(SqlJournal):
    """Dies at the next commit, if it is told to."""

    dies = ""

    def append(self, federation: str, entries: Sequence[Entry]) -> None:
        if self.dies == "before the commit":
            raise PowerCut
        super().append(federation, entries)
        if self.dies:
            raise PowerCut


class Crashes(RuleBasedStateMachine):
    """One federation that is killed again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.monotonic = Monotonic()
        self.receipts: dict[tuple[int, int, str], str] = {}  # round, attempt, client: digest; what was answered
        self.asked: list[Request] = []
        self.last_seen = 0.0
        self.open()

    def open(self) -> None:
        self.journal = DyingJournal(f"sqlite:///{Path(self.folder.name) / 'journal.sqlite'}")
        self.engine = Engine("digits", self.journal, lambda _: None, lambda at: FederationClock(at, self.monotonic))
        self.running = self.loop.create_task(self.engine.run())
        self.wait(asyncio.sleep(0))

    def wait(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def drop(self) -> None:
        """The process dies."""
        self.running.cancel()
        self.wait(asyncio.gather(self.running, return_exceptions=True))
        self.journal.close()

    def teardown(self) -> None:
        self.drop()
        self.wait(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    @property
    def state(self) -> State:
        return self.engine.state

    def ask(self, act) -> Transition | None:
        try:
            request = act(self.state) if callable(act) else act
        except AssertionError:
            return None  # it needs a round that is not open, or a part in it
        self.asked.append(request)
        return self.send(request)

    def send(self, request: Request) -> Transition | None:
        """A request and its answer, which is remembered."""
        try:
            transition: Transition = self.wait(self.engine.submit(request))
        except RafloraError:
            return None
        if isinstance(request, SubmitUpdate) and transition.outcome is Outcome.ACCEPTED:
            key = (request.number, request.attempt, request.client_id)
            assert key not in self.receipts, "accepted twice"
            self.receipts[key] = request.update.digest
        return transition

    # ------------------------------------------------------------ what happens

    @initialize()
    def found(self) -> None:
        self.ask(Found(replace(RULES, num_rounds=3, max_attempts=9), "manifest", "adapter-0"))
        for client_id in EVERYBODY:
            self.ask(joins(client_id))

    @rule(client_id=CLIENTS)
    def join(self, client_id: str) -> None:
        self.ask(joins(client_id))

    @rule(client_id=CLIENTS)
    def claim(self, client_id: str) -> None:
        self.ask(claims(client_id))

    @rule(client_id=CLIENTS)
    def submit(self, client_id: str) -> None:
        self.ask(uploads(client_id))

    @rule(client_id=CLIENTS)
    def train(self, client_id: str) -> None:
        self.ask(claims(client_id))
        self.ask(uploads(client_id))

    @rule()
    def publish(self) -> None:
        if self.state.phase is Phase.AGGREGATING:
            self.ask(publishes())

    @rule(data=st.data())
    def repeat_something_late(self, data) -> None:
        if self.asked:
            self.send_again(data.draw(st.sampled_from(self.asked)))

    def send_again(self, request: Request) -> None:
        if isinstance(request, SubmitUpdate):
            known = self.receipts.get((request.number, request.attempt, request.client_id))
            answer = self.send(request)
            if known == request.update.digest and answer is not None:
                assert answer.outcome in (Outcome.DUPLICATE, Outcome.STALE)
            return
        self.send(request)

    @rule(client_id=CLIENTS, kind=st.sampled_from([claims, uploads]))
    def lose_the_answer(self, client_id: str, kind) -> None:
        """A request whose answer nobody sees; it may have counted."""
        with contextlib.suppress(AssertionError):
            request = kind(client_id)(self.state)
            before = dict(self.receipts)
            self.send(request)
            self.receipts = before
            self.asked.append(request)

    @rule(seconds=st.sampled_from([0.0, 1.0, 11.0, 101.0, 3600.0, 3.2e7]))
    def clocks_jump(self, seconds: float) -> None:
        self.monotonic.seconds += seconds
        self.ask(Tick())

    @rule(away_seconds=st.sampled_from([0.0, 3600.0]))
    def restart(self, away_seconds: float) -> None:
        self.drop()
        self.monotonic.seconds += away_seconds
        self.open()

    @rule(client_id=CLIENTS, kind=st.sampled_from([claims, uploads]), ending=ENDINGS)
    def die_in_a_commit(self, client_id: str, kind, ending: str) -> None:
        """Nobody is answered; afterwards the request has counted whole or not at all."""
        with contextlib.suppress(AssertionError):
            request = kind(client_id)(self.state)
            self.asked.append(request)
            self.journal.dies = ending
            self.wait(self.die_with(request))
        self.drop()
        self.open()

    async def die_with(self, request: Request) -> None:
        sending = asyncio.create_task(self.engine.submit(request))
        await asyncio.wait({sending, self.running}, return_when=asyncio.FIRST_COMPLETED)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def what_was_answered_is_there_and_counts_once(self) -> None:
        state = self.state
        counted = {(r.number, r.attempts, c.client_id): c.update.digest for r in state.history for c in r.contributions}
        if state.open is not None:
            counted |= {
                (state.open.number, state.open.attempt, c.client_id): c.update.digest for c in state.open.contributions
            }
        is_current = {(r.number, r.attempts) for r in state.history}
        if state.open is not None:
            is_current.add((state.open.number, state.open.attempt))
        for key, digest in self.receipts.items():
            if key[:2] in is_current:
                assert counted.get(key) == digest, f"the answer for {key} was given, and it is gone"

    @invariant()
    def the_database_says_what_is_served(self) -> None:
        again = Engine("digits", self.journal, lambda _: None, lambda at: FederationClock(at, self.monotonic))
        assert again.state == self.state

    @invariant()
    def federation_time_never_goes_back(self) -> None:
        # A restart goes on at the last event: what passed since was nobody's.
        entries = list(self.journal.read("digits"))
        assert [e.at for e in entries] == sorted(e.at for e in entries)


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
