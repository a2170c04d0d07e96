"""Events and snapshots as JSON: the form in which a federation outlives this process and this version.

Field names and kinds are for ever; a new field needs a default. What is unknown is refused by name.
"""

import json
from dataclasses import replace
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from common.errors import CorruptStore
from coordinator.federation.events import Event
from coordinator.federation.state import RoundRecord, State
from coordinator.stores.journal import Entry

_KINDS: dict[str, TypeAdapter[Event]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}
_STATE = TypeAdapter(State)
_RECORD = TypeAdapter(RoundRecord)
_NO_HISTORY = '"history":[]'


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
        event = kind.validate_json(entry.body)
    except ValidationError as error:
        raise CorruptStore(f"journal entry {entry.sequence}: not a {entry.kind}: {error}") from None
    _refuse_unknown(json.loads(entry.body), json.loads(kind.dump_json(event)), f"journal entry {entry.sequence}")
    return event


def snapshot_of(state: State) -> str:
    """The whole state. In pieces, so that a thread that is at it lets others go on in between."""
    frame = _STATE.dump_json(replace(state, history=())).decode()
    # No text can hold this: in JSON its quotes would be escaped.
    before, after = frame.split(_NO_HISTORY)
    history = ",".join(_RECORD.dump_json(record).decode() for record in state.history)
    return f'{before}"history":[{history}]{after}'


def state_of(snapshot: str) -> State:
    """The inverse. Raises CorruptStore."""
    try:
        state = _STATE.validate_json(snapshot)
    except ValidationError as error:
        raise CorruptStore(f"journal snapshot: not a state of this version: {error}") from None
    _refuse_unknown(json.loads(snapshot), json.loads(snapshot_of(state)), "journal snapshot")
    return state


def _refuse_unknown(found: Any, understood: Any, where: str) -> None:
    """Raises CorruptStore for a field that this version would drop: a newer one meant something by it."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name not in understood:
                raise CorruptStore(f"{where}: unknown field {name!r}; a newer version wrote it, start that one")
            _refuse_unknown(value, understood[name], where)
    elif isinstance(found, list):
        for value, kept in zip(found, understood, strict=True):
            _refuse_unknown(value, kept, where)
