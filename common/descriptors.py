"""How many files and connections this process may hold open. Unix only."""

import resource
from contextlib import suppress

RESERVE = 128  # for the journal, blobs, the registry, helper processes, logs: no stranger can take these
MAX_CONNECTIONS = 10_000  # however many descriptors there are: each costs memory too


def raise_limit() -> None:
    """As many as the system allows; 1,024, where most systems begin, would be 448 workers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a system may say "unlimited" and mean a number of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections() -> int:
    """Connections that may be open at once, so that each can move a file too and the reserve stays free."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(1, (soft - RESERVE) // 2))
