"""The real local work: one frozen model, adapters swapped in, and the very Trainer that a worker runs.

Kept loaded over all rounds and runs; nothing here draws, aggregates or writes a file.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.adapter import Adapter, AdapterSpec
from simulation.local_work import BaseChange, Evaluated, EvaluationSet, LocalTask, Trained, WorkDiverged
from simulation.prepare import Prepared
from worker.trainer.data import Example
from worker.trainer.model import AdaptedModel, load_model, read_adapter, write_adapter
from worker.trainer.task import Collator
from worker.trainer.training import Diverged, Pruning, evaluate, train
from worker.trainer_protocol import Plan


@dataclass(frozen=True)
class Examples:
    """All data of a simulation, prepared for the model."""

    train: Sequence[Example]
    test: Sequence[Example]
    collator: Collator


class TorchWork:
    """See LocalWork."""

    def __init__(self, model: AdaptedModel, examples: Examples) -> None:
        self._model = model
        self._examples = examples
        self._original: dict[str, torch.Tensor] = {}  # of the weights that a method has changed

    @property
    def spec(self) -> AdapterSpec:
        """See LocalWork."""
        return self._model.spec

    @property
    def base_model_digest(self) -> str:
        """See LocalWork."""
        return self._model.base_model_digest

    def train(self, task: LocalTask) -> Trained:
        """See LocalWork."""
        write_adapter(self._model, task.adapter, scaling=task.scaling)
        try:
            outcome = train(
                self._model,
                _Selection(self._examples.train, task.client.train.tolist()),
                _plan_of(task),
                collator=self._examples.collator,
                memory_batch=None,
                report=_unheard,
                pruning=_pruning_of(task),
            )
        except Diverged as error:
            raise WorkDiverged(str(error)) from error
        train_loss = outcome.metrics["train_loss"]
        return Trained(read_adapter(self._model), train_loss, outcome.metrics, outcome.seconds)

    def evaluate(self, adapter: Adapter, examples: EvaluationSet, *, scaling: float) -> Evaluated:
        """See LocalWork."""
        chosen = self._examples.test if examples.split == "test" else self._examples.train
        if examples.indices is not None:
            chosen = _Selection(chosen, examples.indices.tolist())
        write_adapter(self._model, adapter, scaling=scaling)
        try:
            outcome = evaluate(
                self._model, chosen, collator=self._examples.collator, memory_batch=None, report=_unheard
            )
        except Diverged as error:
            raise WorkDiverged(str(error)) from error
        return Evaluated(outcome.metrics["accuracy"], outcome.metrics["eval_loss"], len(chosen))

    def put_base(self, change: BaseChange) -> None:
        """See LocalWork."""
        for name in {*self._original, *change}:
            weight = self._weight_of(name)
            original = self._original.setdefault(name, weight.detach().clone())
            with torch.no_grad():
                if name in change:
                    # One rounding of the whole sum: what many rounds add up to does not drift.
                    added = torch.from_numpy(change[name]).to(weight.device)
                    weight.copy_(original.to(torch.float64) + added)
                else:
                    weight.copy_(original)

    def _weight_of(self, module: str) -> torch.nn.Parameter:
        layer: Any = self._model.base.get_submodule(module)
        weight: torch.nn.Parameter = layer.get_base_layer().weight
        return weight


class _Selection(Sequence[Example]):
    """Some of the examples, without a copy."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]) -> None:
        self._examples = examples
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: Any) -> Any:
        return self._examples[self._indices[position]]


def load_work(prepared: Prepared, *, lora_rank: int) -> TorchWork:
    """Loads the base model, in the state in which every run begins. Raises ModelError or InvalidRequest."""
    # The seed is that of PEFT's own first factors, which every slice replaces.
    model = load_model(prepared.model_config, prepared.order(lora_rank=lora_rank, seed=0))
    examples = Examples(prepared.train_examples, prepared.test_examples, prepared.collator_for(model))
    work = TorchWork(model, examples)
    # The Trainer collects garbage after every round; what stays for ever need not be looked at each time.
    gc.collect()
    gc.freeze()
    return work


def _plan_of(task: LocalTask) -> Plan:
    """What a worker would read from the wire."""
    plan, training = task.plan, task.plan.training
    return Plan(
        learning_rate=plan.learning_rate,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        batch_size=training.batch_size,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=training.warmup_steps,
        seed=plan.seed,
        freezes_lora_A=plan.freezes_lora_A,
    )


def _pruning_of(task: LocalTask) -> Pruning | None:
    method = task.method
    return Pruning(method.prune_share, method.prune_penalty) if method.prune_penalty > 0.0 else None


def _unheard(*_: object) -> None:
    """Nobody waits for a step of a simulated client."""
