"""Points in time, as people read them. Nothing here looks at a clock."""

import time

DAY_SECONDS = 86_400.0


def moment(seconds: float) -> str:
    """Unix seconds for people: 2026-11-23 04:05 UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "a time beyond all calendars"
