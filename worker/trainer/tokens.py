"""Text as the tokens of one tokenizer, and which of them a model is to learn.

The same record gives the same tokens on every day and every machine. Nothing is cut off here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from worker.trainer.chat_templates import REFUSALS, answer_ends, on_that_day
from worker.trainer.conversations import (
    ASSISTANT,
    Conversation,
    Indistinct,
    Instruction,
    Message,
    PlainText,
    Record,
    render,
)
from worker.trainer.data import DataError
from worker.trainer.language_trainer import NOT_LEARNT
from worker.trainer.task import ModelError

log = structlog.get_logger()


class Tokens:
    """Text as tokens, and which of them are to be learnt."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self._folder = folder
        self._variant: str | None = None  # not looked for yet
        self.ends = answer_ends(tokenizer)  # what an answer of this model is taught to end with, among them one

    def of_record(self, record: Record, where: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of one length; nothing comes before the first, so it is never learnt."""
        ids, labels = self._of_record(record, where)
        return ids, [NOT_LEARNT, *labels[1:]]

    def of_prompt(self, record: Instruction | Conversation, where: str) -> list[int]:
        """What comes before the (last) answer."""
        if isinstance(record, Instruction):
            return self._opening(record.prompt)
        text = self._template(where)(record.messages[: record.last_answer], add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def of_answer(self, text: str) -> list[int]:
        """Without anything before and after it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _opening(self, text: str) -> list[int]:
        """The beginning of a sequence; an end that some tokenizers add would end it before the answer."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self._end and not text.endswith(self.tokenizer.eos_token) else ids

    def _of_record(self, record: Record, where: str) -> tuple[list[int], list[int]]:
        match record:
            case Instruction():
                # Apart, as in generation: there no token reaches from the prompt into the answer.
                before, answer = self.of_prompt(record, where), [*self.of_answer(record.response), self._end]
                return before + answer, [NOT_LEARNT] * len(before) + answer
            case PlainText():
                ids = [*self._opening(record.text), self._end]
                return ids, ids
            case Conversation():
                return self._of_conversation(record, where)

    def _of_conversation(self, conversation: Conversation, where: str) -> tuple[list[int], list[int]]:
        text = self._template_text(where)
        if has_generation_markers(text):
            ids, learnt = self._marked(conversation, text, where)
        else:
            ids, learnt = self._compared(conversation, where)
        # A line break after the end of a turn, which some templates mark as the assistant's, is none of its words.
        last = max(n for n, is_learnt in enumerate(learnt) if is_learnt and self.tokenizer.decode(ids[n]).strip())
        if conversation.messages[-1].role == ASSISTANT and ids[last] not in self.ends:
            # This template ends a turn with no token that says so: without one an answer would never end.
            ids, learnt = [*ids[: last + 1], self._end], [*learnt[: last + 1], True]
        labels = [token if is_learnt else NOT_LEARNT for token, is_learnt in zip(ids, learnt, strict=True)]
        return ids, labels

    def _marked(self, conversation: Conversation, template: str, where: str) -> tuple[list[int], list[bool]]:
        """The assistant's turns as the template itself marks them."""
        with _refusals(where):
            found = self.tokenizer.apply_chat_template(
                [asdict(message) for message in conversation.messages],
                **on_that_day(template),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        learnt = [bool(number) for number in found["assistant_masks"]]
        if not any(learnt):
            raise DataError(f"{where}: the chat template marks nothing as the assistant's with {{% generation %}}")
        return list(found["input_ids"]), learnt

    def _compared(self, conversation: Conversation, where: str) -> tuple[list[int], list[bool]]:
        """The assistant's turns as they follow from rendering the conversation turn by turn."""
        try:
            rendered = render(conversation, self._template(where), where)
        except Indistinct:
            known = self._marked_variant()
            if not known:
                raise
            return self._marked(conversation, known, where)
        try:
            found = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise ModelError(
                f"{self._folder}: the tokenizer does not tell where its tokens stand; put tokenizer.json into it"
            ) from None
        spans = rendered.learnt
        learnt = [
            any(start < until and since < end for since, until in spans) for start, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), learnt

    def _marked_variant(self) -> str:
        """trl's variant of this template that renders every turn as if it were the last; empty if it knows none."""
        if self._variant is None:
            try:
                self._variant = get_training_chat_template(self.tokenizer) or ""
            except (ValueError, TemplateError):
                self._variant = ""
            if self._variant:
                log.info("chat template", why="earlier turns as if they were the last, by trl's variant of it")
        return self._variant

    def _template(self, where: str) -> "_Template":
        return _Template(self.tokenizer, self._template_text(where), where)

    def _template_text(self, where: str) -> str:
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self._folder}: the tokenizer has no chat template, which messages and data.chat need ({where}); "
                "put the chat_template.jinja of the model's chat variant into the folder, or use prompt and response "
                "columns with data.chat = false"
            )
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelError(f"{self._folder}: none of its chat templates can be chosen: {error}") from None


@dataclass(frozen=True)
class _Template:
    """worker.trainer.conversations.ChatTemplate of a tokenizer."""

    tokenizer: Any
    text: str
    where: str  # the record

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        with _refusals(self.where):
            text = self.tokenizer.apply_chat_template(
                [asdict(message) for message in messages],
                **on_that_day(self.text),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        return str(text)


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from None
