"""Events and snapshots as JSON: the form in which a federation outlives this process and this version.

Field names and kinds are for ever; a new field needs a default. What is unknown is refused by name.
"""

from typing import get_args

from pydantic import TypeAdapter, ValidationError

from common.errors import CorruptStore
from coordinator.federation.events import Event
from coordinator.federation.state import State
from coordinator.stores.journal import Entry

_KINDS: dict[str, TypeAdapter[Event]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}
_STATE = TypeAdapter(State)


def entry_of(event: Event, sequence: int, at: float) -> Entry:
    """The journal's form of an event."""
    kind = type(event).__name__
    return Entry(sequence, at, kind, _KINDS[kind].dump_json(event).decode())


def event_of(entry: Entry) -> Event:
    """The inverse. Raises CorruptStore for an unknown kind or a body that does not fit it."""
    kind = _KINDS.get(entry.kind)
    if kind is None:
        raise CorruptStore(
            f"journal entry {entry.sequence}: unknown event {entry.kind!r}; a newer version wrote it, start that one"
        )
    try:
        return kind.validate_json(entry.body)
    except ValidationError as error:
        raise CorruptStore(f"journal entry {entry.sequence}: not a {entry.kind}: {error}") from None


def snapshot_of(state: State) -> str:
    """The whole state."""
    return _STATE.dump_json(state).decode()


def state_of(snapshot: str) -> State:
    """The inverse. Raises CorruptStore."""
    try:
        return _STATE.validate_json(snapshot)
    except ValidationError as error:
        raise CorruptStore(f"journal snapshot: not a state of this version: {error}") from None
