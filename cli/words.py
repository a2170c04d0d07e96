"""Numbers and remote strings as people read them: seconds, shares, names.

Pure functions from a value to a string; nothing here knows a terminal.
"""

import math

from common.moments import DAY_SECONDS

NOTHING = "-"  # a value that does not exist (an accuracy that nobody measured)

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, DAY_SECONDS


def plain(text: str) -> str:
    """The text on one line without control characters: a client's name must not steer the operator's terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def human_seconds(seconds: float) -> str:
    """3.21 -> "3.2 s", 75 -> "1 min 15 s", 4000 -> "1 h 6 min"."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    if seconds < _HOUR:
        return f"{int(seconds // _MINUTE)} min {int(seconds % _MINUTE)} s"
    if seconds < _DAY:
        return f"{int(seconds // _HOUR)} h {int(seconds % _HOUR // _MINUTE)} min"
    return f"{int(seconds // _DAY)} d {int(seconds % _DAY // _HOUR)} h"


def percent(share: float) -> str:
    """0.412 -> "41.2 %"; a share that is small but not zero never reads as zero: 2e-7 -> "2e-05 %"."""
    if not math.isfinite(share):
        return NOTHING
    hundredths = 100 * share
    return f"{hundredths:.1f} %" if share == 0 or hundredths >= 0.1 else f"{hundredths:.1g} %"


def decimals(value: float) -> str:
    """A loss or a ratio with three significant places."""
    return f"{value:.3f}" if math.isfinite(value) else NOTHING


def rank_range(low: int, high: int) -> str:
    """Rank indices [low, high) as people count them: (0, 2) -> "1-2", (4, 5) -> "5"."""
    return f"{low + 1}-{high}" if high > low + 1 else f"{high}"


def counted(number: int, noun: str) -> str:
    """(1, "client") -> "1 client", (2, "client") -> "2 clients"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
