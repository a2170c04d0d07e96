"""A whole experiment: which runs are still to be done, doing them in several processes, and the merged tables.

May be interrupted at any time; the same call again goes on. A run that fails is named and costs no other. torch is
loaded by the processes alone, and only if anything is left to run. Nothing is written into a folder whose runs have
other settings, and two calls never write into one folder.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.errors import ConfigError, RafloraError, StateInUse
from common.transfer import write_durably
from coordinator.stores.lock import StateLock, lock_state_folder
from simulation.crew import Crew, Encoded, Failed, Place, Prepare, Ready, material_of
from simulation.experiment import ExperimentConfig
from simulation.results import Results, RunKey, RunRow, read_results, write_results
from simulation.run import Progress, settings_of
from simulation.run_store import FINISHED_FILE, SETTINGS_FILE, finished_results
from simulation.schedule import Choice, RunPlan, best_plans, choices_of, first_plans, twin_of

EXPERIMENT_FILE = "experiment.json"
WRITE_SECONDS = 30.0  # between two writings of the merged tables, which grow with every run


class RunsFailed(RafloraError):
    """Not one run could be carried out."""

    reason = "runs_failed"


class Audience(Protocol):
    """Who is told how far an experiment is."""

    def planned(self, plans: Sequence[RunPlan], already: int) -> None:
        """So many more runs are to be done; of them `already` lie there from an earlier time."""
        ...

    def preparing(self, done: int, total: int) -> None:
        """Texts are encoded; (0, 0) while model and data are only being loaded."""
        ...

    def started(self, plan: RunPlan) -> None:
        """A process begins with a run."""
        ...

    def moved(self, plan: RunPlan, progress: Progress) -> None:
        """It is so far."""
        ...

    def finished(self, plan: RunPlan, row: RunRow, accuracy: float) -> None:
        """It has ended, with this accuracy at the global rank (nan if none was measured)."""
        ...

    def failed(self, plan: RunPlan, sentence: str) -> None:
        """It could not be carried out."""
        ...


@dataclass(frozen=True)
class Outcome:
    """Everything that an experiment came to."""

    results: Results
    choices: tuple[Choice, ...]
    failures: tuple[tuple[RunPlan, str], ...]  # with the reason


def run_experiment(experiment: ExperimentConfig, place: Place, jobs: int, audience: Audience) -> Outcome:
    """Carries out all runs that are not done yet, `jobs` at a time; the tables in the folder grow with them.

    Raises ConfigError for a folder of another experiment or one that another call writes to, RunsFailed if not a
    single run could be carried out.
    """
    plans = first_plans(experiment)
    with _locked(place.folder):
        finished = _finished_before(experiment, plans, place)
        _write_experiment(experiment, place.folder)
        with Crew(place, jobs) as crew:
            stage = _Work(crew, place, audience, finished)
            try:
                stage.carry_out(plans)
                choices = choices_of(experiment, stage.results)
                later = [(plan, twin_of(plan, plans)) for plan in best_plans(experiment, choices)]
                stage.copy((plan, twin) for plan, twin in later if twin is not None)
                stage.carry_out([plan for plan, twin in later if twin is None])
            finally:
                write_results(stage.results, place.folder)
    if stage.failures and not stage.results.runs:
        plan, sentence = stage.failures[0]
        raise RunsFailed(f"not one run could be carried out; {name_of(plan)}: {sentence}")
    return Outcome(stage.results, choices, tuple(stage.failures))


def read_experiment(folder: Path) -> ExperimentConfig | None:
    """The settings with which a results folder was last written; None if it is none, or another version's."""
    try:
        return ExperimentConfig.model_validate_json((folder / EXPERIMENT_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def read_outcome(folder: Path) -> tuple[ExperimentConfig, Outcome]:
    """What an earlier run left in a results folder. Raises ConfigError if it is none."""
    try:
        experiment = ExperimentConfig.model_validate_json((folder / EXPERIMENT_FILE).read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no results of `raflora simulate` ({EXPERIMENT_FILE} is missing)") from None
    except ValueError as error:
        raise ConfigError(f"{folder / EXPERIMENT_FILE}: not what this version of raflora writes: {error}") from None
    results = read_results(folder)
    return experiment, Outcome(results, choices_of(experiment, results), ())


def missing_runs(experiment: ExperimentConfig, outcome: Outcome) -> tuple[RunPlan, ...]:
    """What has no row yet, whether it failed or its turn has not come."""
    there = {run.key for run in outcome.results.runs}
    plans = (*first_plans(experiment), *best_plans(experiment, outcome.choices))
    return tuple(plan for plan in plans if plan.key not in there)


def name_of(plan: RunPlan) -> str:
    """A run in words: "raflora, seed 0", "raflora, seed 100, rate 0.01 constant (tuning)"."""
    key = plan.key
    at = "" if key.stage == "same" else f", rate {key.learning_rate:g} {key.decay} ({key.stage})"
    return f"{key.arm}, seed {key.seed}{at}"


@dataclass
class _Work:
    """The runs of an experiment as they are done."""

    crew: Crew
    place: Place
    audience: Audience
    finished: Mapping[RunKey, Results]  # by an earlier call
    results: Results = field(default_factory=Results)
    failures: list[tuple[RunPlan, str]] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)  # when the tables were

    def carry_out(self, plans: Sequence[RunPlan]) -> None:
        """Reads what is finished, and has the crew do the rest."""
        if not plans:
            return
        waiting: deque[RunPlan] = deque()
        for plan in plans:
            found = self.finished.get(plan.key)
            if found is None:
                waiting.append(plan)
            else:
                self.results += found
        self.audience.planned(plans, len(plans) - len(waiting))
        for group in _by_material(waiting):
            if self._prepared(group):
                self._played(deque(group))

    def copy(self, twins: Iterable[tuple[RunPlan, RunPlan]]) -> None:
        """Shows the rows of runs that were done already under the stage "best", too."""
        for plan, twin in twins:
            self.results += self.results.of_key(twin.key).renamed(plan.key)

    def _prepared(self, plans: Sequence[RunPlan]) -> bool:
        """One process makes model and data ready, so that the others find everything there."""
        member = self.crew.idle()
        assert member is not None, "nobody is busy between two groups"  # noqa: S101
        self.audience.preparing(0, 0)
        member.give(Prepare(plans[0].experiment))
        while True:
            for _, news in self.crew.news():
                match news:
                    case Encoded():
                        self.audience.preparing(news.done, news.total)
                    case Ready():
                        return True
                    case Failed():
                        for plan in plans:
                            self.failures.append((plan, news.sentence))
                        self.audience.failed(plans[0], news.sentence)
                        return False

    def _played(self, waiting: deque[RunPlan]) -> None:
        playing = 0
        while waiting or playing:
            while waiting and (member := self.crew.idle()) is not None:
                plan = waiting.popleft()
                member.give(plan)
                self.audience.started(plan)
                playing += 1
            for order, news in self.crew.news():
                assert isinstance(order, RunPlan), "what had to be prepared is"  # noqa: S101
                match news:
                    case Progress():
                        self.audience.moved(order, news)
                    case RunRow():
                        playing -= 1
                        self._add(order, news)
                    case Failed():
                        playing -= 1
                        self.failures.append((order, news.sentence))
                        self.audience.failed(order, news.sentence)

    def _add(self, plan: RunPlan, row: RunRow) -> None:
        self.results += read_results(self.place.of_run(plan))
        if time.monotonic() - self.written > WRITE_SECONDS:
            write_results(self.results, self.place.folder)
            self.written = time.monotonic()
        self.audience.finished(plan, row, final_accuracy(self.results, row))


def final_accuracy(results: Results, row: RunRow) -> float:
    """A run's accuracy after its last round at its global rank, on the split of its stage; nan if it has none."""
    at = (row.key, row.rounds, row.global_rank)
    return next((each.accuracy for each in results.accuracy if (each.key, each.round, each.rank) == at), math.nan)


def _finished(plan: RunPlan, folder: Path) -> Results | None:
    """The rows of a run that an earlier call finished. Raises ConfigError if it, or a begun one, had other settings."""
    if not (folder / SETTINGS_FILE).exists():
        return None
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_bytes())
        population = settings["population"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}: not what raflora wrote; delete it, or name another --out") from None
    # How the data was divided is not known before it has been read; everything else must be as it was.
    wanted = settings_of(plan, ()) | {"population": population}
    if not (folder / FINISHED_FILE).exists() and settings != json.loads(json.dumps(wanted)):
        raise ConfigError(f"{folder}: holds a begun run with other settings; delete it, or name another --out")
    return finished_results(folder, wanted)


def _finished_before(experiment: ExperimentConfig, plans: Sequence[RunPlan], place: Place) -> Mapping[RunKey, Results]:
    """What earlier calls have finished, read before anything is written. Raises ConfigError for other settings."""
    found: dict[RunKey, Results] = {}

    def read(some: Sequence[RunPlan]) -> None:
        for plan in some:
            if (results := _finished(plan, place.of_run(plan))) is not None:
                found[plan.key] = results

    try:
        read(plans)
        read(best_plans(experiment, choices_of(experiment, sum(found.values(), Results()))))
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The folder of all results is {place.folder}: name another (simulate --out, compare --results), "
            "give the experiment another name (--set name=...), or delete it"
        ) from None
    return found


def _locked(folder: Path) -> StateLock:
    folder.mkdir(parents=True, exist_ok=True)  # results are for others to read; a coordinator's folder would not be
    try:
        return lock_state_folder(folder)
    except StateInUse:
        raise ConfigError(
            f"another `raflora simulate` writes to {folder}; wait for it, or name another --out"
        ) from None


def _by_material(plans: Iterable[RunPlan]) -> Iterable[list[RunPlan]]:
    """Runs on the same model and data together, so that a process seldom has to load anew."""
    groups: dict[str, list[RunPlan]] = {}
    for plan in plans:
        groups.setdefault(material_of(plan.experiment), []).append(plan)
    return groups.values()


def _write_experiment(experiment: ExperimentConfig, folder: Path) -> None:
    write_durably(folder / EXPERIMENT_FILE, (experiment.model_dump_json(indent=2) + "\n").encode())
