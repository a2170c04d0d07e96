"""What a causal language model says: greedy answers to prompts, and how likely it finds answers that are given.

The model is in evaluation mode meanwhile and as it was afterwards; nothing random is drawn, so that what is trained
next does not depend on it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from worker.trainer.model import AdaptedModel
from worker.trainer.modes import asked
from worker.trainer.task import longest_input
from worker.trainer.training import Report

Tokens = Sequence[int]


@dataclass(frozen=True)
class Writer:
    """How tokens become an answer, and when it is over."""

    tokenizer: Any
    max_new_tokens: int
    ends: Collection[int]  # tokens that end an answer, as training teaches it; the checkpoint may name more


@dataclass(frozen=True)
class Prompted:
    """A prompt and an answer to it that is given."""

    prompt: Tokens
    answer: Tokens  # at least one token


def generate(
    model: AdaptedModel, prompts: Sequence[Tokens], *, writer: Writer, batch: int, report: Report
) -> list[str]:
    """The likeliest next tokens after each prompt, one by one, to an end or `max_new_tokens`, as text.

    Of a prompt that leaves no room for the answer the last tokens are taken. `report` is called after every token,
    and what it raises ends the work.
    """
    tokenizer, max_new_tokens = writer.tokenizer, writer.max_new_tokens
    ends = _end_tokens(model, writer)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=filler,
    )
    room = longest_input(model.base) - max_new_tokens
    said = [""] * len(prompts)
    batches = _batches([len(prompt) for prompt in prompts], batch)
    with asked(model.live), _general_settings(model.base):
        for done, numbers in enumerate(batches):
            ids, mask = _padded([prompts[n][-room:] for n in numbers], filler, model.device, on_left=True)
            heard = StoppingCriteriaList([_Heard(partial(report, done, len(batches), 0.0))])
            out = model.base.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=heard,
                synced_gpus=False,  # each process of a group has prompts of its own
            )
            for number, tokens in zip(numbers, out[:, ids.shape[1] :].tolist(), strict=True):
                said[number] = tokenizer.decode(_until(tokens, ends), skip_special_tokens=True)
            report(done + 1, len(batches), 0.0)
    return said


def log_likelihoods(model: AdaptedModel, given: Sequence[Prompted], *, batch: int, report: Report) -> list[float]:
    """The natural logarithm of each answer's probability after its prompt. `report` is called after every batch."""
    longest = longest_input(model.base)
    texts = [[*one.prompt, *one.answer][-longest:] for one in given]
    found = [0.0] * len(given)
    batches = _batches([len(text) for text in texts], batch)
    with asked(model.live):
        for done, numbers in enumerate(batches):
            ids, mask = _padded([texts[n] for n in numbers], 0, model.device, on_left=False)
            logits = model.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, number in enumerate(numbers):
                end = len(texts[number])
                start = max(1, end - len(given[number].answer))  # nothing comes before the first token
                scores = torch.log_softmax(logits[row, start - 1 : end - 1].float(), dim=-1)
                found[number] = float(scores.gather(-1, ids[row, start:end, None]).sum())
            report(done + 1, len(batches), 0.0)
    return found


class _Heard(StoppingCriteria):
    """Stops nothing by itself: what it calls after every token may raise."""

    def __init__(self, hear: Callable[[], None]) -> None:
        self._hear = hear

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """One token more for each of the batch."""
        self._hear()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _general_settings(base: Any) -> Iterator[None]:
    """While it lasts the checkpoint's own settings for generation (penalties, sampling) count for nothing."""
    own = base.generation_config
    base.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        base.generation_config = own


def _end_tokens(model: AdaptedModel, writer: Writer) -> list[int]:
    """What ends an answer: what training ends it with, and what the checkpoint names besides."""
    named = getattr(model.base.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (*writer.ends, *named) if token is not None})


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The numbers of all texts, the longest first: little is padded, and what does not fit is known at once."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _padded(
    texts: Sequence[Tokens], filler: int, device: torch.device, *, on_left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [texts, longest]."""
    longest = max(len(text) for text in texts)
    ids, mask = [], []
    for text in texts:
        missing = longest - len(text)
        before, after = (missing, 0) if on_left else (0, missing)
        ids.append([filler] * before + list(text) + [filler] * after)
        mask.append([0] * before + [1] * len(text) + [0] * after)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)
