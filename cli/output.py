"""What a verb prints on standard output: screens for people, JSON for machines, never both."""

import json
from types import TracebackType
from typing import Literal, Self

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import Progress

Format = Literal["table", "json"]

_WIDTH_WITHOUT_TERMINAL = 120  # a pipe or a log has no width; tables stay readable in either


def stdout_console() -> Console:
    """The console for screens; markup, highlighting and emoji codes in remote strings stay what they are."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_WITHOUT_TERMINAL)
    return console


def stderr_console() -> Console:
    """The console for screens beside a result that goes to standard output."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


class LiveScreen:
    """A screen with a region that moves, on a terminal only. Use as a context: it gives the terminal back."""

    def __init__(self, console: Console, region: Live | Progress) -> None:
        self._console = console
        self._region = region

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._region.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._region.stop()


def print_screen(screen: RenderableType) -> None:
    """Prints one screen."""
    stdout_console().print(screen)


def print_json(message: Message, *, indent: int | None = 2) -> None:
    """Prints a message as JSON with the names of the .proto files; 64-bit integers are strings, as protobuf has it.

    With `indent` None it is one line, for streams of them.
    """
    print(json.dumps(to_json(message), indent=indent), flush=True)


def to_json(message: Message) -> dict[str, object]:
    """The message as plain values, every field present, so that a script need not ask whether a key exists."""
    found: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found
