"""What bytes and rounds cost: through the real worker client and a real coordinator, beside bare TCP.

python -m benchmarks.transfer [--only PART] [--repetitions N] [--format json]
"""

from collections.abc import Callable

from benchmarks.interleaved import Figure


def figures(progress: Callable[[str], None], only: str | None, repetitions: int) -> list[Figure]:
    """What was measured; `only` one of parts.PARTS."""
    # Not at the top: programs of this package are run by themselves, and what is imported before it runs is run twice.
    from benchmarks.transfer import parts  # noqa: PLC0415

    return parts.figures(progress, only, repetitions)
