"""The answer to a handshake, from the operator's settings to what the worker reads in it."""

from pathlib import Path
from typing import Any

import pytest
from coordinators import config_of
from pydantic import ValidationError

from coordinator.config import MAX_RANK_LEVELS, RanksConfig
from coordinator.servicers.greeting import greeting
from worker import forms
from worker.messages import Welcome
from worker.wire_messages import welcome_of


def welcomed(folder: Path, **changes: Any) -> Welcome:
    """What a worker reads, checked as it checks it."""
    welcome = welcome_of(greeting(config_of(folder, **changes), "ab" * 32))
    forms.check_welcome(welcome)
    return welcome


@pytest.mark.parametrize("policy", ["cycle", "hardware"])
def test_levels_and_share_are_told(tmp_path: Path, policy: str) -> None:
    welcome = welcomed(tmp_path, ranks__policy=policy, ranks__levels=[8, 2, 2], ranks__memory_share=0.5)
    assert (welcome.rank_levels, welcome.memory_share) == ((2, 8), 0.5)
    assert welcome.model.base_model_digest == "ab" * 32


def test_a_policy_without_levels_tells_none(tmp_path: Path) -> None:
    welcome = welcomed(tmp_path)
    assert (welcome.rank_levels, welcome.memory_share) == ((), 0.9)


def test_no_more_levels_are_accepted_than_workers_take() -> None:
    assert forms.MAX_RANK_LEVELS == MAX_RANK_LEVELS
    levels = tuple(range(1, MAX_RANK_LEVELS + 2))
    assert RanksConfig(policy="cycle", levels=levels[1:]).levels == levels[1:]  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="65 different levels; at most 64"):
        RanksConfig(policy="cycle", levels=levels)  # type: ignore[arg-type]
