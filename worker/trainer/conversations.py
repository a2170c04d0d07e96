"""What a language model sees of a record, as text: an instruction, a conversation or plain text.

Pure: no tokenizer, no torch, no file. Every complaint names file, line and column, and what to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from worker.config import DataConfig
from worker.trainer.answers import choices_of
from worker.trainer.data import DataError, Row

PROMPT_RESPONSE, MESSAGES, TEXT = FORMATS = ("prompt-response", "messages", "text")
ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"
_AUTO = "auto"
_PLACE = "{prompt}"
_SHOWN = 60  # characters of what was found, in a message


class Indistinct(DataError):
    """The chat template does not tell what the assistant says from the rest."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Instruction:
    """What the model is given, and what it should answer."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """Turns, at least one of them the assistant's; never the first."""

    messages: tuple[Message, ...]

    @property
    def last_answer(self) -> int:
        """The number of the assistant's last turn."""
        return max(number for number, message in enumerate(self.messages) if message.role == ASSISTANT)


@dataclass(frozen=True)
class PlainText:
    """A text of which every token is learnt."""

    text: str


Record: TypeAlias = Instruction | Conversation | PlainText


class ChatTemplate(Protocol):
    """A tokenizer's chat template. Raises DataError if it refuses the turns."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The turns as one text; with the generation prompt, as the model is asked for the assistant's next turn."""
        ...


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text."""

    text: str
    learnt: tuple[tuple[int, int], ...]  # characters from, to: the assistant's turns and the ends of them


def check_reading(config: DataConfig) -> None:
    """Raises DataError if the settings for language models contradict each other."""
    if _PLACE not in config.prompt_template:
        raise DataError(f"data.prompt_template {config.prompt_template!r:.{_SHOWN}}: {_PLACE} must stand in it")
    if config.chat and config.prompt_template != _PLACE:
        raise DataError("data.prompt_template is for prompts without a chat template; leave it out, or data.chat")


def format_of(row: Row, config: DataConfig) -> str:
    """One of FORMATS: what the site names, or what the record's columns say. Raises DataError that lists them."""
    if config.format != _AUTO:
        return config.format
    there = {column for column, value in row.values.items() if value is not None}
    if config.messages_column in there:
        return MESSAGES
    if config.prompt_column in there and there & {config.response_column, config.choices_column}:
        return PROMPT_RESPONSE
    if config.text_column in there:
        return TEXT
    known = ", ".join(str(column) for column in row.values)
    raise DataError(
        f"{row.where}: the columns are {known}; a language model needs {config.prompt_column!r} and "
        f"{config.response_column!r}, or {config.messages_column!r}, or {config.text_column!r}: name yours with "
        "data.prompt_column and data.response_column, data.messages_column or data.text_column"
    )


def read_record(row: Row, config: DataConfig, kind: str) -> Record:
    """The record as one of FORMATS. Raises DataError."""
    if kind == MESSAGES:
        return Conversation(_messages(row, config.messages_column))
    if kind == TEXT:
        return PlainText(_text(row, config.text_column))
    prompt, response = _text(row, config.prompt_column), _response(row, config)
    if config.chat:
        return Conversation((Message("user", prompt), Message(ASSISTANT, response)))
    return Instruction(config.prompt_template.replace(_PLACE, prompt), response)


def render(conversation: Conversation, template: ChatTemplate, where: str) -> Rendered:
    """The conversation through the template, and where the assistant's turns stand in it.

    A turn begins where the text ends that would ask for it, so that training and generation see the same text
    before it. Raises Indistinct if the template renders the beginning differently when more follows.
    """
    messages = conversation.messages
    whole = template(messages, add_generation_prompt=False)
    learnt = []
    for number, message in enumerate(messages):
        if message.role != ASSISTANT:
            continue
        before = template(messages[:number], add_generation_prompt=True)
        is_last = number == len(messages) - 1
        until = whole if is_last else template(messages[: number + 1], add_generation_prompt=False)
        if not whole.startswith(before) or not whole.startswith(until) or len(before) >= len(until):
            raise Indistinct(
                f"{where}: the chat template renders message {number + 1} and what is before it differently when more "
                "follows, so what the assistant says cannot be told from the rest; put a chat_template.jinja that "
                "marks it with {% generation %} and {% endgeneration %} into the model's folder, or give "
                "conversations of one question and one answer"
            )
        # The line break that many templates put after a turn is not said by the assistant.
        learnt.append((len(before), max(len(before) + 1, len(until.rstrip()))))
    return Rendered(whole, tuple(learnt))


def _response(row: Row, config: DataConfig) -> str:
    """The response column, or of a question with choices the right one."""
    if row.values.get(config.response_column) is None and row.values.get(config.choices_column) is not None:
        choices = choices_of(row, config)
        return choices.texts[choices.right]
    return _text(row, config.response_column)


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{row.where}: column {column!r} holds {text!r:.{_SHOWN}}; a text is expected")
    if not text.strip():
        raise DataError(f"{row.where}: column {column!r} is empty; fill it or remove the record")
    return text


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    turns = row[column]
    where = f"{row.where}: column {column!r}"
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f'{where} holds {turns!r:.{_SHOWN}}; a list of {{"role": ..., "content": ...}} is expected')
    messages = tuple(_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, start=1))
    if messages[0].role == ASSISTANT:
        raise DataError(f"{where} begins with the assistant's turn; the user's or the system's is expected first")
    if all(message.role != ASSISTANT for message in messages):
        raise DataError(
            f"{where} has no turn of the assistant, so there is nothing to learn from it; remove the record"
        )
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'{where} is {turn!r:.{_SHOWN}}; {{"role": ..., "content": ...}} is expected')
    if missing := [key for key in ("role", "content") if turn.get(key) is None]:
        known = ", ".join(str(key) for key in turn)
        raise DataError(f"{where} has no {' and no '.join(missing)}; its keys are {known}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r:.{_SHOWN}}; one of {', '.join(ROLES)} is expected")
    if turn.get("tool_calls"):
        raise DataError(f"{where} has tool_calls, which are not rendered here; write them into its content")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {content!r:.{_SHOWN}}; a text is expected")
    if not content.strip():
        raise DataError(f"{where}: content is empty; fill it or remove the record")
    return Message(role, content)
