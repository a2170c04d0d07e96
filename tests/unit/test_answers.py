"""When two texts are the same answer, and which choice of a record is the right one."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from worker.config import DataConfig
from worker.trainer.answers import Choices, answered_number, choices_of, substance
from worker.trainer.data import DataError, Row
from worker.trainer_protocol import EXACT, LAST_NUMBER

CONFIG = DataConfig(test="test.jsonl")
CITIES = ["Paris", "Rome", "Oslo"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = 24 clips.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50 in all", "1234.50"),
        ("#### 42\n\nQuestion: 7 apples and 3 pears?\n#### 10", "42"),  # a model that goes on asking
        ("so it is 5 ####", "5"),
        ("first 3, then 18.", "18"),
        ("It cost $-5, no: -$5", "-5"),
        ("7-2 is 5, and 7-2", "2"),
        ("x = -12", "-12"),
        ("#### \u22125", "-5"),
        ("it is \u2212$1,200.5", "-1200.5"),
        ("7\u22122 is 5, and 7\u22122", "2"),
        ("half is .5", ".5"),
        ("in 2026, 1000000000000000000001", "1000000000000000000001"),
    ],
)
def test_the_number_of_an_answer_is_the_marked_one_or_the_last(text: str, number: str) -> None:
    assert answered_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "#### none", "..., $ -"])
def test_an_answer_without_a_number_has_none(text: str) -> None:
    assert answered_number(text) is None


@pytest.mark.parametrize(
    ("match", "answer", "response", "is_right"),
    [
        (LAST_NUMBER, "therefore 72.0", "#### 72", True),
        (LAST_NUMBER, "#### 1234", "1,234", True),
        (LAST_NUMBER, "#### 73", "#### 72", False),
        (LAST_NUMBER, "I do not know", "#### 72", False),
        (EXACT, "  the  same\nwords ", "the same words", True),
        (EXACT, "72.0", "72", False),
        (EXACT, "The same words", "the same words", False),
    ],
)
def test_answers_are_compared_by_what_counts(match: str, answer: str, response: str, is_right: bool) -> None:
    assert (substance(match, answer) == substance(match, response)) is is_right


def row(choices: Any, answer: Any) -> Row:
    return Row("test.jsonl, line 7", Path(), {"choices": choices, "answer": answer})


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (CITIES, 1, 1),
        (CITIES, "1", 1),
        (CITIES, "B", 1),
        (CITIES, " Rome ", 1),
        (tuple(CITIES), 0, 0),
        (json.dumps(CITIES), "C", 2),  # a cell of a csv file
        (["2", "1", "0"], "1", 1),  # a text wins over a number
        (["B", "A"], "A", 1),  # and over a letter
        ({"text": CITIES, "label": ["1", "2", "3"]}, "1", 0),  # as in ARC
        ({"text": CITIES, "label": ["A", "B", "C"]}, "C", 2),
    ],
)
def test_the_right_choice_is_named_by_text_label_letter_or_number(choices: Any, answer: Any, right: int) -> None:
    assert choices_of(row(choices, answer), CONFIG) == Choices(tuple(_texts(choices)), right)


def _texts(choices: Any) -> list[str]:
    choices = json.loads(choices) if isinstance(choices, str) else choices
    return list(choices["text"] if isinstance(choices, dict) else choices)


@pytest.mark.parametrize(
    ("choices", "answer", "sentence"),
    [
        (CITIES, 3, "column 'answer' holds 3, which names none of the 3 choices ('Paris', 'Rome', 'Oslo')"),
        (CITIES, -1, "which names none"),
        (CITIES, "Bern", "holds 'Bern', which names none"),
        (CITIES, True, "which names none"),
        (CITIES, "D", "its letter (A is the first) or its number (0 is the first)"),
        (["Paris"], 0, "column 'choices' holds ['Paris']; a list of two or more texts is expected"),
        (["Paris", " "], 0, "a list of two or more texts"),
        (["Paris", 7], 0, "a list of two or more texts"),
        ("Paris, Rome", 0, "holds 'Paris, Rome'; a list of texts is expected, in csv as JSON"),
        (7, 0, "column 'choices' holds 7; a list of texts is expected"),
        ({"texts": CITIES}, 0, "a list of texts is expected"),
    ],
)
def test_choices_that_cannot_be_meant_say_where_and_what_is_expected(choices: Any, answer: Any, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        choices_of(row(choices, answer), CONFIG)
    assert str(error.value).startswith("test.jsonl, line 7: column")
    assert sentence in str(error.value)


def test_a_missing_column_lists_those_there_are() -> None:
    with pytest.raises(DataError, match="column 'choices' does not exist; there are question"):
        choices_of(Row("test.jsonl, line 1", Path(), {"question": "?"}), CONFIG)
