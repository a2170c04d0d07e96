"""trl's SFTTrainer made exact, and the batches that it takes.

The mean is over all tokens to be learnt of a whole batch, in however many parts it is computed. Many logits are never
in memory at once: trl's fused head computes each token's log-probability from the hidden states, and once more on the
way back. Few are computed once, by the model's own loss, which is faster.
Nothing is sent to anybody, and the model is left as it was found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from worker.trainer.trainers import OneDevice

MAX_LOGITS_BYTES = 256 << 20  # of one part of a batch; a loss holds a few times as much
_LOGIT_BYTES = 4  # losses are computed in float32
NOT_LEARNT = -100  # the label of a token without loss, as everywhere in transformers


class LanguageArguments(OneDevice, SFTConfig):
    """trl's, for examples that are tokens already."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **settings,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=None,  # type: ignore[arg-type] # trl would turn it on; the model's loader decides
            router_aux_loss_coef=0.0,  # of mixtures of experts: a mean over each part would depend on the parts
        )


class LanguageCollator:
    """Makes a batch of examples of tokens: padded on the right, or rows of packed ones that do not see each other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pad = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
        self._pad_packed = DataCollatorForLanguageModeling(tokenizer.pad_token_id, return_position_ids=True)

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """`input_ids` and `labels` [batch, tokens], and `attention_mask`, or if packed `position_ids`, likewise."""
        if "seq_lengths" not in examples[0]:
            padded: dict[str, Any] = self._pad(examples)
            return padded
        packed: dict[str, Any] = self._pad_packed(examples)
        # Positions that begin anew part the examples of a row, but transformers looks at them only without a mask.
        del packed["attention_mask"]
        return packed


class LanguageTrainer(SFTTrainer):
    """Accumulates a batch from parts as if it had been one: every token to be learnt weighs the same."""

    arguments_class = LanguageArguments
    loss_is_scaled_for_ga = True  # type: ignore[assignment] # by the tokens of the whole batch
    extra_loss: Callable[[], torch.Tensor] | None = None  # of the parameters alone; counts once for a batch

    def __init__(
        self,
        *,
        model: Any,
        data_collator: LanguageCollator,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **settings: Any,
    ) -> None:
        self._undo = _forward_restorer(model.get_base_model())
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        train, test = (None if data is None else as_dataset(data) for data in (train_dataset, eval_dataset))
        super().__init__(
            model=model,
            data_collator=data_collator,
            processing_class=data_collator.tokenizer,
            train_dataset=test if train is None else train,  # trl insists on one, to evaluate too
            eval_dataset=test,
            **settings,
        )
        # Over a quantised base trl makes LoRA bfloat16, too coarse for small steps and for what is sent.
        for parameter, values in trained:
            parameter.data = values
        self._vocabulary: int = model.get_base_model().config.get_text_config().vocab_size
        self.model_accepts_loss_kwargs = True  # so the tokens of the whole batch are counted, whatever the model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the whole batch's mean loss."""
        own = self._vocabulary * inputs["labels"].numel() * _LOGIT_BYTES <= MAX_LOGITS_BYTES
        compute: Any = super(SFTTrainer, self).compute_loss if own else super().compute_loss
        found: Any = compute(model, inputs, return_outputs, num_items_in_batch)
        if self.extra_loss is None:
            return found
        loss, *outputs = found if return_outputs else (found,)
        tokens = inputs["labels"][:, 1:].ne(NOT_LEARNT).sum()
        share = 1.0 if num_items_in_batch is None else tokens / num_items_in_batch
        loss = loss + share * self.extra_loss()
        return (loss, *outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,  # noqa: ARG002 # the Trainer passes it by position
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """No loss, and for each example [sum of losses, tokens that were right] and its number of tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = model(**inputs, fused_lm_head=True)
        tokens = found.label_mask.sum(dim=1)
        sums = torch.stack((-found.log_probs.float().sum(dim=1), found.is_top1.float().sum(dim=1)), dim=1)
        return None, sums, tokens

    def close(self) -> None:
        """Leaves the model as it was before there was this trainer."""
        self._undo()

    def _send_telemetry(self) -> None:
        """trl would tell its makers the kind of model, the GPU and more, at every round."""


def as_dataset(examples: Sequence[Any]) -> Dataset:
    """The examples as trl insists on having them; in memory, for nothing of a site's data is written to a disk here."""
    return examples if isinstance(examples, Dataset) else Dataset.from_list(list(examples))


@contextmanager
def fused_head(base: Any) -> Iterator[None]:
    """While it lasts `base(..., fused_lm_head=True)` computes as in training."""
    undo = _forward_restorer(base)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    try:
        yield
    finally:
        undo()


def _forward_restorer(base: Any) -> Callable[[], None]:
    """Takes back what trl does to a model's forward: round after round it would call itself one level deeper."""
    own = vars(base).get("forward")  # accelerate's or nobody's; else it is the class's

    def restore() -> None:
        if own is None:
            vars(base).pop("forward", None)
        else:
            base.forward = own

    return restore
