"""Named steps at which a test may make this process die or fail: every write, fsync, rename and commit, every answer.

In a process that nobody armed a step costs one comparison. Nothing here knows what the steps mean.
"""

from collections.abc import Callable

Watch = Callable[[str], None]

_watch: Watch | None = None


def reach(step: str) -> None:
    """Says that the process has come to this step ("blob.renamed"). Raises whatever the watch raises."""
    if _watch is not None:
        _watch(step)


def arm(watch: Watch | None) -> None:
    """From now on `watch` is told every step of this process; None: nobody is."""
    global _watch  # noqa: PLW0603 - one process, one watch, set before it works
    _watch = watch
