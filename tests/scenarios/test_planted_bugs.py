"""The harness against bugs: each of them breaks a promise, and the harness must say which."""

import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from faults.kills import Nursery, Setting, nursery, play, undisturbed
from faults.oracle import History
from faults.order import order_breaches, traced
from faults.plans import Around
from faults.planted import BUGS, UNSYNCED
from faults.schedule import COORDINATOR

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
SETTING = Setting(rounds=3, ranks=(2, 8, 16), evaluate_every=2, stuck_seconds=20)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed here")


@dataclass(frozen=True)
class Ground:
    """Where bugs are planted: the processes' nursery and what the federation should do."""

    place: Nursery
    expected: History


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ground(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    async with nursery() as place:
        yield Ground(place, await undisturbed(place, tmp_path_factory.mktemp("undisturbed"), SETTING))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", BUGS)
async def test_a_planted_bug_is_caught_by_its_name(name: str, tmp_path: Path, ground: Ground) -> None:
    bug = BUGS[name]
    around = Around(bug.steps, {COORDINATOR, bug.of} if bug.of == COORDINATOR else {bug.of}, bug.refuses_commits)
    outcome = await play(ground.place, tmp_path, replace(SETTING, bug=name), ground.expected, around)
    said = "; ".join(outcome.breaches)
    assert re.search(bug.breach, said), f"{len(outcome.kills)} kills, and only: {said or 'nothing'}"


@needs_strace
def test_everything_is_durable_in_its_order_before_it_is_answered(tmp_path: Path) -> None:
    assert order_breaches(traced(tmp_path), submissions=2) == []


@needs_strace
@pytest.mark.parametrize("name", UNSYNCED)
def test_a_missing_fsync_is_found_in_the_order_of_the_calls(name: str, tmp_path: Path) -> None:
    breaches = order_breaches(traced(tmp_path, name), submissions=2)
    assert re.search(UNSYNCED[name].breach, "; ".join(breaches)), breaches
