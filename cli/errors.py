"""How an error ends the command: one line that says what and what to do next, and a stable exit code.

The codes are documented in cli/main.py. Nothing here catches an error that has no name.
"""

from collections.abc import Mapping
from enum import IntEnum

from common.errors import (
    ConfigError,
    CorruptStore,
    CorruptTransfer,
    NothingPublished,
    RafloraError,
    StaleRound,
    StateInUse,
    StorageFailed,
    TooBusy,
    Unavailable,
    UnknownClient,
    WrongRank,
)


class ExitCode(IntEnum):
    """What a script can act on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    INTERRUPTED = 130  # the shell's convention for Ctrl-C: 128 + SIGINT


class Refused(RafloraError):
    """The other side said no without a reason that this version knows."""

    code = "FAILED_PRECONDITION"
    reason = "refused"


class Failed(RafloraError):
    """The verb could not do its work, and nobody refused anything."""

    reason = "failed"


_ADVICE: Mapping[type[RafloraError], str] = {
    Unavailable: "is the coordinator running there? Name it with --coordinator HOST:PORT or RAFLORA_COORDINATOR",
    NothingPublished: "`raflora status` says what the federation waits for",
    StaleRound: "`raflora status` shows the open round",
    UnknownClient: "`raflora clients` lists them",
    WrongRank: "choose a rank in that range",
    TooBusy: "try again in a minute",
    CorruptTransfer: "run the command again",
}


_OF_THIS_SITE = ("data_error", "model_error")  # this worker's own settings name what cannot be used


def exit_code_of(error: RafloraError) -> ExitCode:
    """The exit code that an error stands for."""
    match error:
        case ConfigError() | StateInUse():
            return ExitCode.USAGE
        case _ if error.reason in _OF_THIS_SITE or getattr(error, "word", "") in _OF_THIS_SITE:
            return ExitCode.USAGE
        case Unavailable():
            return ExitCode.UNREACHABLE
        case Failed() | CorruptTransfer() | CorruptStore() | StorageFailed():
            return ExitCode.FAILED
        case _ if error.reason == RafloraError.reason:
            return ExitCode.FAILED
        case _:
            return ExitCode.REFUSED


def sentence_of(error: RafloraError) -> str:
    """What happened and, where it is known, what to do next."""
    what = str(error) or error.reason
    advice = _ADVICE.get(type(error))
    return f"{what}; {advice}" if advice else what
