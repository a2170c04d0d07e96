"""transformers' Trainer made exact, and its arguments bound to the device that the site chose.

What a batch teaches does not depend on how many parts it is computed in. Nothing here decides what is trained.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


class OneDevice:
    """Training on the device that the site chose; the Trainer would take every GPU that it sees."""

    chosen: torch.device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """The model's device."""
        _ = super().device  # type: ignore[misc] # of TrainingArguments; sets up accelerate's state
        # Accelerate would go by its own choice, and refuse quantised weights that lie elsewhere.
        self.distributed_state.device = self.chosen  # type: ignore[attr-defined] # set up by now
        return self.chosen

    @property
    def n_gpu(self) -> int:
        """One at most, so that nothing is replicated."""
        return int(self.chosen.type == "cuda")


class OneDeviceArguments(OneDevice, TrainingArguments):
    """The Trainer's."""


class ExactTrainer(Trainer):
    """Accumulates a batch from parts as if it had been one: every example weighs the same, in a short part too.

    The Trainer would leave the division to any model whose forward takes `**kwargs`; classifiers do not divide.
    """

    arguments_class = OneDeviceArguments
    extra_loss: Callable[[], torch.Tensor] | None = None  # of the parameters alone; counts once for a batch

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model_accepts_loss_kwargs = True  # so the examples of the whole batch are counted, whatever the model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the whole batch's mean loss."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.extra_loss is not None:
            loss = loss + self.extra_loss()
        if num_items_in_batch is not None:
            loss = loss * (len(inputs["labels"]) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def close(self) -> None:
        """Leaves the model as it was before there was this trainer."""
