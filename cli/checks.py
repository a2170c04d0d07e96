"""What `raflora doctor` finds, as values: a name, a verdict, what was found, and what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How it stands."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""  # what to do; empty if nothing is to be done


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, Verdict.OK, found)


def warning(name: str, found: str, advice: str = "") -> Check:
    """Works, but perhaps not for long, or not as it was meant."""
    return Check(name, Verdict.WARNING, found, advice)


def failed(name: str, found: str, advice: str = "") -> Check:
    """Does not work."""
    return Check(name, Verdict.FAILED, found, advice)


def worst(checks: Iterable[Check]) -> Verdict:
    """The verdict on the whole."""
    found = {check.verdict for check in checks}
    return next((verdict for verdict in (Verdict.FAILED, Verdict.WARNING) if verdict in found), Verdict.OK)


def as_json(checks: Iterable[Check]) -> dict[str, object]:
    """For machines."""
    listed = list(checks)
    return {"verdict": str(worst(listed)), "checks": [asdict(check) for check in listed]}
