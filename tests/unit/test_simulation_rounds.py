"""Inside a simulated round: who trains, what is uploaded and charged, what is evaluated, and what goes wrong."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_site import SPEC, NumpyWork, journal_of, material_on, run_plan

from common.adapter import Adapter, Factors
from common.codec import Layout, digest_of, encode
from common.errors import ConfigError
from coordinator.federation.events import AdapterPublished, RankSet, RoundOpened, TaskFailed, UpdateAccepted
from simulation.federation import has_diverged
from simulation.local_work import Evaluated, EvaluationSet, LocalTask, Trained, WorkDiverged
from simulation.population import make_population
from simulation.results import Results, read_results
from simulation.run import Progress, play_on
from simulation.schedule import RunPlan

PRUNING = {"method": "hetlora", "prune_share": 0.5, "prune_penalty": 0.05}


def results_of(plan: RunPlan, folder: Path, work: NumpyWork) -> Results:
    play_on(plan, material_on(work), folder)
    return read_results(folder)


# ------------------------------------------------------------ who takes part


def test_the_run_s_seed_draws_the_population(tmp_path: Path) -> None:
    work, plan = NumpyWork(), run_plan(clients__per_round=12)

    def ranks(seed: int) -> dict[str, int]:
        clients = make_population(work.train_labels, None, plan.experiment.clients, validation=0.2, seed=seed)
        return {client.client_id: client.rank for client in clients}

    results_of(plan, tmp_path, work)
    assert dict(work.trained) == ranks(plan.key.seed) != ranks(0)


def test_each_attempt_of_a_round_draws_anew_who_drops_out(tmp_path: Path) -> None:
    # Both of two clients must answer; who dropped out of an attempt for ever would end the federation.
    plan = run_plan(
        clients__count=2, clients__per_round=2, clients__ranks=[2], clients__dropout=0.3, rounds__quorum=1.0
    )
    results = results_of(plan, tmp_path, NumpyWork())
    opened = [event for event in journal_of(tmp_path) if isinstance(event, RoundOpened)]
    assert results.runs[0].status == "finished"
    assert max(event.attempt for event in opened) > 1, "with this seed somebody drops out at least once"


def test_another_setting_of_the_training_is_another_run(tmp_path: Path) -> None:
    class Interrupted(NumpyWork):
        def train(self, task: LocalTask) -> Trained:
            if len(self.trained) == 8:
                raise KeyboardInterrupt
            return super().train(task)

    with pytest.raises(KeyboardInterrupt):
        play_on(run_plan(), material_on(Interrupted()), tmp_path)
    with pytest.raises(ConfigError, match=r"training\.local_steps was 3, now it is 4"):
        play_on(run_plan(training__local_steps=4), material_on(NumpyWork()), tmp_path)
    with pytest.raises(ConfigError, match=r"training\.batch_size was .*, now it is 5"):
        play_on(run_plan(training__batch_size=5), material_on(NumpyWork()), tmp_path)


# ------------------------------------------------------------ what is uploaded


class Remembering(NumpyWork):
    """Keeps what each client trained."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, list[Adapter]] = {}

    def train(self, task: LocalTask) -> Trained:
        trained = super().train(task)
        self.adapters.setdefault(task.client.client_id, []).append(trained.adapter)
        return trained


def without_directions_from(adapter: Adapter, rank: int) -> Adapter:
    lora_A, lora_B = adapter.modules["dense"].lora_A.copy(), adapter.modules["dense"].lora_B.copy()
    lora_A[rank:], lora_B[:, rank:] = 0.0, 0.0
    return Adapter({"dense": Factors(lora_A, lora_B)}, adapter.tensors)


@dataclass
class PlayedRound:
    """What the journal says of one round."""

    uploads: dict[str, str] = field(default_factory=dict)  # by client, the digest
    pruned: dict[str, int] = field(default_factory=dict)  # by client, the rank at which it goes on


def pruning_rounds(folder: Path, work: Remembering) -> list[PlayedRound]:
    """Plays rounds in which all clients train and some prune themselves."""
    results_of(run_plan(method=PRUNING, clients__per_round=12, rounds__num_rounds=6), folder, work)
    rounds = [PlayedRound()]
    for event in journal_of(folder):
        match event:
            case UpdateAccepted(client_id=client, update=update):
                rounds[-1].uploads[client] = update.digest
            case RankSet(client_id=client, rank=rank):
                rounds[-1].pruned[client] = rank
            case AdapterPublished():
                rounds.append(PlayedRound())
    assert any(0 < len(each.pruned) < 12 for each in rounds)
    return rounds[:-1]


def test_who_prunes_itself_uploads_nothing_of_what_it_cut_off(tmp_path: Path) -> None:
    work = Remembering()
    for number, played in enumerate(pruning_rounds(tmp_path, work)):
        for client, digest in played.uploads.items():
            trained = work.adapters[client][number]
            left = without_directions_from(trained, played.pruned.get(client, trained.rank))
            assert digest == digest_of(encode(left))


def test_who_prunes_itself_pays_for_what_is_left(tmp_path: Path) -> None:
    work = Remembering()
    rounds = pruning_rounds(tmp_path, work)
    for number, (played, row) in enumerate(zip(rounds, read_results(tmp_path).rounds, strict=True)):
        granted = {client: adapters[number].rank for client, adapters in work.adapters.items()}
        assert row.download_bytes == sum(Layout(SPEC, rank).size_bytes for rank in granted.values())
        assert row.upload_bytes == sum(Layout(SPEC, rank).size_bytes for rank in (granted | played.pruned).values())


def test_numbers_that_a_coordinator_refuses_are_refused_here(tmp_path: Path) -> None:
    class Huge(NumpyWork):
        def train(self, task: LocalTask) -> Trained:
            trained = super().train(task)
            if task.client.client_id != "client-0003":
                return trained
            return replace(trained, adapter=Adapter(trained.adapter.modules, {"bias": np.full(8, 1.1e4, np.float32)}))

    results = results_of(run_plan(clients__per_round=12, rounds__num_rounds=1), tmp_path, Huge())
    (failure,) = [event for event in journal_of(tmp_path) if isinstance(event, TaskFailed)]
    assert failure.client_id == "client-0003"
    assert failure.failure.startswith("out_of_bounds: client-0003: bias holds 11000.0 at index 0; at most 10000")
    assert [row.contributors for row in results.rounds] == [11]


# ------------------------------------------------------------ what is evaluated


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_round_is_evaluated_on_the_base_that_it_leaves_behind(method: str, tmp_path: Path) -> None:
    class Watched(NumpyWork):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, NDArray[np.float64]]] = []

        def train(self, task: LocalTask) -> Trained:
            self.seen.append(("train", self.weight.copy()))
            return super().train(task)

        def evaluate(self, adapter: Adapter, examples: EvaluationSet, *, scaling: float) -> Evaluated:
            self.seen.append(("evaluate", self.weight.copy()))
            return super().evaluate(adapter, examples, scaling=scaling)

    work = Watched()
    results_of(run_plan(method={"method": method}, rounds__evaluate_every=1), tmp_path, work)
    changes = [(before, after) for before, after in pairwise(work.seen) if before[0] != after[0]]
    assert [before[0] for before, _ in changes] == ["train", "evaluate"] * 3 + ["train"]
    for (before, old), (_, new) in changes:
        assert np.array_equal(old, new) == (before == "evaluate"), "the next round trains on what was evaluated"


class Blurred(NumpyWork):
    """Evaluations of some ranks come to no finite number from a round on."""

    def __init__(self, ranks: set[int], evaluations_before: int = 0) -> None:
        super().__init__()
        self._ranks, self._left = ranks, evaluations_before

    def evaluate(self, adapter: Adapter, examples: EvaluationSet, *, scaling: float) -> Evaluated:
        self._left -= 1
        if adapter.rank in self._ranks and self._left < 0:
            raise WorkDiverged("the loss is nan")
        return super().evaluate(adapter, examples, scaling=scaling)


def test_a_last_evaluation_that_is_not_finite_is_the_run_s_end(tmp_path: Path) -> None:
    told: list[Progress] = []
    row = play_on(run_plan(), material_on(Blurred({4, 8}, evaluations_before=1)), tmp_path, told.append)
    assert row.status == "diverged: the evaluation after round 4 is not finite at rank 4, 8"
    assert [(each.round, each.rank) for each in read_results(tmp_path).accuracy] == [(2, 8), (4, 2)]
    assert math.isnan(told[-1].accuracy), "the older one is not the run's accuracy any more"
    assert not math.isnan(told[-2].accuracy)
    assert read_results(tmp_path).runs == (row,)


def test_an_evaluation_that_recovers_ends_nothing(tmp_path: Path) -> None:
    class Once(NumpyWork):
        evaluations = 0

        def evaluate(self, *arguments: Any, **more: Any) -> Evaluated:
            self.evaluations += 1
            if self.evaluations == 1:
                raise WorkDiverged("the loss is nan")
            return super().evaluate(*arguments, **more)

    results = results_of(run_plan(), tmp_path, Once())
    assert results.runs[0].status == "finished"
    assert {row.round for row in results.accuracy} == {4}


def test_a_tuning_run_whose_evaluation_diverges_says_so(tmp_path: Path) -> None:
    results = results_of(run_plan(stage="tuning"), tmp_path, Blurred({8}))
    assert results.runs[0].status == "diverged: the evaluation after round 4 is not finite at rank 8"
    assert results.accuracy == ()


@pytest.mark.parametrize(
    ("reason", "diverged"),
    [
        ("only 1 of 2 updates, and too many clients failed: ada (diverged: the loss is nan)", True),
        ("only 1 of 2 updates, and too many clients failed: ada (out_of_bounds: ada: bias holds 1e5)", True),
        ("the aggregation failed: not_finite: dense: the product is beyond float32", True),
        ("the aggregation failed: LinAlgError: SVD did not converge", False),
        ("only 1 of 2 updates after the deadline was extended once", False),
        ("", False),
    ],
)
def test_diverging_is_told_from_not_answering(reason: str, diverged: bool) -> None:
    assert has_diverged(reason) == diverged
