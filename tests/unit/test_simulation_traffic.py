"""What a client downloads to follow a base that changes: everything it missed, once, also after a resumption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_site import CLASSES, FEATURES, SPEC, NumpyWork, journal_of, material_on, run_plan

from common.codec import Layout
from coordinator.federation.events import AdapterPublished, RoundOpened, TaskClaimed
from simulation.results import RoundRow, read_results
from simulation.run import play_on
from simulation.schedule import RunPlan
from simulation.traffic import BaseDownloads

PUBLISHED = ('{"simulation": {"newest_change_bytes": 10}}', '{"simulation": {"newest_change_bytes": 20}}')
LARGE = {"dense": np.zeros((100, 100))}
WHOLE_BASE = 4 * CLASSES * FEATURES


def after_two_rounds() -> BaseDownloads:
    """Two rounds are published, and ada took part in the second: she has the change of the first."""
    first = BaseDownloads().after(AdapterPublished("", PUBLISHED[0], 0.0), 0)
    return first.after(TaskClaimed("ada", 1, ""), 1).after(AdapterPublished("", PUBLISHED[1], 0.0), 1)


def test_a_client_fetches_every_change_that_it_missed() -> None:
    downloads = after_two_rounds()
    assert (downloads.missed_bytes("ada", LARGE), downloads.missed_bytes("bob", LARGE)) == (20, 30)
    assert downloads.after(TaskClaimed("bob", 2, ""), 2).missed_bytes("bob", LARGE) == 0


def test_the_changed_weights_themselves_are_never_dearer_than_that() -> None:
    small = {"dense": np.zeros((2, 3))}
    assert after_two_rounds().missed_bytes("bob", small) == 24
    assert after_two_rounds().missed_bytes("ada", small) == 20


def test_methods_that_leave_the_base_alone_cost_nothing_more() -> None:
    published = AdapterPublished("", '{"simulation": {"newest_change_bytes": 0}}', 0.0)
    downloads = BaseDownloads().after(published, 0).after(TaskClaimed("ada", 1, ""), 1)
    assert downloads.followed == {}
    assert downloads.missed_bytes("bob", {}) == 0


def plan_of_one_a_round(method: str) -> RunPlan:
    """Changes of rank 1, so that one is less than the whole base and two are more."""
    return run_plan(
        method={"method": method},
        clients__count=3,
        clients__per_round=1,
        clients__ranks=[1],
        rounds__num_rounds=10,
        clients__dropout=0.3,
        rounds__quorum=1.0,
    )


def downloads_told_by(folder: Path) -> list[int]:
    """A reference: every round's downloads, from the journal's claims alone."""
    slice_bytes = Layout(SPEC, 1).size_bytes
    sizes: list[int] = []
    has: dict[str, int] = {}
    totals, now = [], 0
    for event in journal_of(folder):
        match event:
            case TaskClaimed(client_id=client):
                now += slice_bytes + min(WHOLE_BASE, sum(sizes[has.get(client, 0) :]))
                has[client] = len(sizes)
            case AdapterPublished(report_json=report):
                sizes.append(json.loads(report)["simulation"]["newest_change_bytes"])
                totals.append(now)
                now = 0
            case RoundOpened(attempt=attempt):
                assert attempt <= 3
    return totals


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_run_charges_what_its_journal_says(method: str, tmp_path: Path) -> None:
    play_on(plan_of_one_a_round(method), material_on(NumpyWork()), tmp_path)
    found = [row.download_bytes for row in read_results(tmp_path).rounds]
    assert found == downloads_told_by(tmp_path)
    beside_the_slice = {each - Layout(SPEC, 1).size_bytes for each in found}
    assert WHOLE_BASE in beside_the_slice
    if method == "flora":
        assert any(0 < each < WHOLE_BASE for each in beside_the_slice), "who took part just before has little to fetch"


def test_a_resumed_run_charges_the_same(tmp_path: Path) -> None:
    class Interrupted(NumpyWork):
        def train(self, task: Any) -> Any:
            if len(self.trained) == 5:
                raise KeyboardInterrupt
            return super().train(task)

    def rounds(name: str) -> tuple[RoundRow, ...]:
        return read_results(tmp_path / name).rounds

    plan = plan_of_one_a_round("flora")
    play_on(plan, material_on(NumpyWork()), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        play_on(plan, material_on(Interrupted()), tmp_path / "cut")
    play_on(plan, material_on(NumpyWork()), tmp_path / "cut")
    assert rounds("cut") == rounds("whole")
