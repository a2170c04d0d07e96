"""What a group answers, of what its processes answer; two of them here in one, over torch's own store."""

from typing import Any

import pytest
from torch import distributed

from worker.trainer.group import Group
from worker.trainer_protocol import Answer, Failed, Loaded

pytestmark = pytest.mark.torch

STORE: Any = distributed.HashStore  # type: ignore[attr-defined] # torch exports it, but not to a type checker

LOADED = Loaded("a" * 64, (("q_proj", 4, 4),), (), 7, "cpu", 1 << 30)


def concluded(first: Answer, second: Answer) -> Answer:
    """What process 0 tells the agent."""
    store = STORE()
    groups = [Group(rank, 2, store=store) for rank in range(2)]
    groups[1].conclude(second)
    return groups[0].conclude(first)


def test_processes_that_have_loaded_different_things_do_not_work_together() -> None:
    assert concluded(LOADED, LOADED) == LOADED
    model = Loaded("b" * 64, LOADED.modules, (), 7, "cpu", 1 << 30)
    assert concluded(LOADED, model) == Failed(
        "model_error", "process 1 has loaded another base model than process 0", fatal=True
    )
    data = Loaded("a" * 64, LOADED.modules, (), 8, "cpu", 1 << 30)
    assert concluded(LOADED, data) == Failed(
        "data_error", "process 1 has other layers or examples than process 0", fatal=True
    )


def test_of_many_that_failed_the_one_that_was_not_merely_told_is_told_of() -> None:
    hearsay, cause = Failed("elsewhere", "another process failed"), Failed("data_error", "no such file")
    assert concluded(hearsay, cause) == Failed("data_error", "process 1 of 2: no such file")


def test_process_0_does_not_wait_for_answers_when_the_group_is_at_an_end() -> None:
    end = Failed("out_of_memory", "no memory", fatal=True)
    assert Group(0, 2, store=STORE()).conclude(end) == end
