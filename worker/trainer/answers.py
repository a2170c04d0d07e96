"""What counts as a right answer: when two texts are the same answer, and which of a record's choices is the right one.

Pure functions over texts and rows; no model is asked here.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from worker.config import DataConfig
from worker.trainer.data import DataError, Row
from worker.trainer_protocol import LAST_NUMBER

_MARK = "####"  # GSM8K's, before the answer
# "-1,234.50" and "$.5"; the minus of "7-2" is no sign.
_MINUS = "\u2212"  # as LaTeX and books print it
_NUMBER = re.compile(rf"(?:(?<![\w.)])[-{_MINUS}])?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_FEWEST_CHOICES = 2
_SHOWN = 5  # choices in a message


@dataclass(frozen=True)
class Choices:
    """What a record lets one choose from."""

    texts: tuple[str, ...]
    right: int  # the index of the right one


def substance(match: str, text: str) -> str | Decimal | None:
    """What of an answer is compared: all but white space, or by "last-number" one number, if it has one."""
    return answered_number(text) if match == LAST_NUMBER else " ".join(text.split())


def answered_number(text: str) -> Decimal | None:
    """The number after the first `####` that has one after it, as GSM8K marks the answer, else the last one."""
    _, mark, marked = text.partition(_MARK)
    found = _NUMBER.search(marked) if mark else None
    if found is None:
        every = _NUMBER.findall(text)
        return _decimal(every[-1]) if every else None
    return _decimal(found[0])


def choices_of(row: Row, config: DataConfig) -> Choices:
    """The record's choices. Raises DataError.

    They are a list of texts, the same as JSON in a cell of a csv file, or `{"text": [...], "label": [...]}` as in
    ARC; the right one is named by its text or label, its letter, or its number from 0.
    """
    where = f"{row.where}: column {config.choices_column!r}"
    texts, labels = _texts_and_labels(row[config.choices_column], where)
    if len(texts) < _FEWEST_CHOICES or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where} holds {texts!r:.80}; a list of two or more texts is expected")
    answer = row[config.answer_column]
    right = _index_of(answer, texts, labels)
    if right is None:
        shown = ", ".join(map(repr, texts[:_SHOWN])) + (", ..." if len(texts) > _SHOWN else "")
        raise DataError(
            f"{row.where}: column {config.answer_column!r} holds {answer!r:.80}, which names none of the {len(texts)} "
            f"choices ({shown}); its text, its letter (A is the first) or its number (0 is the first) is expected"
        )
    return Choices(tuple(texts), right)


def _decimal(found: str) -> Decimal:
    return Decimal(found.replace("$", "").replace(",", "").replace(_MINUS, "-"))


def _texts_and_labels(value: Any, where: str) -> tuple[Sequence[Any], Sequence[Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where} holds {value!r:.80}; a list of texts is expected, in csv as JSON") from None
    labels: Any = ()
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, Sequence) or not isinstance(labels, Sequence):
        raise DataError(f"{where} holds {value!r:.80}; a list of texts is expected")
    return value, labels


def _index_of(answer: Any, texts: Sequence[str], labels: Sequence[Any]) -> int | None:
    """A text wins over a label, a label over a letter, a letter over a number."""
    named = answer.strip() if isinstance(answer, str) else str(answer)
    for names in (texts, labels, string.ascii_uppercase[: len(texts)]):
        for number, name in enumerate(names):
            if str(name).strip() == named and number < len(texts):
                return number
    if isinstance(answer, bool):
        return None
    try:
        number = int(named)
    except ValueError:
        return None
    return number if 0 <= number < len(texts) else None
