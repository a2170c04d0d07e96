"""What somebody may ask of a federation; step.py decides what becomes of it.

Workers ask the first six, operators the next seven, the service itself the rest.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import TypeAlias

from common.errors import InvalidRequest
from coordinator.federation.state import Evaluation, Kind, Profile, Rules, Update

# What stands in metadata, file names of other systems and terminals: plain ASCII.
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENROL_KEY = re.compile(r"[!-~]{1,200}")
MAX_EXAMPLES = 1 << 32  # of one client
MAX_MEMORY_BYTES = 1 << 50  # of one client's device, or its group's
MAX_MICRO_BATCH = 1 << 20
QUANTIZATIONS = ("none", "8bit", "4bit")


class Outcome(StrEnum):
    """What became of a request that is normal life; what is wrong is an error."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the same again; nothing changed
    STALE = "stale"  # for a round that is over
    SUPERSEDED = "superseded"  # a newer lease exists
    ROUND_CLOSED = "round_closed"  # the input list is frozen


@dataclass(frozen=True)
class Join:
    """A client wants a place, or brings a new profile."""

    client_id: str
    enrol_key: str
    profile: Profile


@dataclass(frozen=True)
class Leave:
    """A client says good-bye."""

    client_id: str


@dataclass(frozen=True)
class Claim:
    """A client fetches its task; `slice_digest` is what it will be handed."""

    client_id: str
    kind: Kind
    number: int
    attempt: int
    slice_digest: str
    held_token: int = 0  # the lease that the very same process was given before; 0: none, or nobody knows


@dataclass(frozen=True)
class SubmitUpdate:
    """A client commits a checked upload."""

    client_id: str
    lease_token: int
    number: int
    attempt: int
    slice_digest: str
    update: Update


@dataclass(frozen=True)
class SubmitEvaluation:
    """A client commits an evaluation."""

    client_id: str
    lease_token: int
    number: int
    attempt: int
    slice_digest: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Fail:
    """A client gives its task back."""

    client_id: str
    lease_token: int
    failure: str


@dataclass(frozen=True)
class Pause:
    """Open no further round."""


@dataclass(frozen=True)
class Resume:
    """Go on."""


@dataclass(frozen=True)
class CloseRound:
    """Close the open round with what is here."""

    number: int


DIVERGED = "the merged adapter has diverged"  # how the reason of a round begins that no further attempt mends


@dataclass(frozen=True)
class AbortRound:
    """Throw the open round's results away."""

    number: int
    reason: str = "aborted by the operator"


@dataclass(frozen=True)
class Evict:
    """Shut a client out."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class Revoke:
    """Take a client's part out of the open round; it is gone until it is let in again, and joins again."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class SetRank:
    """Grant a rank from the next round on."""

    client_id: str
    rank: int


@dataclass(frozen=True)
class Found:
    """The manifest is complete and the seeded adapter is durable."""

    rules: Rules
    manifest_digest: str
    adapter_digest: str


@dataclass(frozen=True)
class ChangeRules:
    """The coordinator was started with other rules for rounds."""

    rules: Rules


@dataclass(frozen=True)
class NoteSilence:
    """A client was silent for longer than its lease, or is heard again."""

    client_id: str
    is_lost: bool


@dataclass(frozen=True)
class Publish:
    """The aggregation of the frozen inputs is durable."""

    number: int
    attempt: int
    adapter_digest: str
    report_json: str


@dataclass(frozen=True)
class Tick:
    """Time has passed; nothing else."""


Request: TypeAlias = (
    Join
    | Leave
    | Claim
    | SubmitUpdate
    | SubmitEvaluation
    | Fail
    | Pause
    | Resume
    | CloseRound
    | AbortRound
    | Evict
    | Revoke
    | SetRank
    | Found
    | ChangeRules
    | NoteSilence
    | Publish
    | Tick
)


def check_join(request: Join) -> None:
    """Raises InvalidRequest for what no federation takes, whatever its state."""
    whose, profile = f"client {request.client_id[:80]!r}", request.profile
    if not _CLIENT_ID.fullmatch(request.client_id):
        raise InvalidRequest(f"{whose}: a client id is 1 to 100 letters, digits, dots, dashes or underscores")
    if not _ENROL_KEY.fullmatch(request.enrol_key):
        raise InvalidRequest(f"{whose}: an enrolment key is 1 to 200 visible ASCII characters")
    if profile.max_rank < 1 or profile.num_examples < 1:
        raise InvalidRequest(
            f"{whose}: max_rank {profile.max_rank} and num_examples {profile.num_examples}; both must be at least 1"
        )
    for name, count in (("num_examples", profile.num_examples), ("num_eval_examples", profile.num_eval_examples)):
        if count > MAX_EXAMPLES:
            raise InvalidRequest(f"{whose}: {name} {count}; at most {MAX_EXAMPLES} are accepted")
    _check_memory(profile, whose)
    # JSON has no word for what is not finite: the journal could not be read again.
    if not (isfinite(profile.examples_per_second) and profile.examples_per_second >= 0.0):
        raise InvalidRequest(
            f"{whose}: examples_per_second {profile.examples_per_second}; a finite number, not below 0, is expected"
        )


def _check_memory(profile: Profile, whose: str) -> None:
    """Raises InvalidRequest for a memory or a measurement of it that no device has."""
    if not 0 <= profile.memory_bytes <= MAX_MEMORY_BYTES:
        raise InvalidRequest(f"{whose}: memory_bytes {profile.memory_bytes}; 0 to {MAX_MEMORY_BYTES} is expected")
    measured = profile.measured
    if measured is None:
        return
    for name, found in (("base_bytes", measured.base_bytes), ("bytes_per_rank", measured.bytes_per_rank)):
        if not 0 <= found <= MAX_MEMORY_BYTES:
            raise InvalidRequest(f"{whose}: measured {name} {found}; 0 to {MAX_MEMORY_BYTES} is expected")
    if not 1 <= measured.micro_batch <= MAX_MICRO_BATCH:
        raise InvalidRequest(
            f"{whose}: measured micro_batch {measured.micro_batch}; 1 to {MAX_MICRO_BATCH} is expected"
        )
    if measured.quantization not in QUANTIZATIONS:
        raise InvalidRequest(
            f"{whose}: measured quantization {measured.quantization[:50]!r}; one of {', '.join(QUANTIZATIONS)} "
            "is expected"
        )
