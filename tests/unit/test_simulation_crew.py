"""Processes that play runs: what a death costs, and what is read instead of run again."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import ConfigError
from coordinator.stores.lock import lock_state_folder
from simulation.crew import Crew, Failed, Place, Prepare, material_of
from simulation.experiment import ExperimentConfig
from simulation.results import RunRow
from simulation.run import Progress, settings_of
from simulation.runner import name_of, read_outcome, run_experiment
from simulation.schedule import RunPlan, first_plans

EXPERIMENT = ExperimentConfig.model_validate(
    {
        "name": "tiny",
        "seeds": [0],
        "model": {"path": "digits", "task": "image-classification"},
        "data": {"train": "digits", "test": "digits"},
        "clients": {"count": 4, "ranks": [2, 4], "per_round": 2},
        "rounds": {"num_rounds": 3},
        "training": {"learning_rate": 0.01},
        "arms": [{"name": "ours"}, {"name": "other data", "set": {"data.max_train": 99}}],
        "tuning": {"learning_rates": [0.1], "seeds": [100]},
    }
)


class Silent:
    """An audience that nobody asks."""

    def planned(self, plans: Sequence[RunPlan], already: int) -> None: ...
    def preparing(self, done: int, total: int) -> None: ...
    def started(self, plan: RunPlan) -> None: ...
    def moved(self, plan: RunPlan, progress: Progress) -> None: ...
    def finished(self, plan: RunPlan, row: RunRow, accuracy: float) -> None: ...
    def failed(self, plan: RunPlan, sentence: str) -> None: ...


def place(folder: Path) -> Place:
    return Place(folder, folder / "results", folder / "cache")


def test_a_process_that_dies_costs_its_order_and_is_replaced(tmp_path: Path) -> None:
    with Crew(place(tmp_path), size=1) as crew:
        member = crew.idle()
        assert member is not None
        member.process.kill()
        order = Prepare(EXPERIMENT)
        member.give(order)
        found = []
        while not found:  # each look waits a moment, and the whole test has its time limit
            found = list(crew.news())
        assert found == [(order, Failed(f"its process ended with exit code -9; see {member.log}"))]
        another = crew.idle()
        assert another is not None
        assert another is not member


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    with Crew(place(tmp_path), size=1) as crew:
        member = crew.idle()
        assert member is not None
    assert not member.process.is_alive()


def test_a_busy_crew_takes_nobody_on(tmp_path: Path) -> None:
    with Crew(place(tmp_path), size=1) as crew:
        member = crew.idle()
        assert member is not None
        member.process.kill()  # whatever becomes of its order, nobody else gets one meanwhile
        member.give(Prepare(EXPERIMENT))
        assert crew.idle() is None


def test_a_process_that_says_nothing_is_ended(tmp_path: Path) -> None:
    with Crew(place(tmp_path), size=1, silence_seconds=0.0) as crew:
        member = crew.idle()
        assert member is not None
        assert member.process.pid is not None
        os.kill(member.process.pid, signal.SIGSTOP)
        order = Prepare(EXPERIMENT)
        member.give(order)
        ((about, news),) = crew.news()
        assert about == order
        assert isinstance(news, Failed)
        assert "said nothing for" in news.sentence
        assert not member.process.is_alive()
        assert crew.members == []


def test_every_process_has_a_log_of_its_own_also_one_that_replaces_another(tmp_path: Path) -> None:
    with Crew(place(tmp_path), size=2) as crew:
        first, second = crew.idle(), None
        assert first is not None
        first.give(Prepare(EXPERIMENT))
        second = crew.idle()
        assert second is not None
        first.process.kill()
        while first in crew.members:
            list(crew.news())
        second.order = Prepare(EXPERIMENT)
        third = crew.idle()
        assert third is not None
        assert len({first.log, second.log, third.log}) == 3


def test_a_folder_of_other_settings_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    here = place(tmp_path)
    run = here.of_run(first_plans(EXPERIMENT)[0])
    run.mkdir(parents=True)
    settings = settings_of(first_plans(EXPERIMENT)[0], ())
    (run / "settings.json").write_text(json.dumps(settings | {"method": "another"}), encoding="utf-8")
    (here.folder / "experiment.json").write_text("before", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other settings.*The folder of all results is .*results.*--results"):
        run_experiment(EXPERIMENT, here, 1, Silent())
    assert (here.folder / "experiment.json").read_text(encoding="utf-8") == "before"


def test_two_calls_never_write_into_one_folder(tmp_path: Path) -> None:
    here = place(tmp_path)
    with (
        lock_state_folder(here.folder),
        pytest.raises(ConfigError, match="another `raflora simulate` writes to"),
    ):
        run_experiment(EXPERIMENT, here, 1, Silent())


def test_runs_on_other_data_need_other_material() -> None:
    ours, other, *_ = first_plans(EXPERIMENT)
    assert material_of(ours.experiment) == material_of(EXPERIMENT)
    assert material_of(other.experiment) != material_of(ours.experiment)


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [place(tmp_path).of_run(plan) for plan in first_plans(EXPERIMENT)]
    assert folders[0] == tmp_path / "results" / "runs" / "same" / "ours_0.01_linear_0"
    assert len(set(folders)) == len(folders)


def test_a_run_has_a_name_in_words() -> None:
    plans = first_plans(EXPERIMENT)
    assert name_of(plans[0]) == "ours, seed 0"
    assert name_of(plans[2]) == "ours, seed 100, rate 0.1 linear (tuning)"


def test_a_folder_without_an_experiment_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results of `raflora simulate`"):
        read_outcome(tmp_path)
    (tmp_path / "experiment.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"experiment\.json: not what this version"):
        read_outcome(tmp_path)
