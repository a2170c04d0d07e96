"""For every test: logs as they are at the start of a process. Verbs that are called in-process set them up."""

import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# CI plays the same histories everywhere; with a number of examples others are searched, that --hypothesis-seed repeats.
_SEARCHED = int(os.environ.get("RAFLORA_TEST_HISTORIES", "0"))
settings.register_profile("same", derandomize=True)
settings.register_profile("search", max_examples=_SEARCHED or 1, derandomize=False, print_blob=True)
settings.load_profile("search" if _SEARCHED else "same")


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    yield
    structlog.reset_defaults()
