"""What a simulation publishes is what a coordinator with real workers publishes, byte for byte, round for round."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coordinators import Observer, observing, serving
from numpy_site import CONTENTS, run_plan
from raflora.v1 import admin_pb2, status_pb2
from tiny_models import SIDES, VIT_ORDER, save_vit, side_images

from cli.spec import spec_json
from coordinator.config import BaseModelConfig, CoordinatorConfig, ServerConfig
from coordinator.federation.events import AdapterPublished, FederationFounded, RoundOpened
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal
from simulation.local_work import LocalWork
from simulation.population import SimulatedClient, make_population
from simulation.run import Material, coordinator_config, play_on
from simulation.schedule import RunPlan
from simulation.torch_work import Examples, TorchWork
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.run import work
from worker.trainer.data import load_data
from worker.trainer.model import load_model

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_EXAMPLES = 60
JOIN_SECONDS = 200.0  # for processes that import torch; a bound, not an expectation


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers: bits can depend on it
    yield
    torch.set_num_threads(before)


def plan_of(method: str, per_round: int, num_rounds: int) -> RunPlan:
    return run_plan(
        method={"method": method},
        seed=5,
        clients__count=3,
        clients__per_round=per_round,
        clients__ranks=[2, 4, 8],
        clients__alpha=2.0,
        rounds__num_rounds=num_rounds,
        rounds__quorum=1.0,
        rounds__evaluate_every=1,
        training__learning_rate=5e-3,
        training__local_steps=3,
        training__batch_size=4,
    )


def material_in(folder: Path, modules_to_save: tuple[str, ...] = ()) -> Material:
    """The tiny ViT, and pictures whose bright side is to be named."""
    order = replace(VIT_ORDER, modules_to_save=modules_to_save)
    save_vit(folder)
    rows = side_images(NUM_EXAMPLES)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(20, seed=1)))

    def load(rank: int) -> TorchWork:
        model = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), order)
        config = DataConfig(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
        preparation = model.task.prepare(model.folder, model.base, model.labels, config)
        data = load_data(config, preparation, seed=0, offline=True)
        return TorchWork(model, Examples(data.train, data.test, preparation.collator))

    return Material(
        model=BaseModelConfig(base_model="vit", task="image-classification", labels=SIDES),
        target_modules=VIT_ORDER.target_modules,
        modules_to_save=modules_to_save,
        train_labels=[SIDES.index(str(row["label"])) for row in rows],
        train_groups=None,
        contents=CONTENTS,
        work=load,
    )


def served(config: CoordinatorConfig, folder: Path, work: LocalWork) -> CoordinatorConfig:
    """The simulation's own settings for a coordinator in a folder, which is told the spec by a file."""
    folder.mkdir()
    (folder / "spec.json").write_text(spec_json(work.spec, work.base_model_digest))
    return config.model_copy(
        update={
            "state_dir": folder,
            "server": ServerConfig(listen="127.0.0.1:0"),
            "adapter": config.adapter.model_copy(update={"spec": folder / "spec.json"}),
        }
    )


def worker_of(folder: Path, base: Path, address: str, client: SimulatedClient) -> WorkerConfig:
    """A worker that holds what the simulated client trains on."""
    state_dir, rows = folder / client.client_id, side_images(NUM_EXAMPLES)
    state_dir.mkdir()
    (state_dir / "train.jsonl").write_text("".join(json.dumps(rows[index]) + "\n" for index in client.train))
    return WorkerConfig(
        name=client.client_id,
        rank=client.rank,
        threads=1,
        state_dir=state_dir,
        coordinator=CoordinatorAddress(address=address),
        model=ModelConfig(path=str(base), device="cpu", offline=True),
        data=DataConfig(train=str(state_dir / "train.jsonl"), test=str(base / "test.jsonl")),
    )


async def until(observer: Observer, is_so: Callable[[status_pb2.FederationStatus], bool]) -> None:
    """Follows the federation until its status is so."""
    async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=JOIN_SECONDS):
        if is_so(answer.status):
            return


async def serve(config: CoordinatorConfig, folder: Path, base: Path, clients: tuple[SimulatedClient, ...]) -> None:
    """The federation over gRPC; like the simulated one it opens no round before everybody has joined."""
    async with serving(config) as address, observing(address) as observer:
        await until(observer, lambda status: status.phase != status_pb2.PHASE_WAITING_FOR_SPEC)
        await observer.admin.Pause(admin_pb2.PauseRequest())
        async with asyncio.TaskGroup() as group, asyncio.timeout(JOIN_SECONDS):
            for client in clients:
                group.create_task(work(worker_of(folder, base, address, client)))
            await until(observer, lambda status: status.clients_known == len(clients))
            await observer.admin.Resume(admin_pb2.ResumeRequest())


def told_by(journal_file: Path) -> tuple[str, list[tuple[str, ...]], list[str]]:
    """A journal's manifest digest, the cohorts it drew and the adapters it published."""
    journal = SqlJournal(f"sqlite:///{journal_file}")
    try:
        events = [event_of(entry) for entry in journal.read("points")]
    finally:
        journal.close()
    (manifest,) = [event.manifest_digest for event in events if isinstance(event, FederationFounded)]
    cohorts = [tuple(client for client, _ in event.cohort) for event in events if isinstance(event, RoundOpened)]
    return manifest, cohorts, [event.adapter_digest for event in events if isinstance(event, AdapterPublished)]


@pytest.mark.parametrize(
    ("method", "per_round", "num_rounds", "modules_to_save"),
    [("raflora", 2, 3, ()), ("fedit", 3, 2, ()), ("ffa-lora", 2, 2, ("classifier",))],
)
async def test_a_simulated_federation_publishes_the_bytes_of_a_real_one(
    method: str, per_round: int, num_rounds: int, modules_to_save: tuple[str, ...], tmp_path: Path
) -> None:
    plan, base = plan_of(method, per_round, num_rounds), tmp_path / "base"
    material = material_in(base, modules_to_save)
    row = play_on(plan, material, tmp_path / "simulated")
    assert (row.status, row.rounds) == ("finished", num_rounds)

    clients = make_population(material.train_labels, None, plan.experiment.clients, validation=0.2, seed=plan.key.seed)
    assert sorted(client.rank for client in clients) == [2, 4, 8]
    config = served(coordinator_config(plan, material, clients), tmp_path / "real", material.work(8))
    await serve(config, tmp_path, base, clients)

    simulated, real = told_by(tmp_path / "simulated" / "journal.sqlite"), told_by(tmp_path / "real" / "journal.sqlite")
    assert len(set(real[2])) == num_rounds
    assert simulated == real
