"""`raflora version`."""

from importlib.metadata import version


def show_version() -> None:
    """Prints the version of this software."""
    print(version("raflora"))
