"""A worker that trains nothing: the agent against a scripted coordinator, and a real trainer with test data."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from coordinators import config_of, observing, serving
from pydantic import ValidationError
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import status_pb2
from tiny_models import PLAN, VIT_ORDER, save_vit, side_images
from worker_site import RANK, TRAINER, Site, evaluate, scripted_site, train

from common.adapter import AdapterSpec, ModuleShape, initial_adapter
from common.codec import encode
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, SitePolicy, WorkerConfig
from worker.policy import PolicyRefused
from worker.run import work
from worker.supervisor import TaskFailed, TrainerProcess
from worker.trainer_protocol import Evaluate, EvaluationPlan, Load, Loaded, Train


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with scripted_site(tmp_path) as made:
        yield made


async def evaluator_works(site: Site, policy: SitePolicy = SitePolicy(), rank: int = RANK) -> None:
    site.state_dir.mkdir(exist_ok=True)
    changes = {"evaluator": True, "rank": rank, "data": DataConfig(test="none"), "policy": policy}
    await work(site.config().model_copy(update=changes), TRAINER, site.time.clock)


async def test_an_evaluator_says_so_when_it_joins_and_evaluates(site: Site) -> None:
    site.script.tasks = [evaluate(1), evaluate(2)]

    await evaluator_works(site)

    (join,) = site.coordinator.joins
    assert join.profile.evaluates_only
    assert [(e.lease_token, dict(e.metrics)) for e in site.coordinator.evaluations] == [
        (1, {"accuracy": 0.5}),
        (2, {"accuracy": 0.5}),
    ]
    kinds = [json.loads(line) for line in (site.state_dir / "egress.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in kinds] == ["join", "evaluation", "evaluation"]
    assert kinds[0]["words"].endswith("; evaluates only")


async def test_an_ordinary_worker_does_not(site: Site) -> None:
    site.script.tasks = [evaluate(1)]

    await site.work()

    (join,) = site.coordinator.joins
    assert not join.profile.evaluates_only


async def test_an_evaluator_refuses_to_train_and_lives_on(site: Site) -> None:
    site.script.tasks = [train(1), evaluate(2)]

    await evaluator_works(site)

    (failure,) = site.coordinator.failures
    assert (failure.lease_token, failure.reason) == (1, "policy_refused")
    assert failure.message == "site policy: round 1 asks for training; this worker is an evaluator"
    assert site.coordinator.updates == []
    assert [e.lease_token for e in site.coordinator.evaluations] == [2]
    (refusal,) = (json.loads(line) for line in (site.state_dir / "refusals.jsonl").read_text().splitlines())
    assert refusal["reason"] == "policy_refused"


async def test_an_evaluator_without_a_rank_of_its_own_holds_the_whole_adapter(site: Site) -> None:
    await evaluator_works(site, rank=0)
    await evaluator_works(site, SitePolicy(max_rank=2), rank=0)
    assert [join.profile.max_rank for join in site.coordinator.joins] == [4, 2]  # the script's global rank is 4


async def test_what_the_task_asks_reaches_the_trainer_only_within_the_policy(site: Site) -> None:
    long, short = evaluate(1), evaluate(2)
    for task, tokens in ((long, 300), (short, 200)):
        task.evaluation.CopyFrom(pb.EvaluationPlan(method="generation", max_new_tokens=tokens, match="last-number"))
    unknown = evaluate(3)
    unknown.evaluation.method = "taste"
    site.script.tasks = [long, short, unknown]

    await evaluator_works(site, SitePolicy(max_new_tokens=200))

    told = [(f.lease_token, f.reason, f.message) for f in site.coordinator.failures]
    assert told == [
        (1, "policy_refused", "site policy: round 1 asks for new tokens 300; at most 200 is allowed here"),
        (3, "invalid_request", "the worker's log says more"),
    ]
    assert [e.lease_token for e in site.coordinator.evaluations] == [2]


async def test_few_examples_are_as_telling_at_an_evaluator(site: Site) -> None:
    with pytest.raises(PolicyRefused, match="40 test examples, but min_examples is 41"):
        await evaluator_works(site, SitePolicy(min_examples=41))
    assert site.coordinator.joins == []


async def test_a_real_coordinator_lets_an_evaluator_evaluate_every_adapter_and_train_none(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "adapter__target_modules": ["q_proj", "v_proj"],
        "adapter__modules_to_save": ["head"],
        "adapter__global_rank": 4,
        "rounds__min_clients": 1,
        "rounds__num_rounds": 2,
        "rounds__evaluate_every": 1,
    }
    federation = config_of(tmp_path / "coordinator", **changes)
    async with serving(federation) as address, observing(address) as observer:

        def site(name: str, **settings: Any) -> WorkerConfig:
            folder = tmp_path / name
            (folder / "state").mkdir(parents=True)
            where = CoordinatorAddress(address=address, rpc_timeout_seconds=5)
            model = ModelConfig(path=str(folder))
            return WorkerConfig(name=name, state_dir=folder / "state", coordinator=where, model=model, **settings)

        evaluator = asyncio.create_task(work(site("hold-out", evaluator=True, data=DataConfig(test="none")), TRAINER))
        async for _ in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients:
                break
        trains = asyncio.create_task(work(site("ada", rank=2, data=DataConfig(train="none")), TRAINER))
        await observer.finished()
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
        clients = (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients
        await asyncio.gather(evaluator, trains)
    assert len(rounds) == 2
    for summary in rounds:
        assert {e.client_id: (e.lora_rank, e.central) for e in summary.evaluations} == {
            "ada": (2, False),
            "hold-out": (4, True),
        }
    assert {c.client_id: c.evaluates_only for c in clients} == {"ada": False, "hold-out": True}
    kinds = (json.loads(line)["kind"] for line in (tmp_path / "hold-out/state/egress.jsonl").read_text().splitlines())
    assert list(kinds) == ["join", "evaluation", "evaluation"]


@pytest.mark.parametrize(
    ("evaluator", "data", "sentence"),
    [
        (True, {"train": "train.jsonl"}, "an evaluator needs data.test"),
        (False, {"test": "test.jsonl"}, "data.train is needed"),
        (False, {}, "data.train is needed"),
    ],
)
def test_settings_without_the_data_that_the_work_needs_are_refused(
    evaluator: bool, data: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        WorkerConfig(rank=4, evaluator=evaluator, model=ModelConfig(path="base"), data=DataConfig.model_validate(data))


def test_an_evaluator_needs_no_training_data_and_may_have_some() -> None:
    for train_file in ("", "train.jsonl"):
        data = DataConfig(train=train_file, test="test.jsonl")
        config = WorkerConfig(evaluator=True, model=ModelConfig(path="base"), data=data)
        assert (config.rank_in(32), config.model_copy(update={"rank": 8}).rank_in(32)) == (32, 8)
        assert WorkerConfig.model_validate_json(config.model_dump_json()) == config, "as the trainer reads it"


@pytest.mark.torch
@pytest.mark.timeout(300)
async def test_its_trainer_reads_the_test_data_alone(tmp_path: Path) -> None:
    save_vit(tmp_path)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(6)))
    config = WorkerConfig(
        rank=RANK,
        evaluator=True,
        threads=1,
        model=ModelConfig(path=str(tmp_path), device="cpu", offline=True),
        data=DataConfig(train=str(tmp_path / "is-not-there.jsonl"), test=str(tmp_path / "test.jsonl")),
    )
    trainer = TrainerProcess(max_task_seconds=120.0)
    heard: list[str] = []
    try:
        loaded = await trainer.load(Load(config.model_dump_json(), VIT_ORDER))
        slice_path = tmp_path / "slice"
        slice_path.write_bytes(encode(initial_adapter(_spec_of(loaded), RANK, seed=1)))
        order = Evaluate(str(slice_path), RANK, 1.0, "float32")
        evaluated = await trainer.evaluate(order, lambda made: heard.append(made.activity))
        few = Evaluate(str(slice_path), RANK, 1.0, "float32", EvaluationPlan(max_examples=4))
        limited = await trainer.evaluate(few, lambda _: None)
        with pytest.raises(TaskFailed, match="this worker is an evaluator") as refused:
            await trainer.train(
                Train(str(slice_path), str(tmp_path / "up"), RANK, 1.0, "float32", PLAN), lambda _: None
            )
        generation = Evaluate(str(slice_path), RANK, 1.0, "float32", EvaluationPlan("generation", 8))
        with pytest.raises(TaskFailed, match="'generation' does not fit the task 'image-classification'") as unfit:
            await trainer.evaluate(generation, lambda _: None)
    finally:
        await trainer.stop()
    assert loaded.num_examples == 6
    assert (evaluated.num_examples, sorted(evaluated.metrics)) == (6, ["accuracy", "eval_loss"])
    assert (limited.num_examples, sorted(limited.metrics)) == (4, ["accuracy", "eval_loss"])
    assert set(heard) == {"evaluating"}
    assert (refused.value.word, unfit.value.word) == ("invalid_request", "wrong_method")


def _spec_of(loaded: Loaded) -> AdapterSpec:
    return AdapterSpec(tuple(ModuleShape(*module) for module in loaded.modules), ())
