"""One event as it is stored, and the chain that binds it to all entries before it.

Nothing here reads or writes; SqlJournal and the migration of its tables both stand on it.
"""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One event, as it is stored."""

    sequence: int  # 1, 2, 3, ... without gaps
    at: float  # federation seconds
    kind: str
    body: str  # JSON


def first_link(federation: str) -> str:
    """What the first entry of a federation is bound to."""
    return digest_of_text(f"raflora journal of {federation}")


def link_of(before: str, entry: Entry) -> str:
    """The checksum of an entry. It covers the one before, so no entry can be changed, moved, removed or put in."""
    return digest_of_text(f"{before}|{text_of(entry)}")


def text_of(entry: Entry) -> str:
    """Everything that an entry says, as it is hashed."""
    return f"{entry.sequence}|{float(entry.at).hex()}|{entry.kind}|{entry.body}"


def digest_of_text(text: str) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
