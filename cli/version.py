"""`raflora version`."""

from common.version import software_version


def show_version() -> None:
    """Prints the version of this software."""
    print(software_version())
