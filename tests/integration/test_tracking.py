"""Tracking on both sides, read back from TensorBoard's own files: a coordinator's rounds and a worker's tasks."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from coordinators import NumpyClient, clients_of, config_of, observing, serving
from raflora.v1 import status_pb2
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from worker_site import TRAINER, evaluate, scripted_site, train

from common.errors import ConfigError
from common.tracking import TrackingConfig
from worker.config import SitePolicy
from worker.messages import Evaluation, TaskKind
from worker.run import work as run_worker

RANKS = {"ada": 4, "bob": 2, "eve": 2}


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder))
    board.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


async def work(client: NumpyClient) -> None:
    while not (polled := await client.rpc.poll_task(30.0)).is_finished:
        for task in polled.tasks:
            if task.kind is TaskKind.EVALUATE:
                metrics = {"accuracy": 0.25 * task.round, "eval_loss": 1.0}
                await client.rpc.submit_evaluation(Evaluation(task, 10, metrics))
            else:
                await client.do(task)


async def rounds(config: Any, until_round: int) -> None:
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        working = [asyncio.create_task(work(client)) for client in clients]
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            evaluated = answer.status.last_round.evaluations
            if answer.status.last_round.round >= until_round and len(evaluated) == len(RANKS):
                break
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def test_a_coordinator_s_rounds_are_tracked_each_once_also_over_a_restart(tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    changes: dict[str, Any] = {"rounds__min_clients": 3, "rounds__num_rounds": 3, "rounds__evaluate_every": 1}
    config = config_of(tmp_path / "c", **changes, tracking={"tensorboard": str(boards), "run_name": "one"})
    await rounds(config, 2)
    await rounds(config, 3)
    found = scalars_in(boards / "one")
    assert [step for step, _ in found["ranks/rho"]] == [1, 2, 3]
    assert found["round/updates"] == [(1, 3.0), (2, 3.0), (3, 3.0)]
    assert found["federated/accuracy"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert found["federated_rank_2/accuracy"] == found["federated/accuracy"]
    assert not [name for name in found if name.startswith("federated_rank_4")]  # ada's own number
    assert {"energy/1-2", "energy/3-4", "round/received_bytes", "ranks/effective_rank"} <= found.keys()
    assert not [name for name in found if any(client in name for client in RANKS)]


async def test_a_worker_s_tasks_are_tracked_on_one_axis(tmp_path: Path) -> None:
    async with scripted_site(tmp_path) as site:
        site.script.tasks = [train(1), evaluate(2)]
        site.state_dir.mkdir()
        boards = tmp_path / "boards"
        config = site.config().model_copy(update={"tracking": TrackingConfig(tensorboard=boards)})
        await run_worker(config, TRAINER, site.time.clock)
    found = scalars_in(boards / "ada")
    assert [value for _, value in found["train/train_loss"]] == [0.25]
    assert [value for _, value in found["evaluate/accuracy"]] == [0.5]
    assert [value for _, value in found["train/examples"]] == [40.0]


async def test_a_site_that_sends_no_metrics_tracks_on_its_own_machine_only(tmp_path: Path) -> None:
    policy = SitePolicy(may_send_metrics=False)
    async with scripted_site(tmp_path) as site:
        site.state_dir.mkdir()
        elsewhere = site.config(policy).model_copy(update={"tracking": TrackingConfig(mlflow="http://127.0.0.1:9")})
        with pytest.raises(ConfigError, match=r"may_send_metrics is false.*tracking.tensorboard"):
            await run_worker(elsewhere, TRAINER, site.time.clock)
        assert not site.coordinator.joins
        site.script.tasks = [train(1)]
        here = site.config(policy).model_copy(update={"tracking": TrackingConfig(tensorboard=tmp_path / "boards")})
        await run_worker(here, TRAINER, site.time.clock)
        (update,) = site.coordinator.updates
        assert not update.metrics
    assert scalars_in(tmp_path / "boards" / "ada")["train/train_loss"]
