"""The federation's own clock: seconds that pass while a coordinator runs, going on where the journal ends."""

import time
from collections.abc import Callable


class FederationClock:
    """Never compared with any other clock, never set back, stands still while no coordinator runs."""

    def __init__(self, start_at: float = 0.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset = start_at - monotonic()

    def now(self) -> float:
        """Federation seconds."""
        return self._monotonic() + self._offset
