"""Which version this is, and which protocols it speaks."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PROTOCOL = 1
PROTOCOL_OLDEST = 1


@cache  # it is read from a file, and asked for by every status
def software_version() -> str:
    """The installed version; "0+source" where the package is not installed."""
    try:
        return version("raflora")
    except PackageNotFoundError:
        return "0+source"
