"""kill -9 at the k-th durable step, in real processes: the promises of docs/reliability.md hold."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from faults.account import KILLED_BY, NEVER_KILLED, killed_elsewhere
from faults.kills import Campaign, Nursery, PlanOf, Setting, nursery, play, undisturbed
from faults.plans import EachStep
from faults.schedule import COORDINATOR, DEALT_EACH, Schedule

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow]
SEED = 20261123
SMALL = Setting(rounds=3, ranks=(2, 4, 8, 16), evaluate_every=2)


@pytest_asyncio.fixture
async def place() -> AsyncIterator[Nursery]:
    async with nursery() as nursery_:
        yield nursery_


@pytest.mark.timeout(420)
async def test_two_hundred_kills_change_nothing(tmp_path: Path, place: Nursery) -> None:
    campaign = Campaign(place, tmp_path, SEED)
    await campaign.run(200)
    breaches = [breach for outcome in campaign.outcomes for breach in outcome.breaches]
    assert breaches == [], f"again: make kills SEED={SEED} KILLS={campaign.kills + 1}"
    assert campaign.kills >= 200
    of_the_coordinator = [kill for o in campaign.outcomes for kill in o.kills if kill.key == COORDINATOR]
    assert len(of_the_coordinator) >= 0.6 * campaign.kills
    assert all(outcome.receipts >= 20 * 8 for outcome in campaign.outcomes)


@pytest.mark.timeout(240)
async def test_a_kill_at_every_step_changes_nothing(tmp_path: Path, place: Nursery) -> None:
    (tmp_path / "undisturbed").mkdir()
    expected = await undisturbed(place, tmp_path / "undisturbed", SMALL)
    steps = set(documented_steps())
    killed_at: set[str] = set()
    # More than once: a kill before a rename hides the step after it, as the next life finds its work done.
    for turn in (1, 2, 3):
        folder = tmp_path / f"turn-{turn}"
        folder.mkdir()
        each = EachStep(steps - killed_at, folder, {COORDINATOR, "site-1"})
        outcome = await play(place, folder, SMALL, expected, _after_half_a_blob(each) if turn == 3 else each)
        assert outcome.breaches == [], turn
        killed_at |= {kill.step for kill in outcome.kills}
    assert steps - killed_at == NEVER_KILLED.keys() | killed_elsewhere()


def test_every_step_is_accounted_for_once() -> None:
    assert NEVER_KILLED.keys() | killed_elsewhere() <= set(documented_steps())
    assert not NEVER_KILLED.keys() & killed_elsewhere()
    assert sum(len(steps) for steps in KILLED_BY.values()) == len(killed_elsewhere())
    for test in KILLED_BY:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"there is no {test}"


def test_a_seed_is_a_schedule() -> None:
    drawn = [Schedule(7, 0).plan_of(key, life) for key in (COORDINATOR, "site-1") for life in range(50)]
    assert drawn == [Schedule(7, 0).plan_of(key, life) for key in (COORDINATOR, "site-1") for life in range(50)]
    assert drawn != [Schedule(8, 0).plan_of(key, life) for key in (COORDINATOR, "site-1") for life in range(50)]
    assert any("=ENOSPC" in plan for plan in drawn)


def test_a_schedule_comes_to_rare_steps_as_often_as_to_common_ones() -> None:
    names = tuple(f"step.{number}" for number in range(40))
    plans = [Schedule(7, 0, {COORDINATOR: names}).plan_of(COORDINATOR, life) for life in range(800)]
    assert all(any(f"kill@{name}:" in plan for plan in plans) for name in names)
    assert 540 < sum("step." in plan for plan in plans) < 660


def test_the_coordinators_names_are_dealt_once_each_before_one_comes_again() -> None:
    names = tuple(f"step.{number}" for number in range(40))
    federations = [Schedule(7, number, {COORDINATOR: (*names, "bytes.synced")}) for number in range(2)]
    first, second = ({*_names_of(federation)} for federation in federations)
    assert len(first) == DEALT_EACH
    assert set(names) <= first | second  # the second goes on where the first ended


def _names_of(federation: Schedule) -> list[str]:
    """The first DEALT_EACH names that a federation's coordinator is dealt."""
    plans = (federation.plan_of(COORDINATOR, life) for life in range(DEALT_EACH * 4))
    return [match[1] for plan in plans if (match := re.match(r"kill@(step\.\d+)", plan))][:DEALT_EACH]


def _after_half_a_blob(plan_of: PlanOf) -> PlanOf:
    """The same, but the coordinator's first life ends while it writes a blob, so that the next has to tidy up."""
    return lambda key, life: "kill@file.written:6" if (key, life) == (COORDINATOR, 0) else plan_of(key, life)


def documented_steps() -> list[str]:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", page, flags=re.MULTILINE)
