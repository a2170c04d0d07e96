"""What a group of processes does differently from one: each takes its part of every batch, and gradients are summed.

Every process runs the whole round as if it were alone, with the same order of examples, and sees of each batch only
its own part. The sum of the gradients is the gradient of the batch, whatever the number of processes; nothing is
averaged twice. Nothing here knows a kind of task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import EvalPrediction

from common.errors import InvalidRequest
from worker.trainer.group import Group

_NONE_OF_IT = "raflora_no_part"  # in a batch that stands in for none: it takes part in the step and counts nothing

Item = TypeVar("Item")


class _Numbers:
    """Stands for examples: each is only its number, so that nobody prepares what another process learns from."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> int:
        return number


class _PartCollator:
    """Makes a batch of this process's part of a list of examples, which come as their numbers."""

    def __init__(self, examples: Sequence[Any], collator: Any, group: Group) -> None:
        self._examples = examples
        self._collator = collator
        self._group = group

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """The part; of a short batch that has none for this process, one example that counts nothing."""
        mine = [numbers[place] for place in part_of(len(numbers), self._group)]
        batch: dict[str, Any] = self._collator([self._examples[number] for number in mine or numbers[:1]])
        return batch if mine else {**batch, _NONE_OF_IT: True}


class GroupSteps:
    """Before a Trainer's class: steps of a group."""

    group: Group
    train_dataset: Any
    data_collator: Any
    _flat: torch.Tensor | None = None  # all gradients and the loss, made once: later there may be no memory
    _loss: torch.Tensor | None = None

    def get_train_dataloader(self) -> Any:
        """The Trainer's, in the order of one process alone; of each batch comes this process's part."""
        examples, collator = self.train_dataset, self.data_collator
        self.train_dataset = _Numbers(len(examples))
        self.data_collator = _PartCollator(examples, collator, self.group)
        try:
            return super().get_train_dataloader()  # type: ignore[misc] # the Trainer's
        finally:
            self.train_dataset, self.data_collator = examples, collator

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        """The part's share of the whole batch's mean loss."""
        is_none = inputs.pop(_NONE_OF_IT, False)
        found = super().compute_loss(model, inputs, *rest, **more)  # type: ignore[misc] # the Trainer's
        if not is_none:
            return found
        return (0 * found[0], *found[1:]) if isinstance(found, tuple) else 0 * found

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The part's gradients; with the last part of a batch those of everybody, and the batch's loss."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self._flat is None:
            self._flat = torch.zeros(sum(p.numel() for p in trained) + 1, device=trained[0].device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._loss = loss if self._loss is None else self._loss + loss
        if not self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            return torch.zeros_like(loss)
        self.group.agree()
        total = self._sum(trained, self._loss)
        self._loss = None
        return total

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counted = [batch for batch in batch_samples if _NONE_OF_IT not in batch]
        mine = super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]
        return torch.tensor(self.group.agree(int(mine or 0)), device=device)

    def _sum(self, trained: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Makes every gradient that of the group. The group's loss."""
        flat = self._flat
        if flat is None:
            raise RuntimeError("no step was made")
        places = flat[:-1].split_with_sizes([p.numel() for p in trained])
        flat.zero_()
        for parameter, place in zip(trained, places, strict=True):
            if parameter.grad is not None:
                place.copy_(parameter.grad.reshape(-1))
        flat[-1] = loss
        self.group.add_up(flat)
        for parameter, place in zip(trained, places, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(place.view_as(parameter))
            elif bool(place.any()):
                parameter.grad = place.view_as(parameter).to(parameter.dtype).clone()
        return flat[-1].to(loss.dtype).clone()


@dataclass(frozen=True)
class EvaluationShare:
    """This process's part of an evaluation: rows of its own, in the order of all."""

    group: Group
    count: int  # how many of what it evaluates count; what stands in for none is not among them

    def gathered(self, prediction: EvalPrediction) -> EvalPrediction:
        """Everybody's predictions, in the order of the examples. Raises as the group does."""
        if self.group.size == 1:
            return prediction
        return EvalPrediction(self._rows(prediction.predictions), self._rows(prediction.label_ids))

    def mean(self, value: float) -> float:
        """The mean over all examples, of a mean over mine."""
        if self.group.size == 1:
            return value
        rows = self.group.gather_rows(np.array([[value * self.count, self.count]]))
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    def of_all(self, rows: Sequence[Any]) -> np.ndarray[Any, Any]:
        """Everybody's rows, one for each example."""
        return self.group.gather_rows(np.asarray(rows)[: self.count])

    def _rows(self, rows: Any) -> Any:
        return tuple(map(self._rows, rows)) if isinstance(rows, tuple) else self.of_all(rows)


def share_of(items: Sequence[Item], group: Group) -> tuple[Sequence[Item], EvaluationShare]:
    """What this process evaluates, prepared only when it is taken: at least one, so that all do the same."""
    if group.size == 1:
        return items, EvaluationShare(group, len(items))
    mine = part_of(len(items), group)
    share: Any = Subset(items, mine or range(1))  # type: ignore[arg-type] # anything with numbers will do
    return share, EvaluationShare(group, len(mine))


def part_of(count: int, group: Group) -> range:
    """This process's part of so many: all parts in the order of the processes are the whole, as even as can be."""
    return range(count * group.rank // group.size, count * (group.rank + 1) // group.size)


def own_batch(batch_size: int, group: Group) -> int:
    """How many examples of a batch are this process's. Raises InvalidRequest if it cannot be shared evenly."""
    if batch_size % group.size:
        below = batch_size // group.size * group.size
        near = [str(size) for size in (below, below + group.size) if size]
        raise InvalidRequest(
            f"plan: a batch of {batch_size} cannot be shared evenly by the {group.size} processes of this worker; "
            f"ask the operator for training.batch_size {' or '.join(near)}, or launch a number of processes that "
            f"divides {batch_size}"
        )
    return batch_size // group.size


def for_group(trainer_class: Any, group: Group) -> Any:
    """The Trainer's class for this process of a group; for one alone the one that is given."""
    if group.size == 1:
        return trainer_class
    return type(f"Group{trainer_class.__name__}", (GroupSteps, trainer_class), {"group": group})
