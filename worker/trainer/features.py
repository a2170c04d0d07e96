"""The top of a text encoder with a frozen head, for texts whose features the layers below computed once.

An ordinary transformers model in an ordinary folder (config.json, model.safetensors), but of a type of our own, which
this file makes known; so no code ever comes with it. It reads no data and no text: its inputs are numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertEncoder

MODEL_TYPE = "raflora-features"
PROJECTION = "projection"  # the layer that LoRA goes on where no encoder layer is trained


class FeatureConfig(BertConfig):  # type: ignore[no-untyped-call] # transformers' own __init_subclass__
    """A BERT's shape; `num_hidden_layers` counts the layers on top of the features, 0 for pooled features."""

    model_type = MODEL_TYPE
    logit_scale: float = 20.0  # what a cosine is multiplied by

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any configuration; raises ValueError for one of another kind of model, which has no place here."""
        found = config_dict.get("model_type")
        if found != MODEL_TYPE:
            raise ValueError(f"its config.json describes a model of type {found!r}; {MODEL_TYPE!r} is expected")
        return super().from_dict(config_dict, **kwargs)


class FeatureClassifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Features -> body -> mean over the tokens -> length 1 -> cosine with each class, times the scale.

    The body is the identity map for pooled features [batch, hidden], or the encoder's top layers for token features
    [batch, tokens, hidden]. The rows of `classifier.weight` have length 1.
    """

    config_class = FeatureConfig
    base_model_prefix = "body"
    main_input_name = "features"
    _supports_sdpa = True

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__(config)
        self.body: Any = (
            BertEncoder(config) if config.num_hidden_layers else IdentityMap(config.hidden_size)  # type: ignore[no-untyped-call]
        )
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0), bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def embed(self, features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, hidden], each of length 1."""
        features = features.to(next(self.body.parameters()).dtype)
        if features.ndim == 2:
            return functional.normalize(self.body(features), dim=-1)
        if attention_mask is None:
            attention_mask = features.new_ones(features.shape[:2])
        is_token = attention_mask.bool()
        texts, longest, width = features.shape
        tokens = int(is_token.sum())
        # The cost of a token is in proportion to 6 x hidden (its linear layers) + what it may attend to.
        if tokens * (6 * width + tokens) < texts * longest * (6 * width + longest):
            sums = self._sum_of_packed(features, is_token)
        else:
            bias = _attention_bias(is_token[:, None, None, :], features.dtype)
            hidden = self.body(features, attention_mask=bias).last_hidden_state
            sums = (hidden * is_token.unsqueeze(-1)).sum(dim=1)
        # A mean and a sum differ by their length only, which becomes 1.
        return functional.normalize(sums, dim=-1)

    def _sum_of_packed(self, features: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """All tokens as one long text, in which each sees its own text alone: no work is done for padding."""
        text = is_token.nonzero()[:, 0]  # [tokens], to which each belongs
        bias = _attention_bias(text[:, None] == text[None, :], features.dtype)[None, None]
        hidden = self.body(features[is_token][None], attention_mask=bias).last_hidden_state[0]
        sums: torch.Tensor = hidden.new_zeros(len(features), hidden.shape[-1]).index_add(0, text, hidden)
        return sums

    def forward(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # [batch, tokens], 1 where there is a token
        labels: torch.Tensor | None = None,
        **_: Any,  # the Trainer says num_items_in_batch, and divides by it itself
    ) -> SequenceClassifierOutput:
        """The logits [batch, labels] and, given labels, the mean cross entropy."""
        embedded = self.embed(features, attention_mask).to(self.classifier.weight.dtype)
        logits = self.config.logit_scale * self.classifier(embedded)
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _attention_bias(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores: nothing, or so little that nothing is left."""
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill(~is_seen, torch.finfo(dtype).min)


class IdentityMap(nn.Module):
    """A linear layer that changes nothing until LoRA does."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[batch, hidden] as it came in, before LoRA."""
        mapped: torch.Tensor = self.projection(features)
        return mapped


def collate_features(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of `features` and `labels`; token features are padded with zeros to the longest and get a mask."""
    features: list[np.ndarray[Any, Any]] = [example["features"] for example in examples]
    labels = torch.tensor([example["labels"] for example in examples])
    if features[0].ndim == 1:
        return {"features": torch.from_numpy(np.stack(features)), "labels": labels}
    lengths = [len(each) for each in features]
    padded = np.zeros((len(features), max(lengths), features[0].shape[1]), dtype=np.float32)
    mask = np.zeros(padded.shape[:2], dtype=np.int64)
    for number, (each, length) in enumerate(zip(features, lengths, strict=True)):
        padded[number, :length] = each
        mask[number, :length] = 1
    return {"features": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask), "labels": labels}


AutoConfig.register(MODEL_TYPE, FeatureConfig, exist_ok=True)
