"""How often a caller may make the coordinator write or sign: enough for every real worker, too little to fill a disk.

The clock is an argument. Volatile: a restart forgives everything, and restarts are not the caller's to make.
"""

from dataclasses import dataclass

from common.errors import QuotaExceeded

BURST = 60  # records at once: a worker that crashes, comes back and fails all day long does not need more
SECONDS_PER_RECORD = 10.0  # afterwards
MAX_CALLERS = 20_000  # that are remembered; more than `rounds.max_clients` of one federation


@dataclass
class _Balance:
    records: float
    at: float
    round: int


class Pace:
    """What each caller has left. A published round gives everything back, so that fast rounds are never slowed."""

    def __init__(self, burst: int = BURST, seconds_per_record: float = SECONDS_PER_RECORD) -> None:
        self._burst = burst
        self._seconds_per_record = seconds_per_record
        self._balances: dict[str, _Balance] = {}  # the longest unheard first

    def check(self, who: str, now: float, round: int = 0) -> None:
        """Raises QuotaExceeded if nothing is left. Takes nothing."""
        left = self._left(who, now, round)
        if left < 1.0:
            wait = (1.0 - left) * self._seconds_per_record
            raise QuotaExceeded(
                f"{who}: {self._burst} changes that the coordinator must record, and more than one in "
                f"{self._seconds_per_record:g} s since; try again in {wait:.0f} s"
            )

    def spend(self, who: str, now: float, round: int = 0) -> None:
        """Counts one, also one too many: calls in the same moment were all checked before the first was counted."""
        left = self._left(who, now, round)
        self._balances.pop(who, None)
        while len(self._balances) >= MAX_CALLERS:
            del self._balances[next(iter(self._balances))]
        self._balances[who] = _Balance(left - 1.0, now, round)

    def _left(self, who: str, now: float, round: int) -> float:
        known = self._balances.get(who)
        if known is None or known.round != round:
            return float(self._burst)
        return min(known.records + (now - known.at) / self._seconds_per_record, float(self._burst))
