"""The real local work on a tiny ViT: one model for all clients, and a base that can be changed and put back."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import SIDES, VIT_ORDER, random_adapter, save_vit, side_images

from common.adapter import Adapter, Factors, initial_adapter, slice_adapter
from common.codec import encode
from coordinator.aggregation.method import MethodOptions
from coordinator.config import TrainingConfig
from coordinator.manifest import RoundPlan
from simulation.base_change import accumulated
from simulation.local_work import EvaluationSet, LocalTask, Trained, WorkDiverged
from simulation.population import SimulatedClient
from simulation.torch_work import Examples, TorchWork
from worker.config import DataConfig, ModelConfig
from worker.trainer.data import Row
from worker.trainer.model import load_model

pytestmark = pytest.mark.torch

TEST = EvaluationSet("test")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> TorchWork:
    folder = save_vit(tmp_path_factory.mktemp("vit"))
    model = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), VIT_ORDER)
    preparation = model.task.prepare(model.folder, model.base, SIDES, DataConfig(train="none"))
    train, test = (
        [preparation.example(Row("row", folder, row)) for row in side_images(count, seed)]
        for count, seed in ((40, 0), (16, 1))
    )
    return TorchWork(model, Examples(train, test, preparation.collator))


def client_of(name: str, first: int) -> SimulatedClient:
    return SimulatedClient(name, 4, np.arange(first, first + 12), np.arange(first + 12, first + 15))


def task_of(work: TorchWork, client: SimulatedClient, rank: int = 4, rate: float = 1e-2, **plan: bool) -> LocalTask:
    training = TrainingConfig(learning_rate=1e-2, local_steps=2, batch_size=4, max_grad_norm=1e30)
    return LocalTask(
        client=client,
        adapter=slice_adapter(initial_adapter(work.spec, 8, seed=1), rank, scaling=1.0),
        scaling=1.0,
        plan=RoundPlan(rate, 7, training, freezes_lora_A=plan.get("freezes_lora_A", False)),
        method=MethodOptions("raflora"),
    )


def bytes_of(trained: Trained) -> bytes:
    return encode(trained.adapter)


def test_the_order_of_clients_and_ranks_changes_no_byte(work: TorchWork) -> None:
    ada, bob = task_of(work, client_of("ada", 0)), task_of(work, client_of("bob", 15), rank=8)
    forwards = [bytes_of(work.train(task)) for task in (ada, bob)]
    backwards = [bytes_of(work.train(task)) for task in (bob, ada)]
    assert forwards == backwards[::-1]
    assert work.train(ada).train_loss > 0.0


def test_a_client_sees_its_own_examples_alone(work: TorchWork) -> None:
    one, other = (bytes_of(work.train(task_of(work, client_of("ada", first)))) for first in (0, 20))
    assert one != other


def test_a_frozen_lora_A_comes_back_as_it_went(work: TorchWork) -> None:
    task = task_of(work, client_of("ada", 0), freezes_lora_A=True)
    trained = work.train(task).adapter
    for name, factors in trained.modules.items():
        assert np.array_equal(factors.lora_A, task.adapter.modules[name].lora_A)
        assert np.any(factors.lora_B != 0.0)


def test_the_penalty_of_a_client_that_may_prune_pulls_its_last_directions_down(work: TorchWork) -> None:
    def tail(adapter: Adapter) -> float:
        return float(
            sum(np.linalg.norm(f.lora_B[:, 2:]) * np.linalg.norm(f.lora_A[2:]) for f in adapter.modules.values())
        )

    def trained(penalty: float) -> Trained:
        learned = random_adapter(work.spec, 4, seed=3)
        options = MethodOptions("hetlora", prune_share=0.5, prune_penalty=penalty)
        return work.train(replace(task_of(work, client_of("ada", 0)), adapter=learned, method=options))

    plain, pruning = trained(0.0), trained(1.0)
    assert tail(pruning.adapter) < tail(plain.adapter)
    assert pruning.train_loss > plain.train_loss + 0.1, "the penalty is a part of it"


def test_what_diverges_is_told_apart(work: TorchWork) -> None:
    with pytest.raises(WorkDiverged, match="learning rate"):
        work.train(task_of(work, client_of("ada", 0), rate=1e30))


def test_validation_parts_are_of_the_training_data(work: TorchWork) -> None:
    adapter = task_of(work, client_of("ada", 0)).adapter
    held_out = EvaluationSet("validation", np.arange(12, 15))
    assert work.evaluate(adapter, held_out, scaling=1.0).num_examples == 3
    evaluated = work.evaluate(adapter, TEST, scaling=1.0)
    assert evaluated.num_examples == 16
    assert 0.0 <= evaluated.accuracy <= 1.0


def test_a_change_of_the_base_does_what_the_same_adapter_does(work: TorchWork) -> None:
    nothing = task_of(work, client_of("ada", 0)).adapter
    learned = random_adapter(work.spec, 4, seed=3)
    small = Adapter({n: Factors(f.lora_A, 0.1 * f.lora_B) for n, f in learned.modules.items()}, {})
    before = work.evaluate(nothing, TEST, scaling=1.0)
    by_adapter = work.evaluate(small, TEST, scaling=1.0)
    work.put_base(accumulated({}, small.modules))
    by_base = work.evaluate(nothing, TEST, scaling=1.0)
    work.put_base(accumulated(accumulated({}, small.modules), small.modules))
    twice = work.evaluate(nothing, TEST, scaling=1.0)
    work.put_base({})
    assert by_base.loss == pytest.approx(by_adapter.loss, rel=1e-5)
    assert len({before.loss, by_base.loss, twice.loss}) == 3
    assert work.evaluate(nothing, TEST, scaling=1.0) == before


def test_a_base_that_was_put_back_is_the_original_bit_for_bit(work: TorchWork) -> None:
    task = task_of(work, client_of("ada", 0))
    original = bytes_of(work.train(task))
    change = accumulated({}, random_adapter(work.spec, 2, seed=5).modules)
    work.put_base({next(iter(change)): next(iter(change.values()))})
    assert bytes_of(work.train(task)) != original
    work.put_base({})
    assert bytes_of(work.train(task)) == original
