"""A group of two real trainers teaches and measures what one does, and takes part in a federation like one."""

import asyncio
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from coordinators import config_of, observing, serving
from raflora.v1 import status_pb2
from tiny_models import (
    LLAMA_ORDER,
    PLAN,
    SIDES,
    VIT_ORDER,
    random_adapter,
    save_vit,
    side_images,
    tiny_llama,
    word_problems,
)

from common.adapter import Adapter, AdapterSpec, ModuleShape
from common.codec import Layout, decode, encode
from worker.config import CoordinatorAddress, DataConfig, LaunchConfig, ModelConfig, WorkerConfig
from worker.run import work
from worker.supervisor import TaskFailed, TrainerProcess
from worker.trainer.data import load_data
from worker.trainer.evaluation import Pace, TestData, evaluate_by
from worker.trainer.model import load_model, read_adapter, write_adapter
from worker.trainer.training import train
from worker.trainer_protocol import (
    GENERATION,
    Evaluate,
    EvaluationPlan,
    Load,
    ModelOrder,
    Plan,
    ProgressMade,
    Train,
    Trained,
)

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]

RANK, OTHER_RANK = 4, 2
PLANS = (  # of 21 examples: batches of 8 end with one of 5, whose last part is a single example and one process's
    dataclasses.replace(PLAN, local_steps=3, batch_size=4),
    dataclasses.replace(PLAN, local_steps=0, local_epochs=2.0, batch_size=8, weight_decay=0.1, warmup_steps=2),
)
KINDS: Mapping[str, tuple[Callable[[Path], Path], Callable[[int, int], Sequence[Mapping[str, object]]]]] = {
    VIT_ORDER.task: (save_vit, side_images),
    LLAMA_ORDER.task: (tiny_llama, word_problems),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def site(folder: Path, order: ModelOrder = VIT_ORDER, name: str = "ada", **more: object) -> WorkerConfig:
    """With a model, 21 examples to train on and 7 for testing."""
    save, rows = KINDS[order.task]
    folder.mkdir(exist_ok=True)
    save(folder)
    for file, count, seed in (("train.jsonl", 21, 1), ("test.jsonl", 7, 2)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    settings = {
        "name": name,
        "rank": RANK,
        "threads": 1,
        "state_dir": folder / "state",
        "model": ModelConfig(path=str(folder), device="cpu", offline=True),
        "data": DataConfig(
            train=str(folder / "train.jsonl"),
            test=str(folder / "test.jsonl"),
            prompt_column="question",
            response_column="answer",
            max_length=128,
        ),
    }
    return WorkerConfig.model_validate(settings | more)


@dataclasses.dataclass(frozen=True)
class Alone:
    """What one process makes of a start at a rank by a plan, in this very process, and how it measures one."""

    taught: Mapping[tuple[int, Plan], tuple[Adapter, float]]
    measured: Mapping[str, float]

    @classmethod
    def found(cls, config: WorkerConfig, order: ModelOrder, cases: Sequence[tuple[int, Plan]]) -> "Alone":
        model = load_model(config.model, order)
        preparation = model.task.prepare(model.folder, model.base, model.labels, config.data)
        data = load_data(config.data, preparation, seed=order.seed, offline=True)
        taught = {}
        for rank, plan in cases:
            write_adapter(model, random_adapter(model.spec, rank), scaling=1.0)
            outcome = train(
                model, data.train, plan, collator=preparation.collator, memory_batch=None, report=lambda *_: None
            )
            taught[rank, plan] = read_adapter(model), outcome.metrics["train_loss"]
        write_adapter(model, random_adapter(model.spec, RANK), scaling=1.0)
        tests = TestData(data, preparation, config.data, order.seed)
        return cls(taught, evaluate_by(how_measured(order), model, tests, Pace(None, lambda *_: None))[1])


def how_measured(order: ModelOrder) -> EvaluationPlan:
    """A language model by what it writes too, which takes the processes different numbers of passes."""
    if order is LLAMA_ORDER:
        return EvaluationPlan(method=GENERATION, max_new_tokens=5)
    return EvaluationPlan()


def assert_close(found: Adapter, expected: Adapter) -> None:
    for name, factors in expected.modules.items():
        np.testing.assert_allclose(found.modules[name].lora_A, factors.lora_A, atol=1e-5)
        np.testing.assert_allclose(found.modules[name].lora_B, factors.lora_B, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A group that has loaded a model, and what one process makes of the same."""

    trainer: TrainerProcess
    folder: Path
    spec: AdapterSpec
    order: ModelOrder
    alone: Alone

    async def teach(
        self, plan: Plan, rank: int = RANK, report: Callable[[ProgressMade], None] = lambda _: None
    ) -> Trained:
        start = self.folder / "slice"
        await asyncio.to_thread(start.write_bytes, encode(random_adapter(self.spec, rank)))
        update = str(self.folder / "update")
        return await self.trainer.train(Train(str(start), update, rank, 1.0, "float32", plan), report)

    async def check_taught(self, plan: Plan, rank: int = RANK) -> None:
        seen: list[ProgressMade] = []
        trained = await self.teach(plan, rank, seen.append)
        expected, train_loss = self.alone.taught[rank, plan]
        content = await asyncio.to_thread((self.folder / "update").read_bytes)
        assert_close(decode(content, Layout(self.spec, rank), "the test"), expected)
        assert trained.metrics["train_loss"] == pytest.approx(train_loss, abs=1e-5)
        assert trained.num_examples == 21
        assert (seen[-1].step, seen[-1].total_steps) == ((3, 3) if plan.local_steps else (6, 6))

    async def check_measured(self) -> None:
        evaluate = Evaluate(str(self.folder / "slice"), RANK, 1.0, "float32", how_measured(self.order))
        found = await self.trainer.evaluate(evaluate, lambda _: None)
        assert found.num_examples == 7
        assert found.metrics == pytest.approx(dict(self.alone.measured), abs=1e-5)

    async def check_refusals_and_a_stop(self) -> None:
        with pytest.raises(
            TaskFailed, match=r"a batch of 5 cannot .* by the 2 processes .* training.batch_size 4 or 6"
        ):
            await self.teach(dataclasses.replace(PLAN, batch_size=5))
        with pytest.raises(TaskFailed, match="training loss is") as failed:
            await self.teach(dataclasses.replace(PLAN, learning_rate=1e38, max_grad_norm=0.0))
        assert failed.value.word == "diverged"
        begun = asyncio.Event()
        endless = dataclasses.replace(PLAN, local_steps=10_000_000)
        working = asyncio.create_task(self.teach(endless, report=lambda _: begun.set()))
        await begun.wait()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert working.cancelled()
        await self.check_taught(PLANS[0])


async def test_two_processes_teach_and_measure_what_one_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # 3 at once does not divide a share of 2 or 4: 2 or 1 are taken
    images, texts = (site(tmp_path / order.task, order, batch_size=3) for order in (VIT_ORDER, LLAMA_ORDER))
    sharded = texts.model_copy(update={"launch": LaunchConfig(processes=2, shard_base=True)})
    trainer = TrainerProcess(600, launch=LaunchConfig(processes=2))

    async def loaded(config: WorkerConfig, order: ModelOrder, alone: Alone | None = None) -> Bench:
        found = await trainer.load(Load(config.model_dump_json(), order))
        spec = AdapterSpec(tuple(ModuleShape(*module) for module in found.modules), ())
        expected = alone or Alone.found(config, order, [(RANK, PLANS[0]), (RANK, PLANS[1]), (OTHER_RANK, PLANS[1])])
        return Bench(trainer, tmp_path, spec, order, expected)

    try:
        bench = await loaded(images, VIT_ORDER)
        await bench.check_taught(PLANS[1])
        await bench.check_refusals_and_a_stop()
        await bench.check_measured()

        whole = await loaded(texts, LLAMA_ORDER)
        await whole.check_taught(PLANS[1])
        await whole.check_measured()
        assert "the frozen base is sharded" not in capfd.readouterr().err

        bench = await loaded(sharded, LLAMA_ORDER, whole.alone)
        shares = re.findall(r"the frozen base is sharded .* of=(\d+) .* weights_here=(\d+)", capfd.readouterr().err)
        assert [int(every) / int(here) for every, here in shares] == [2, 2]
        await bench.check_taught(PLANS[1], OTHER_RANK)
        await bench.check_refusals_and_a_stop()
        await bench.check_measured()
    finally:
        await trainer.stop()


async def test_a_group_takes_part_in_a_federation_as_one_client(tmp_path: Path) -> None:
    config = config_of(
        tmp_path / "coordinator",
        model={"base_model": "vit", "task": "image-classification", "labels": list(SIDES)},
        adapter={"target_modules": ["q_proj", "v_proj"], "global_rank": 8},
        rounds__num_rounds=2,
        rounds__min_clients=1,
        rounds__evaluate_every=1,
        training={"learning_rate": 1e-2, "local_steps": 3, "batch_size": 4},
    )
    async with serving(config) as address, observing(address) as observer:
        where = CoordinatorAddress(address=address)
        ada = site(tmp_path / "ada", name="ada", coordinator=where, launch=LaunchConfig(processes=2))
        ada.state_dir.mkdir()
        await work(ada)
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
    assert len(rounds) == 2
    assert all(len(summary.adapter_digest) == 64 for summary in rounds)
    assert [[one.num_examples for one in summary.contributions] for summary in rounds] == [[21], [21]]
