"""One run from its plan to its rows: founds or resumes its federation, evaluates, writes everything down.

Evaluations are made before a round is published and stand in its record, so a run's rows follow from its journal
alone, whether it was interrupted or not. Nothing here imports torch: `play` in play.py brings the real model.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, NotFinite, WrongRank
from coordinator.aggregation.methods import make_method
from coordinator.config import (
    AdapterConfig,
    AggregationConfig,
    BaseModelConfig,
    CoordinatorConfig,
    MethodConfig,
    RoundsConfig,
)
from coordinator.federation.state import OpenRound
from coordinator.manifest import Manifest
from simulation.contents import Contents
from simulation.federation import (
    Advance,
    Candidate,
    Evaluations,
    Setup,
    Standing,
    Watching,
    found,
    publish_next,
    slice_of,
)
from simulation.local_work import EvaluationSet, LocalWork, WorkDiverged
from simulation.population import SimulatedClient, make_population
from simulation.results import RunRow
from simulation.rows import results_of
from simulation.run_store import RunStore, finished_results
from simulation.schedule import TUNING, RunPlan

SETTINGS_FORMAT = 2


@dataclass(frozen=True)
class Material:
    """What runs are made of: it depends neither on a seed nor on a method."""

    model: BaseModelConfig
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    train_labels: Sequence[int]
    train_groups: Sequence[str] | None
    contents: Contents
    work: Callable[[int], LocalWork]  # loads the base model, for ranks up to this one


@dataclass(frozen=True)
class Progress:
    """How far a run is; told after every client and after every round."""

    round: int  # published
    num_rounds: int
    clients_done: int  # of the open round
    clients: int
    accuracy: float  # of the last evaluation at the global rank; nan before the first, and if it diverged


OnProgress = Callable[[Progress], None]


def play_on(run: RunPlan, material: Material, folder: Path, on_progress: OnProgress = lambda _: None) -> RunRow:
    """Plays a run to its end, from where its folder says that it stands; a finished one is only read.

    Raises ConfigError if the folder is of a run with other settings or data, InvalidRequest if the data cannot be
    divided as the experiment says, StateInUse if another process plays this run, CorruptStore for a damaged folder.
    """
    _check(run)
    clients, validation = run.experiment.clients, run.experiment.data.validation
    population = make_population(
        material.train_labels, material.train_groups, clients, validation=validation, seed=run.key.seed
    )
    settings = settings_of(run, population, material.contents)
    finished = finished_results(folder, settings)
    if finished is not None:
        return finished.runs[0]
    config = coordinator_config(run, material, population)
    work = material.work(config.adapter.global_rank)
    manifest = Manifest.of(config, work.spec, work.base_model_digest)
    setup = Setup(manifest, population, work, clients.dropout)
    with RunStore(folder, manifest.federation, settings) as store:
        standing = _played(_Onlooker(run, setup, on_progress), store)
        results = results_of(run, setup.manifest, population, standing.state)
        store.finish(results)
    return results.runs[0]


def coordinator_config(run: RunPlan, material: Material, population: Sequence[SimulatedClient]) -> CoordinatorConfig:
    """The settings with which a coordinator would run this federation. Raises ConfigError."""
    experiment, arm = run.experiment, run.arm
    rounds, per_round = experiment.rounds, experiment.clients.per_round
    return CoordinatorConfig(
        name=experiment.name,
        model=material.model,
        adapter=AdapterConfig(
            target_modules=material.target_modules,
            modules_to_save=material.modules_to_save,
            global_rank=max(client.rank for client in population),
        ),
        rounds=RoundsConfig(
            num_rounds=rounds.num_rounds,
            min_clients=per_round,
            fraction=per_round / len(population),
            quorum=rounds.quorum,
            evaluate_every=0,  # evaluated here, on what no client has
            max_failures=1,  # the same work on the same slice would diverge again
            max_clients=max(len(population), 1),
            seed=run.key.seed,
        ),
        aggregation=AggregationConfig(**{name: getattr(arm, name) for name in MethodConfig.model_fields}),
        training=experiment.training.model_copy(
            update={"learning_rate": run.key.learning_rate, "decay": run.key.decay}
        ),
    )


def settings_of(
    run: RunPlan, population: Sequence[SimulatedClient], contents: Contents | None = None
) -> dict[str, Any]:
    """Whatever decides what a run computes, as plain JSON; where the data lies and what else is compared does not.

    What stands under "population" is known only to who has read the data.
    """
    experiment = run.experiment
    divided = hashlib.sha256()
    for client in population:
        divided.update(f"{client.client_id} {client.rank} {client.train.size} {client.validation.size}\n".encode())
        divided.update(client.train.tobytes() + client.validation.tobytes())
    return {
        "format": SETTINGS_FORMAT,
        "run": asdict(run.key),
        "method": asdict(run.arm.options),
        "model": experiment.model.model_dump(mode="json"),
        "data": experiment.data.model_dump(mode="json", exclude={"folder"}),
        "clients": experiment.clients.model_dump(mode="json"),
        "rounds": experiment.rounds.model_dump(mode="json"),
        "training": experiment.training.model_dump(mode="json"),
        "population": {"division": divided.hexdigest(), **(asdict(contents) if contents else {})},
    }


def _check(run: RunPlan) -> None:
    make_method(run.arm.options)
    if run.key.stage == TUNING and run.experiment.data.validation == 0.0:
        raise ConfigError("tuning is judged on the clients' validation parts: set data.validation above 0")


def _played(onlooker: "_Onlooker", store: RunStore) -> Standing:
    """The run's last standing; every round is durable before the next one begins."""
    setup = onlooker.setup
    standing = store.standing(setup.manifest)
    if standing is None:
        try:
            standing = _committed(store, found(setup))
        except WrongRank as error:
            raise ConfigError(f"clients.ranks: {error}") from None
    while not standing.is_over:
        standing = _committed(store, publish_next(setup, standing, onlooker.watching))
        onlooker.published(standing)
    return standing


def _committed(store: RunStore, advance: Advance) -> Standing:
    store.commit(advance)
    return advance.standing


class _Onlooker:
    """Evaluates what a run is about to publish, and tells how far it is."""

    def __init__(self, run: RunPlan, setup: Setup, on_progress: OnProgress) -> None:
        self.setup = setup
        self.watching = Watching(self._evaluated, self._trained)
        self._run = run
        self._on_progress = on_progress
        self._accuracy = math.nan

    def published(self, standing: Standing) -> None:
        opened = standing.state.open
        invited = len(opened.assignments) if opened is not None else 0
        self._tell(standing.state.round, 0, invited)

    def _trained(self, opened: OpenRound, done: int) -> None:
        self._tell(opened.number - 1, done, len(opened.assignments))

    def _tell(self, number: int, done: int, invited: int) -> None:
        num_rounds = self.setup.manifest.rounds.num_rounds
        self._on_progress(Progress(number, num_rounds, done, invited, self._accuracy))

    def _evaluated(self, candidate: Candidate) -> Evaluations:
        """The evaluations that are due with this round."""
        examples, ranks = self._due(candidate.number)
        if not ranks:
            return Evaluations()
        manifest, work = self.setup.manifest, self.setup.work
        work.put_base(candidate.base)
        measured, diverged = {}, []
        for rank in ranks:
            try:
                received = slice_of(manifest, candidate.adapter, rank).adapter
                measured[rank] = work.evaluate(received, examples, scaling=manifest.scaling(rank))
            except (WorkDiverged, NotFinite):
                diverged.append(rank)
        at_global_rank = measured.get(manifest.adapter.global_rank)
        self._accuracy = at_global_rank.accuracy if at_global_rank else math.nan
        return Evaluations(
            accuracy=tuple({"split": examples.split, "rank": rank, **asdict(each)} for rank, each in measured.items()),
            diverged_ranks=tuple(diverged),
        )

    def _due(self, number: int) -> tuple[EvaluationSet, tuple[int, ...]]:
        """What is evaluated after a round, and at which ranks."""
        manifest, population = self.setup.manifest, self.setup.population
        global_rank, is_last = manifest.adapter.global_rank, number == manifest.rounds.num_rounds
        if self._run.key.stage == TUNING:
            held_out = np.sort(np.concatenate([client.validation for client in population]))
            return EvaluationSet("validation", held_out), (global_rank,) if is_last else ()
        if is_last:
            return EvaluationSet("test"), tuple(sorted({client.rank for client in population}))
        is_due = number % self._run.experiment.rounds.evaluate_every == 0
        return EvaluationSet("test"), (global_rank,) if is_due else ()
