"""Local work without torch: softmax regression on points in the plane's higher sisters, a frozen matrix plus LoRA.

Small and real: losses fall, learning rates diverge, and the same task gives the same bytes. As a program it plays a
run, and waits for ever before the round that it is told to die in.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape, shrunk_rank
from coordinator.config import BaseModelConfig
from coordinator.federation.events import Event
from coordinator.stores.event_codec import event_of
from coordinator.stores.journal import SqlJournal
from simulation.contents import Contents
from simulation.experiment import ExperimentConfig
from simulation.local_work import BaseChange, Evaluated, EvaluationSet, LocalTask, Trained, WorkDiverged
from simulation.results import RunKey
from simulation.run import Material, Progress, play_on
from simulation.schedule import RunPlan

CLASSES, FEATURES = 8, 10
SPEC = AdapterSpec((ModuleShape("dense", CLASSES, FEATURES),), (TensorShape("bias", (CLASSES,)),))
DIGEST = "5eed" * 16
CONTENTS = Contents(train_examples="7ea1" * 16, test_examples="7e57" * 16, base_model=DIGEST)


class NumpyWork:
    """See simulation.local_work.LocalWork."""

    spec = SPEC
    base_model_digest = DIGEST

    def __init__(self, num_train: int = 400, num_test: int = 200) -> None:
        generator = np.random.default_rng(7)
        truth = generator.standard_normal((CLASSES, FEATURES))
        self._original = truth + generator.standard_normal(truth.shape)
        self.weight = self._original.copy()
        self._points = generator.standard_normal((num_train + num_test, FEATURES))
        self._labels = np.argmax(self._points @ truth.T, axis=1)
        self._num_train = num_train
        self.trained: list[tuple[str, int]] = []  # client id, rank: in the order of training

    @property
    def train_labels(self) -> list[int]:
        return [int(label) for label in self._labels[: self._num_train]]

    def train(self, task: LocalTask) -> Trained:
        self.trained.append((task.client.client_id, task.adapter.rank))
        factors = task.adapter.modules["dense"]
        lora_A, lora_B = factors.lora_A.astype(float), factors.lora_B.astype(float)
        bias = task.adapter.tensors["bias"].astype(float)
        rate, loss = task.plan.learning_rate, 0.0
        for _ in range(max(1, task.plan.training.local_steps)):
            with np.errstate(all="ignore"):
                loss, slope, slope_bias = self._slope(task.client.train, lora_B @ lora_A * task.scaling, bias)
                step_A, step_B = lora_B.T @ slope * task.scaling, slope @ lora_A.T * task.scaling
                if not task.plan.freezes_lora_A:
                    lora_A -= rate * step_A
                lora_B -= rate * step_B
                bias -= rate * slope_bias
                _prune(task, lora_A, lora_B)
            if not np.isfinite(loss) or not np.isfinite(lora_B).all():
                raise WorkDiverged(f"the loss is {loss}")
        adapter = Adapter({"dense": Factors(as_single(lora_A), as_single(lora_B))}, {"bias": as_single(bias)})
        return Trained(adapter, loss)

    def evaluate(self, adapter: Adapter, examples: EvaluationSet, *, scaling: float) -> Evaluated:
        factors = adapter.modules["dense"]
        indices = np.arange(self._num_train, len(self._labels)) if examples.indices is None else examples.indices
        change = factors.lora_B.astype(float) @ factors.lora_A.astype(float) * scaling
        logits = self._logits(indices, change, adapter.tensors["bias"].astype(float))
        loss = -np.log(_softmax(logits)[np.arange(len(indices)), self._labels[indices]]).mean()
        accuracy = np.mean(np.argmax(logits, axis=1) == self._labels[indices])
        return Evaluated(float(accuracy), float(loss), len(indices))

    def put_base(self, change: BaseChange) -> None:
        self.weight = self._original + change.get("dense", 0.0)

    def _logits(self, indices: Any, change: Any, bias: Any) -> NDArray[np.float64]:
        logits: NDArray[np.float64] = self._points[indices] @ (self.weight + change).T + bias
        return logits

    def _slope(self, indices: Any, change: Any, bias: Any) -> tuple[float, Any, Any]:
        wrong = _softmax(self._logits(indices, change, bias))
        rows = np.arange(len(indices))
        loss = -np.log(wrong[rows, self._labels[indices]]).mean()
        wrong[rows, self._labels[indices]] -= 1.0
        return float(loss), wrong.T @ self._points[indices] / len(indices), wrong.mean(axis=0)


def as_single(array: NDArray[np.float64]) -> NDArray[np.float32]:
    return array.astype(np.float32)


def _prune(task: LocalTask, lora_A: NDArray[np.float64], lora_B: NDArray[np.float64]) -> None:
    """One step down HetLoRA's penalty on the high directions."""
    kept = shrunk_rank(lora_B.shape[1], task.method.prune_share)
    tail_A, tail_B = float(np.linalg.norm(lora_A[kept:])), float(np.linalg.norm(lora_B[:, kept:]))
    if task.method.prune_penalty > 0.0 and tail_A > 0.0 and tail_B > 0.0:
        step = task.plan.learning_rate * task.method.prune_penalty
        lora_A[kept:] *= max(0.0, 1.0 - step * tail_B / tail_A)
        lora_B[:, kept:] *= max(0.0, 1.0 - step * tail_A / tail_B)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def material_on(work: NumpyWork, groups: Sequence[str] | None = None) -> Material:
    model = BaseModelConfig(base_model="points", task="sequence-classification", labels=tuple("abcdefgh"))
    return Material(model, ("dense",), (), work.train_labels, groups, CONTENTS, lambda _: work)


def run_plan(
    *, method: Mapping[str, Any] = {"method": "raflora"}, stage: str = "same", seed: int = 3, **changes: Any
) -> RunPlan:
    """A run of 12 clients; `clients__per_round=6` changes one setting of the experiment."""
    settings: dict[str, Any] = {
        "name": "points",
        "model": {"path": "points", "task": "sequence-classification"},
        "data": {"train": "points.jsonl", "test": "points.jsonl", "labels": list("abcdefgh"), "validation": 0.2},
        "clients": {"count": 12, "ranks": [2, 4, 8], "per_round": 6, "min_examples": 4},
        "rounds": {"num_rounds": 4, "evaluate_every": 2},
        "training": {"learning_rate": 0.5, "local_steps": 3},
        "arms": [{"name": "arm", **method}],
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    experiment = ExperimentConfig.model_validate(settings)
    training = experiment.training
    return RunPlan(RunKey(stage, "arm", training.learning_rate, training.decay, seed), experiment.arms[0], experiment)


def journal_of(folder: Path) -> list[Event]:
    """The events of a run that was played in the folder."""
    journal = SqlJournal(f"sqlite:///{folder / 'journal.sqlite'}")
    try:
        return [event_of(entry) for entry in journal.read("points")]
    finally:
        journal.close()


class Sleeper(NumpyWork):
    """Falls asleep in the middle of a round, so that it can be killed there."""

    def __init__(self, at_training: int) -> None:
        super().__init__()
        self._at_training = at_training

    def train(self, task: LocalTask) -> Trained:
        if len(self.trained) == self._at_training:
            print("asleep", flush=True)
            time.sleep(600)
        return super().train(task)


def main(folder: str, method: str, at_training: str) -> None:
    plan = run_plan(method={"method": method})
    play_on(plan, material_on(Sleeper(int(at_training))), Path(folder), told)


def told(progress: Progress) -> None:
    print(replace(progress, accuracy=0.0), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
