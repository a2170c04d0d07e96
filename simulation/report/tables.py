"""Numbers as tables show them. Pure functions from a value to a string; nothing measured is an empty cell."""

import math
from collections.abc import Callable

from simulation.report.summary import ArmSummary, Spread

MEBI = 1 << 20


def spread_text(spread: Spread, text_of: Callable[[float], str]) -> str:
    """ "86.8 ± 0.1 (3)"; the deviation is left out for a single seed."""
    if not spread.n:
        return ""
    deviation = f" ± {text_of(spread.sd).removeprefix('+')}" if math.isfinite(spread.sd) else ""
    return f"{text_of(spread.mean)}{deviation} ({spread.n})"


def points(share_of_one: float) -> str:
    """0.8683 -> "86.8"."""
    return f"{100 * share_of_one:.1f}" if math.isfinite(share_of_one) else ""


def signed_points(share_of_one: float) -> str:
    """0.083 -> "+8.3"."""
    return f"{100 * share_of_one:+.1f}" if math.isfinite(share_of_one) else ""


def share(value: float) -> str:
    """A share that may be tiny: 0.214 -> "0.214", 0.00016 -> "1.6e-4", 0 -> "0"."""
    if not math.isfinite(value):
        return ""
    if value == 0 or value >= 0.001:
        return f"{value:.3f}" if value else "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def decimals(value: float, places: int) -> str:
    """So many places."""
    return f"{value:.{places}f}" if math.isfinite(value) else ""


def mebi(size_bytes: float) -> str:
    """Bytes as MiB with three significant digits: 12_345_678 -> "11.8"."""
    if not math.isfinite(size_bytes):
        return ""
    size = size_bytes / MEBI
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"


def runs_text(summary: ArmSummary) -> str:
    """ "2, 1 diverged": how many runs finished, and what became of the others."""
    stopped = len(summary.lost) - summary.diverged
    parts = [str(summary.finished)]
    parts += [f"{summary.diverged} diverged"] if summary.diverged else []
    parts += [f"{stopped} stopped"] if stopped else []
    return ", ".join(parts)
