"""Every aggregation method in the real service: it runs to the end with real workers, or the coordinator refuses it."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny_trainer
from coordinators import (
    CoordinatorProcess,
    clients_of,
    config_of,
    global_adapter,
    observing,
    serving,
    settings_of,
)
from raflora.v1 import status_pb2
from worker_site import TRAINER

from common.adapter import Adapter, initial_adapter, slice_adapter
from common.codec import Layout, WireDtype, decode, encode
from common.errors import AdapterMismatch
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import METHODS, make_method
from coordinator.config import CoordinatorConfig
from coordinator.stores.blobs import FileBlobs
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.run import work

RANKS = {"ada": 2, "bob": 4}
SEED = 5
REFUSED = [
    ({"method": "flora"}, "base"),
    ({"method": "fedex-lora"}, "base"),
    ({"method": "hetlora", "prune_share": 0.5}, "prune"),
]
SERVED = sorted(name for name in METHODS if not make_method(MethodOptions(name)).service_refusal)


def test_all_methods_but_those_that_change_the_base_are_served() -> None:
    assert set(METHODS) - set(SERVED) == {"flora", "fedex-lora"}


# ---------------------------------------------------------------- run to the end


def federation_of(folder: Path, **changes: object) -> CoordinatorConfig:
    """Two rounds of the tiny trainer's layers."""
    return config_of(
        folder,
        adapter__modules_to_save=["head"],
        adapter__target_modules=["q_proj", "v_proj"],
        adapter__global_rank=4,
        rounds__min_clients=len(RANKS),
        rounds__seed=SEED,
        **changes,
    )


async def works(folder: Path, address: str, name: str, rank: int) -> None:
    """A worker, its agent and its trainer process, until the federation is over."""
    (folder / name / "state").mkdir(parents=True)
    config = WorkerConfig(
        name=name,
        rank=rank,
        state_dir=folder / name / "state",
        coordinator=CoordinatorAddress(address=address),
        model=ModelConfig(path=str(folder / name)),
        data=DataConfig(train="none"),
    )
    await work(config, TRAINER)


def published(config: CoordinatorConfig, digest: str) -> Adapter:
    content = FileBlobs(config.state_dir / "blobs").open(digest).read_bytes()
    return decode(content, Layout(tiny_trainer.SPEC, config.adapter.global_rank), "the global adapter")


@pytest.mark.parametrize("method", SERVED)
async def test_a_federation_of_real_workers_runs_to_the_end_under_every_method(tmp_path: Path, method: str) -> None:
    config = federation_of(tmp_path, aggregation__method=method)
    async with serving(config) as address, observing(address) as observer:
        await asyncio.gather(*(works(tmp_path, address, name, rank) for name, rank in RANKS.items()))
        status = await observer.finished()
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
        header, fetched = await observer.fetch(2)
    adapter = published(config, status.adapter_digest)
    assert (status.method, len(rounds), status.last_round.round) == (method, 2, 2)
    assert [len(summary.contributions) for summary in rounds] == [2, 2]
    assert fetched == encode(slice_adapter(adapter, 2, scaling=header.scaling))
    # The factors may be means, neither orthogonal nor ordered: what is told of the energy is the product's.
    products = [f.lora_B.astype(float) @ f.lora_A for f in adapter.modules.values()]
    assert status.last_round.energy == pytest.approx(sum(np.linalg.norm(product) ** 2 for product in products))
    shares = [partition.energy_share for partition in status.last_round.partitions]
    assert sum(shares) == pytest.approx(1.0)


# ---------------------------------------------------------------- refused at start


@pytest.mark.parametrize(("aggregation", "says"), REFUSED)
def test_a_method_that_the_service_cannot_run_is_refused_before_anything_is_made(
    tmp_path: Path, aggregation: Mapping[str, object], says: str
) -> None:
    # As a process: the command sets up the log of the whole process that it runs in.
    changes = {f"aggregation__{key}": value for key, value in aggregation.items()}
    process = CoordinatorProcess(tmp_path, settings_of(tmp_path, **changes))
    try:
        assert process.wait() == 2
    finally:
        process.close()
    (told,) = process.output
    assert told.startswith(f"aggregation.method {aggregation['method']}: ")
    assert says in told
    assert "raflora simulate" in told
    assert not (tmp_path / "state").exists()


# ---------------------------------------------------------------- a frozen lora_A


@pytest.mark.parametrize("dtype", list(WireDtype))
async def test_a_frozen_lora_A_is_the_seeded_one_for_ever(tmp_path: Path, dtype: WireDtype) -> None:
    config = config_of(tmp_path, aggregation__method="ffa-lora", adapter__wire_dtype=dtype, rounds__min_clients=2)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        status = await observer.finished()
    found = global_adapter(config, status.adapter_digest)
    for name, first in initial_adapter(found.spec, 8, config.rounds.seed).modules.items():
        np.testing.assert_array_equal(found.modules[name].lora_A, first.lora_A)
        assert (found.modules[name].lora_B[:, :4] != 0.0).any()


async def test_a_worker_that_trains_a_frozen_lora_A_is_refused_and_told_why(tmp_path: Path) -> None:
    config = config_of(tmp_path, aggregation__method="ffa-lora", rounds__min_clients=2)
    async with serving(config) as address, clients_of(address, RANKS) as (ada, bob):
        ada.is_too_old = True
        task = await ada.fetch_task()
        content = await ada.train(task)
        await ada.upload(task, content)
        with pytest.raises(AdapterMismatch, match=r"'ada', round 1: encoder\.0\.query\.lora_A was trained, but .* old"):
            await ada.submit(task, content)
        # The others are not harmed, and a worker that obeys is taken at its next try.
        await bob.do(await bob.fetch_task())
        ada.is_too_old = False
        await ada.do(await ada.fetch_task())
        polled = await ada.rpc.poll_task(30.0)
    assert [task.round for task in polled.tasks] == [2]
