"""A real disk of a few megabytes, that a test can fill to the byte."""

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

MUST_RUN = bool(os.environ.get("RAFLORA_TEST_MUST_MOUNT"))  # as CI says, which may mount


@asynccontextmanager
async def small_disk(folder: Path, mebibytes: int) -> AsyncIterator[Path]:
    """A file system of this size. Skips the test where nothing may be mounted."""
    folder.mkdir()  # noqa: ASYNC240
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "raflora-test", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True)  # noqa: ASYNC221
    if mounted.returncode != 0:
        why = f"no file system can be mounted here: {mounted.stderr.decode().strip()}"
        if MUST_RUN:
            pytest.fail(why)  # a row of the fault matrix that is skipped in silence holds nothing
        pytest.skip(why)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)  # noqa: ASYNC221


def fill(folder: Path) -> Path:
    """Leaves not a byte."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")
    return filler
