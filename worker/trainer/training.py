"""One round of local work: train the live adapter, or evaluate it, with transformers' Trainer.

The optimizer is new each round, the learning rate constant within it (the coordinator lowers it over the rounds).
The same adapter, plan and data give the same bytes on a CPU. No checkpoint, no log file, no report to anybody.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.adapter import shrunk_rank
from common.errors import InvalidRequest, RafloraError
from worker.trainer.data import Example
from worker.trainer.fitting import largest_divisor
from worker.trainer.group import ALONE, Group
from worker.trainer.group_training import for_group, own_batch, share_of
from worker.trainer.model import AdaptedModel, live_factors, set_dropout
from worker.trainer.task import Collator
from worker.trainer_protocol import Plan

MAX_SEED = 1 << 32  # numpy's limit

Report = Callable[[int, int, float], None]  # step, total_steps, train_loss; what it raises ends the work


class Diverged(RafloraError):
    """The loss or a factor is no longer a finite number; a smaller learning rate may help."""

    reason = "diverged"


@dataclass(frozen=True)
class Outcome:
    """What a round of local work measured."""

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Pruning:
    """HetLoRA's loss term: weak high directions are pushed to nothing, so that they can be cut off afterwards.

    penalty * sum over modules of ||lora_B[:, t:]||_F ||lora_A[t:]||_F, with t = floor(share * rank). With t = 0 there
    is no rank to shrink to, and no term.
    """

    share: float  # of its rank that a client may shrink to
    penalty: float


def train(
    model: AdaptedModel,
    examples: Sequence[Example],
    plan: Plan,
    *,
    collator: Collator,
    memory_batch: int | None,
    report: Report,
    pruning: Pruning | None = None,
    group: Group = ALONE,
) -> Outcome:
    """Trains the live adapter in place. Raises Diverged.

    `memory_batch` is how many examples fit at once; the plan's batch is accumulated from equal parts of at most
    that size, so it is the same batch on every machine. With `pruning` its term is a part of the train_loss.
    In a group every process calls this, and each computes its part of every batch.
    """
    if plan.batch_size < 1 or (plan.local_steps < 1 and plan.local_epochs <= 0):
        raise InvalidRequest(f"plan: nothing to do in {plan}")
    set_dropout(model, plan.lora_dropout)
    own = own_batch(plan.batch_size, group)
    part = largest_divisor(own, at_most=memory_batch or own)
    duration = {"max_steps": plan.local_steps} if plan.local_steps else {"num_train_epochs": plan.local_epochs}
    with tempfile.TemporaryDirectory() as unused:
        arguments = _arguments(
            model,
            output_dir=unused,  # the Trainer insists on a folder; nothing is written to it
            per_device_train_batch_size=part * group.size,  # what the group computes at once
            gradient_accumulation_steps=own // part,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=plan.warmup_steps,
            weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm,
            seed=plan.seed % MAX_SEED,
            data_seed=plan.seed % MAX_SEED,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,  # a loss that is not finite must be seen, not smoothed over
            **duration,
        )
        kind = for_group(model.task.trainer_class, group)
        trainer = _trainer(model, arguments, collator, [_Watch(report)], kind, train_dataset=examples)
        if pruning is not None and shrunk_rank(model.rank, pruning.share) > 0:
            trainer.extra_loss = lambda: _pruning_loss(model, pruning)
        started = time.monotonic()
        with _lora_A_frozen(model) if plan.freezes_lora_A else nullcontext():
            result = _run(model, trainer, trainer.train)
        seconds = time.monotonic() - started
    for name, parameter in model.live.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise Diverged(f"{name} holds numbers that are not finite after training; lower the learning rate")
    return Outcome({"train_loss": float(result.training_loss)}, seconds)


def evaluate(
    model: AdaptedModel,
    examples: Sequence[Example],
    *,
    collator: Collator,
    memory_batch: int | None,
    report: Report,
    group: Group = ALONE,
) -> Outcome:
    """The live adapter's `eval_loss` and the task's metrics on these examples. Raises Diverged.

    In a group every process evaluates a part, and all get the metrics of the whole.
    """
    mine, share = share_of(examples, group)
    most = model.task.evaluation_batch
    with tempfile.TemporaryDirectory() as unused:
        arguments = _arguments(
            model,
            output_dir=unused,
            per_device_eval_batch_size=min(memory_batch or most, most),
        )
        trainer = _trainer(
            model,
            arguments,
            collator,
            [_Watch(report)],
            eval_dataset=mine,
            compute_metrics=lambda prediction: model.task.metrics(share.gathered(prediction)),
        )
        started = time.monotonic()
        found = _run(model, trainer, trainer.evaluate)
        seconds = time.monotonic() - started
    found["eval_loss"] = share.mean(found["eval_loss"])
    if not math.isfinite(found["eval_loss"]):
        raise Diverged(f"the evaluation loss is {found['eval_loss']}")
    measured = {name for name in found if name.startswith("eval_")} - _SPEED
    metrics = {name.removeprefix("eval_"): float(found[name]) for name in measured}
    metrics["eval_loss"] = metrics.pop("loss")
    return Outcome(metrics, seconds)


# What the Trainer adds to the task's metrics.
_SPEED = {
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
}


class _Watch(TrainerCallback):
    """Reports progress and stops at the first loss that is not finite."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._predicted = 0
        self._loss = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 # the Trainer passes it by position
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """After each optimizer step."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} at step {state.global_step} of {state.max_steps}; "
                f"the learning rate was {args.learning_rate:g}, a smaller one may help"
            )
        self._loss = loss
        self._report(state.global_step, state.max_steps, loss)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """After each part of a batch that is accumulated: a large batch must not work on unheard."""
        self._report(state.global_step, state.max_steps, self._loss)

    def on_prediction_step(self, *_: Any, eval_dataloader: Any = None, **__: Any) -> None:
        """After each batch of an evaluation."""
        self._predicted += 1
        self._report(self._predicted, len(eval_dataloader), 0.0)


def _arguments(model: AdaptedModel, **more: Any) -> Any:
    # What is quantised is no floating-point number; the rest says how it is computed with.
    frozen = (p for p in model.live.parameters() if not p.requires_grad and p.is_floating_point())
    dtype = next(p.dtype for p in frozen)
    arguments = model.task.trainer_class.arguments_class(
        **more,
        use_cpu=model.device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=model.device.type == "cuda",
    )
    arguments.chosen = model.device
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    return arguments


def _trainer(
    model: AdaptedModel,
    arguments: TrainingArguments,
    collator: Collator,
    callbacks: list[TrainerCallback],
    kind: Any = None,
    **more: Any,
) -> Any:
    trainer = (kind or model.task.trainer_class)(
        model=model.live, args=arguments, data_collator=collator, callbacks=callbacks, **more
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _lora_A_frozen(model: AdaptedModel) -> Iterator[None]:
    """While it lasts only lora_B, and what is trained outside LoRA, learns: the optimizer never sees lora_A."""
    frozen = [lora_A for lora_A, _ in live_factors(model)]
    for lora_A in frozen:
        lora_A.requires_grad_(False)
    try:
        yield
    finally:
        # The live model serves other rounds and ranks after this one.
        for lora_A in frozen:
            lora_A.requires_grad_(True)


def _pruning_loss(model: AdaptedModel, pruning: Pruning) -> torch.Tensor:
    kept = shrunk_rank(model.rank, pruning.share)
    tails = [
        torch.linalg.matrix_norm(lora_B[:, kept:]) * torch.linalg.matrix_norm(lora_A[kept:])
        for lora_A, lora_B in live_factors(model)
    ]
    return pruning.penalty * torch.stack(tails).sum()


def _run(model: AdaptedModel, trainer: Any, work: Callable[[], Any]) -> Any:
    """Does the work and lets go of the gradients, whatever comes of it."""
    try:
        return work()
    finally:
        trainer.close()
        model.live.zero_grad(set_to_none=True)
