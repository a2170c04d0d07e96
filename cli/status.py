"""`raflora status`: the federation as it stands, once or live."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc.aio
from raflora.v1 import status_pb2, status_pb2_grpc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli.connection import Connection, messages_of, reach
from cli.evaluation_screen import best_line, evaluation_lines
from cli.output import Format, print_json, print_screen, stdout_console
from cli.screens import round_line, standing_line, status_screen
from cli.words import human_seconds, plain
from common.errors import Unavailable

WATCH_SILENCE_SECONDS = 30.0  # the coordinator speaks at least every ten
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 15.0


async def status(*, watch: bool = False, format: Format = "table", connection: Connection = Connection()) -> None:
    """Shows where the federation stands: the open round, energies, accuracy, forecast.

    With --watch it stays and follows until the federation is finished, also through a restart of the coordinator.
    """
    if watch:
        await watch_status(connection, _view_for(format, stdout_console()))
        return
    async with reach(connection) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        answer = await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=connection.timeout_seconds)
    if format == "json":
        print_json(answer.status)
    else:
        print_screen(status_screen(answer.status))


class View(Protocol):
    """Where a watched status goes."""

    def show(self, status: status_pb2.FederationStatus) -> None:
        """The newest state."""

    def lost(self, sentence: str) -> None:
        """The connection is gone; what was shown last still stands."""

    def close(self) -> None:
        """Nothing more will come."""


async def watch_status(connection: Connection, view: View) -> None:
    """Shows every change until the federation is finished.

    Raises Unavailable if the coordinator was never reached; once it was, it is tried again for ever.
    """
    retry_seconds, was_reached = FIRST_RETRY_SECONDS, False
    try:
        while True:
            try:
                async with reach(connection) as channel, aclosing(_changes(channel, connection)) as changes:
                    async for message in changes:
                        view.show(message.status)
                        retry_seconds, was_reached = FIRST_RETRY_SECONDS, True
                        if message.status.phase == status_pb2.PHASE_FINISHED:
                            return
                why = f"coordinator {connection.address} ended the stream"
            except Unavailable as error:
                if not was_reached:
                    raise
                why = str(error)
            view.lost(f"{why}; reconnecting in {human_seconds(retry_seconds)}")
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)
    finally:
        view.close()


class LiveView:
    """One screen of a terminal, drawn again after each change."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._last = status_pb2.FederationStatus()
        self._live.start()

    def show(self, status: status_pb2.FederationStatus) -> None:
        """Draws it."""
        self._last = status
        self._live.update(status_screen(status), refresh=True)

    def lost(self, sentence: str) -> None:
        """Keeps the last screen and says why it is old."""
        self._live.update(status_screen(self._last, notice=sentence), refresh=True)

    def close(self) -> None:
        """Leaves the last screen where it is."""
        self._live.stop()


class LineView:
    """A line for each change that matters, for logs and pipes; seconds that pass are none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = status_pb2.FederationStatus()

    def show(self, status: status_pb2.FederationStatus) -> None:
        """Prints the newest finished round, its evaluation and the new standing, if they are new."""
        self._show_evaluation(status)
        if status.last_round.round != self._last.last_round.round or _standing(status) != _standing(self._last):
            if status.last_round.round != self._last.last_round.round:
                self._print(round_line(status.last_round, status.num_rounds))
            self._print(standing_line(status))
            for warning in status.warnings:
                if warning not in self._last.warnings:
                    self._print(f"! {plain(warning)}")
        self._last = status

    def _show_evaluation(self, status: status_pb2.FederationStatus) -> None:
        """A round is published first and evaluated after: then it is told once more, with its scores."""
        now, before = status.last_round, self._last.last_round
        if now.round == before.round and len(now.evaluations) and not len(before.evaluations):
            for line in (round_line(now, status.num_rounds), *evaluation_lines(now)):
                self._print(line)
            if status.HasField("best"):
                self._print(best_line(status))

    def lost(self, sentence: str) -> None:
        """Says so, once an attempt."""
        self._print(sentence)

    def close(self) -> None:
        """Has nothing to give back."""

    def _print(self, line: Text | str) -> None:
        self._console.print(line, soft_wrap=True)
        self._console.file.flush()


class JsonView:
    """Every message as one line of JSON; what is not JSON goes to standard error."""

    def show(self, status: status_pb2.FederationStatus) -> None:
        """Prints it."""
        print_json(status, indent=None)

    def lost(self, sentence: str) -> None:
        """Says so beside the stream."""
        print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Has nothing to give back."""


def _view_for(format: Format, console: Console) -> View:
    if format == "json":
        return JsonView()
    return LiveView(console) if console.is_terminal else LineView(console)


def _changes(channel: grpc.aio.Channel, connection: Connection) -> AsyncGenerator[status_pb2.WatchStatusResponse, None]:
    call = status_pb2_grpc.StatusServiceStub(channel).WatchStatus(status_pb2.WatchStatusRequest())
    return messages_of(call, connection, silence_seconds=WATCH_SILENCE_SECONDS)


def _standing(status: status_pb2.FederationStatus) -> tuple[object, ...]:
    done = sum(a.state == status_pb2.ASSIGNMENT_STATE_DONE for a in status.assignments)
    late = [a.client_id for a in status.assignments if a.late]
    return (status.phase, status.paused, status.round, done, late, status.clients_connected, list(status.warnings))
