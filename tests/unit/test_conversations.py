"""What a language model sees of a record: pure functions over rows, with a chat template of four lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from worker.config import DataConfig
from worker.trainer.conversations import (
    Conversation,
    Indistinct,
    Instruction,
    Message,
    PlainText,
    check_reading,
    format_of,
    read_record,
    render,
)
from worker.trainer.data import DataError, Row

ASKED, TOLD = Message("user", "2 + 3?"), Message("assistant", "5")


def config(**more: Any) -> DataConfig:
    return DataConfig(train="train.jsonl", **more)


def row(**values: Any) -> Row:
    return Row("train.jsonl, line 7", Path(), values)


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "response": "b"}, "prompt-response"),
        ({"messages": [], "prompt": "a"}, "messages"),
        ({"text": "a"}, "text"),
        ({"text": "a", "prompt": None, "response": None}, "text"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 0}, "prompt-response"),
        ({"prompt": "a", "response": "b", "text": "c"}, "prompt-response"),
    ],
)
def test_the_columns_decide_the_format(values: dict[str, Any], expected: str) -> None:
    assert format_of(row(**values), config()) == expected


def test_what_the_site_names_wins_over_the_columns() -> None:
    assert format_of(row(prompt="a", response="b", text="c"), config(format="text")) == "text"


def test_unknown_columns_are_listed_with_what_to_set() -> None:
    with pytest.raises(DataError, match=r"line 7: the columns are question, answer; .*data.prompt_column"):
        format_of(row(question="a", answer="b"), config())


def test_a_prompt_stands_in_its_template_and_braces_mean_nothing_else() -> None:
    settings = config(prompt_column="q", response_column="a", prompt_template='{"x"} Q: {prompt}\nA: ')
    record = read_record(row(q="{prompt} {0}?", a="yes"), settings, "prompt-response")
    assert record == Instruction('{"x"} Q: {prompt} {0}?\nA: ', "yes")


def test_prompt_and_response_can_be_two_turns() -> None:
    record = read_record(row(prompt="2 + 3?", response="5"), config(chat=True), "prompt-response")
    assert record == Conversation((ASKED, TOLD))


def test_the_response_of_a_question_with_choices_is_the_right_one() -> None:
    record = read_record(row(prompt="2 + 3?", choices=["4", "5"], answer="B"), config(), "prompt-response")
    assert record == Instruction("2 + 3?", "5")


def test_a_text_is_as_it_is() -> None:
    assert read_record(row(text=" a\n"), config(), "text") == PlainText(" a\n")


@pytest.mark.parametrize("column", ["prompt", "response"])
@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_column_is_refused_by_its_name(column: str, text: str | None) -> None:
    values = {"prompt": "a", "response": "b"} | {column: text}
    with pytest.raises(DataError, match=f"train.jsonl, line 7: column '{column}' is empty"):
        read_record(row(**values), config(), "prompt-response")


def test_a_missing_column_lists_those_there_are() -> None:
    with pytest.raises(DataError, match="column 'response' does not exist; there are prompt, answer"):
        read_record(row(prompt="a", answer="b"), config(), "prompt-response")


def test_a_number_is_no_text() -> None:
    with pytest.raises(DataError, match="column 'response' holds 5; a text is expected"):
        read_record(row(prompt="a", response=5), config(), "prompt-response")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "a list of"),
        ([], "a list of"),
        (["hello"], "message 1 is 'hello'"),
        ([{"from": "human", "value": "hello"}], "message 1 has no role and no content; its keys are from, value"),
        ([{"role": "user", "content": None}], "message 1 has no content"),
        ([{"role": "user", "content": " "}], "message 1: content is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "a text is expected"),
        (turns(ASKED, Message("bot", "5")), "message 2: role 'bot'; one of system, user, assistant, tool"),
        (turns(TOLD), "begins with the assistant's turn"),
        (turns(ASKED), "has no turn of the assistant"),
        ([*turns(ASKED), {"role": "assistant", "content": "5", "tool_calls": [{}]}], "message 2 has tool_calls"),
    ],
)
def test_malformed_messages_are_refused_by_file_line_column_and_message(messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 7: column 'messages'") as caught:
        read_record(row(messages=messages), config(), "messages")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("settings", [{"prompt_template": "Q:"}, {"prompt_template": "Q: {prompt}", "chat": True}])
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_template"):
        check_reading(config(**settings))


# ---------------------------------------------------------------- where the assistant's turns stand


def chatml(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    text = "".join(f"[{message.role}]\n{message.content}<end>\n" for message in messages)
    return text + ("[assistant]\n" if add_generation_prompt else "")


def forgetful(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """As Qwen 3's: only the last answer keeps its thoughts."""
    last = len(messages) - 1
    thoughts = ["<think/>" if n == last and m.role == "assistant" else "" for n, m in enumerate(messages)]
    text = "".join(f"[{m.role}]{t}{m.content}<end>" for t, m in zip(thoughts, messages, strict=True))
    return text + ("[assistant]" if add_generation_prompt else "")


def said(conversation: Conversation, template: Any) -> list[str]:
    rendered = render(conversation, template, "line 7")
    return [rendered.text[start:end] for start, end in rendered.learnt]


def test_the_assistants_turns_are_learnt_with_their_ends_and_nothing_else() -> None:
    conversation = Conversation(
        (Message("system", "Add."), ASKED, TOLD, Message("user", "6?"), Message("assistant", "7"))
    )
    assert said(conversation, chatml) == ["5<end>", "7<end>"]


def test_what_the_assistant_says_is_found_by_its_place_and_not_by_its_words() -> None:
    again = Message("user", "5"), Message("assistant", "5")
    rendered = render(Conversation((ASKED, TOLD, *again)), chatml, "line 7")
    assert [start for start, _ in rendered.learnt] == [
        len("[user]\n2 + 3?<end>\n[assistant]\n"),
        len("[user]\n2 + 3?<end>\n[assistant]\n5<end>\n[user]\n5<end>\n[assistant]\n"),
    ]


def test_a_question_at_the_end_is_not_learnt() -> None:
    assert said(Conversation((ASKED, TOLD, Message("user", "And 7?"))), chatml) == ["5<end>"]


def test_thoughts_that_a_template_puts_before_the_only_answer_are_learnt_too() -> None:
    assert said(Conversation((ASKED, TOLD)), forgetful) == ["<think/>5<end>"]


def test_a_template_that_changes_its_mind_about_earlier_turns_is_refused() -> None:
    with pytest.raises(Indistinct, match=r"line 7: the chat template renders message 2 .*generation"):
        render(Conversation((ASKED, TOLD, ASKED, TOLD)), forgetful, "line 7")


def test_a_template_that_shows_the_question_anew_is_refused() -> None:
    def sorted_(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return chatml(sorted(messages, key=lambda m: m.role), add_generation_prompt=add_generation_prompt)

    with pytest.raises(Indistinct):
        render(Conversation((ASKED, TOLD)), sorted_, "line 7")
