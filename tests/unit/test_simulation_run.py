"""A whole simulated run without torch: who trains, what is evaluated, what stands in the rows, how it ends."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_site import FEATURES, NumpyWork, journal_of, material_on, run_plan

from common.errors import ConfigError
from coordinator.federation.events import RoundOpened, TaskFailed
from simulation.local_work import LocalTask, Trained, WorkDiverged
from simulation.results import Results, read_results
from simulation.run import Progress, play_on
from simulation.schedule import RunPlan

METHODS = [
    "fedit",
    "hetlora",
    "flexlora",
    "flora",
    "ffa-lora",
    "fedex-lora",
    "rb-lora",
    "replication",
    "florist",
    "raflora",
]


def results_of(plan: RunPlan, folder: Path, work: NumpyWork | None = None) -> Results:
    row = play_on(plan, material_on(work or NumpyWork()), folder)
    results = read_results(folder)
    assert results.runs == (row,)
    return results


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, tmp_path: Path) -> None:
    results = results_of(run_plan(method={"method": method}, rounds__num_rounds=6), tmp_path)
    (run,) = results.runs
    assert (run.status, run.rounds, run.method) == ("finished", 6, method)
    losses = [row.train_loss for row in results.rounds]
    assert losses[-1] < losses[0] - 0.1
    assert [row.round for row in results.rounds] == [1, 2, 3, 4, 5, 6]
    assert {row.round: row.contributors for row in results.rounds} == dict.fromkeys(range(1, 7), 6)
    assert all(math.isclose(sum(p.energy_share for p in results.partitions if p.round == n), 1.0) for n in (1, 6))


def test_the_test_set_is_evaluated_every_so_many_rounds_and_at_every_rank_at_the_end(tmp_path: Path) -> None:
    results = results_of(run_plan(), tmp_path)
    assert [(row.round, row.rank, row.split) for row in results.accuracy] == [
        (2, 8, "test"),
        (4, 2, "test"),
        (4, 4, "test"),
        (4, 8, "test"),
    ]
    assert {row.num_examples for row in results.accuracy} == {200}


def test_tuning_looks_at_the_validation_parts_alone(tmp_path: Path) -> None:
    work = NumpyWork()
    results = results_of(run_plan(stage="tuning"), tmp_path, work)
    (row,) = results.accuracy
    assert (row.round, row.rank, row.split) == (4, 8, "validation")
    assert 70 <= row.num_examples <= 90, "a fifth of 400"
    with pytest.raises(ConfigError, match=r"data\.validation"):
        play_on(run_plan(stage="tuning", data__validation=0.0), material_on(work), tmp_path / "none")


def test_clients_train_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    work = NumpyWork()
    results_of(run_plan(), tmp_path, work)
    rounds = [[rank for _, rank in work.trained[start : start + 6]] for start in range(0, 24, 6)]
    assert all(ranks == sorted(ranks) for ranks in rounds)
    assert Counter(len(ranks) for ranks in rounds) == {6: 4}
    assert len({client for client, _ in work.trained}) > 6, "each round draws anew"


def test_the_same_run_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    def rows(name: str, seed: int) -> tuple[Any, ...]:
        results = results_of(run_plan(seed=seed), tmp_path / name)
        return tuple(row.train_loss for row in results.rounds)

    assert rows("one", 3) == rows("again", 3)
    assert rows("other", 4) != rows("one", 3)


def test_a_finished_run_is_read_and_not_played_again(tmp_path: Path) -> None:
    first = play_on(run_plan(), material_on(NumpyWork()), tmp_path)
    work = NumpyWork()
    assert play_on(run_plan(), material_on(work), tmp_path) == first
    assert work.trained == []


def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    play_on(run_plan(), material_on(NumpyWork()), tmp_path)
    with pytest.raises(ConfigError, match=r"clients\.per_round was 6, now it is 5; name another folder"):
        play_on(run_plan(clients__per_round=5), material_on(NumpyWork()), tmp_path)


def test_another_base_model_in_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    class Interrupted(NumpyWork):
        def train(self, task: Any) -> Any:
            if len(self.trained) == 8:
                raise KeyboardInterrupt
            return super().train(task)

    with pytest.raises(KeyboardInterrupt):
        play_on(run_plan(), material_on(Interrupted()), tmp_path)
    other = NumpyWork()
    other.base_model_digest = "0dd5" * 16
    with pytest.raises(ConfigError, match="another base model"):
        play_on(run_plan(), material_on(other), tmp_path)


@pytest.mark.parametrize("method", ["raflora", "flora", "fedex-lora"])
def test_an_interrupted_run_goes_on_at_its_last_round(method: str, tmp_path: Path) -> None:
    plan = run_plan(method={"method": method})
    whole = results_of(plan, tmp_path / "whole")

    class Interrupted(NumpyWork):
        def train(self, task: Any) -> Any:
            if len(self.trained) == 15:
                raise KeyboardInterrupt
            return super().train(task)

    with pytest.raises(KeyboardInterrupt):
        play_on(plan, material_on(Interrupted()), tmp_path / "cut")
    work = NumpyWork()
    resumed = results_of(plan, tmp_path / "cut", work)
    assert len(work.trained) == 12, "the two rounds that were published are not trained again"
    assert (resumed.rounds, resumed.partitions, resumed.accuracy) == (whole.rounds, whole.partitions, whole.accuracy)
    assert blobs_in(tmp_path / "cut") == blobs_in(tmp_path / "whole")


def blobs_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "blobs").glob("??/*")}


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_changed_base_is_put_back_for_the_next_run(method: str, tmp_path: Path) -> None:
    work = NumpyWork()
    plain = results_of(run_plan(), tmp_path / "before", NumpyWork())
    results_of(run_plan(method={"method": method}), tmp_path / "changing", work)
    assert results_of(run_plan(), tmp_path / "after", work).rounds == plain.rounds


def test_what_the_base_has_learned_counts_in_the_spectrum_and_in_the_download(tmp_path: Path) -> None:
    flora = results_of(run_plan(method={"method": "flora"}), tmp_path / "flora")
    raflora = results_of(run_plan(), tmp_path / "raflora")
    assert flora.rounds[-1].energy > 0.0
    assert flora.rounds[0].download_bytes == raflora.rounds[0].download_bytes
    assert flora.rounds[1].download_bytes > raflora.rounds[1].download_bytes
    assert [row.upload_bytes for row in flora.rounds] == [row.upload_bytes for row in raflora.rounds]


def test_a_frozen_lora_A_need_not_travel(tmp_path: Path) -> None:
    work = NumpyWork()
    frozen = results_of(run_plan(method={"method": "ffa-lora"}), tmp_path / "ffa", work)
    full = results_of(run_plan(method={"method": "flexlora"}), tmp_path / "flex")
    numbers_of_lora_A = FEATURES * sum(rank for _, rank in work.trained)
    for saved in (
        full.runs[0].upload_bytes - frozen.runs[0].upload_bytes,
        full.runs[0].download_bytes - frozen.runs[0].download_bytes,
    ):
        assert saved == 4 * numbers_of_lora_A


def test_who_drops_out_is_not_waited_for_beyond_the_deadline(tmp_path: Path) -> None:
    plan = run_plan(clients__dropout=0.4, rounds__num_rounds=8, rounds__quorum=0.5)
    results = results_of(plan, tmp_path)
    contributors = [row.contributors for row in results.rounds]
    assert results.runs[0].status == "finished"
    assert 3 <= min(contributors) < 6, "the quorum is three of six"
    assert len(set(contributors)) > 1


def test_a_federation_that_nobody_answers_ends_and_says_why(tmp_path: Path) -> None:
    results = results_of(run_plan(clients__dropout=0.95, rounds__quorum=1.0), tmp_path)
    assert results.runs[0].status.startswith("stopped: only "), "nothing diverged"
    assert "after the deadline was extended once" in results.runs[0].status
    assert results_of(run_plan(clients__dropout=0.95, rounds__quorum=1.0), tmp_path) == results


def test_a_learning_rate_beyond_all_measure_ends_as_diverged(tmp_path: Path) -> None:
    results = results_of(
        run_plan(
            training__learning_rate=10.0,
            training__local_steps=200,
            rounds__quorum=1.0,
            rounds__num_rounds=30,
            training__decay="constant",
        ),
        tmp_path,
    )
    (run,) = results.runs
    assert run.status.startswith("diverged: only ")
    assert "(diverged: the loss is " in run.status
    assert run.rounds < 30
    assert len(results.rounds) == run.rounds


def test_clients_of_hetlora_prune_themselves_for_good(tmp_path: Path) -> None:
    plan = run_plan(
        method={"method": "hetlora", "prune_share": 0.5, "prune_penalty": 0.05},
        clients__per_round=12,
        rounds__num_rounds=8,
    )
    work = NumpyWork()
    results = results_of(plan, tmp_path, work)
    ranks: dict[str, list[int]] = {}
    for client, rank in work.trained:
        ranks.setdefault(client, []).append(rank)
    assert all(history == sorted(history, reverse=True) for history in ranks.values())
    assert any(history[-1] < history[0] for history in ranks.values())
    assert results.rounds[-1].upload_bytes < results.rounds[0].upload_bytes


def test_a_rank_that_no_layer_can_hold_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.ranks: global rank 9: module dense is 8 x 10"):
        play_on(run_plan(clients__ranks=[2, 9]), material_on(NumpyWork()), tmp_path)


def test_progress_is_told_client_by_client(tmp_path: Path) -> None:
    told: list[Progress] = []
    play_on(run_plan(), material_on(NumpyWork()), tmp_path, told.append)
    assert [p.round for p in told if p.clients_done == 0 and p.round] == sorted(
        p.round for p in told if p.clients_done == 0 and p.round
    )
    assert (told[-1].round, told[-1].num_rounds) == (4, 4)
    assert not math.isnan(told[-1].accuracy)
    assert {p.clients_done for p in told if p.round == 1} == set(range(7))


def test_a_thousand_clients_are_no_burden(tmp_path: Path) -> None:
    plan = run_plan(clients__count=1000, clients__per_round=20, rounds__num_rounds=2)
    work = NumpyWork(num_train=10_000)
    results = results_of(plan, tmp_path, work)
    assert [row.contributors for row in results.rounds] == [20, 20]
    assert results.runs[0].status == "finished"
    kinds = Counter(type(event).__name__ for event in journal_of(tmp_path))
    assert (kinds["ClientJoined"], kinds["UpdateAccepted"], kinds["RoundOpened"]) == (1000, 40, 2)


def test_the_forecast_and_the_theorem_s_constant_stand_in_the_row(tmp_path: Path) -> None:
    results = results_of(run_plan(method={"method": "flexlora"}), tmp_path)
    (run,) = results.runs
    assert 0.0 < run.forecast_factor < 1.0
    rho = results.rounds[0].rho
    assert np.isclose(run.initial_energy_ratio, (1 - rho) / rho)
    assert run.download_bytes == sum(row.download_bytes for row in results.rounds)


class Refusing(NumpyWork):
    """Diverges for some clients, whatever the rate."""

    def __init__(self, clients: set[str]) -> None:
        super().__init__()
        self._clients = clients

    def train(self, task: LocalTask) -> Trained:
        if task.client.client_id in self._clients:
            raise WorkDiverged("the loss is nan")
        return super().train(task)


def test_a_round_goes_on_without_a_client_that_diverges(tmp_path: Path) -> None:
    plan = run_plan(clients__per_round=12)
    results = results_of(plan, tmp_path, Refusing({"client-0003"}))
    assert [row.contributors for row in results.rounds] == [11, 11, 11, 11]
    failures = [event for event in journal_of(tmp_path) if isinstance(event, TaskFailed)]
    assert {(event.client_id, event.failure) for event in failures} == {("client-0003", "diverged: the loss is nan")}


def test_a_round_without_its_quorum_is_repeated_with_another_cohort(tmp_path: Path) -> None:
    plan = run_plan(clients__per_round=3, rounds__quorum=1.0, rounds__num_rounds=12)
    results = results_of(plan, tmp_path, Refusing({"client-0003"}))
    opened = [event for event in journal_of(tmp_path) if isinstance(event, RoundOpened)]
    again = [event for event in opened if event.attempt == 2]
    assert again, "with twelve rounds the client was invited"
    for second in again:
        first = next(event for event in opened if (event.number, event.attempt) == (second.number, 1))
        assert "client-0003" in dict(first.cohort)
        assert first.cohort != second.cohort
    assert results.runs[0].status == "finished"
