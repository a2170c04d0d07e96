"""Errors: every class has a word and a status of its own, and the word finds the class again."""

from pathlib import Path

import grpc
import pytest

from common import errors
from common.errors import RafloraError, WrongOffset, by_reason

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RafloraError)]


def test_every_reason_is_unique_and_spelled_alike() -> None:
    reasons = [kind.reason for kind in CLASSES]
    assert len(set(reasons)) == len(reasons)
    for reason in reasons:
        assert reason.replace("_", "").isalpha()
        assert reason.islower()


@pytest.mark.parametrize("kind", CLASSES)
def test_every_code_is_a_grpc_status_of_a_failure(kind: type[RafloraError]) -> None:
    assert grpc.StatusCode[kind.code] is not grpc.StatusCode.OK


@pytest.mark.parametrize("kind", CLASSES)
def test_the_reason_finds_the_class(kind: type[RafloraError]) -> None:
    assert by_reason(kind.reason) is kind


def test_a_word_of_a_later_version_is_still_an_error() -> None:
    assert by_reason("out_of_luck") is RafloraError


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not RafloraError])
def test_the_table_at_the_top_lists_the_class_with_its_reason(kind: type[RafloraError]) -> None:
    rows = [line.split() for line in (errors.__doc__ or "").splitlines()]
    assert [kind.__name__, kind.reason] in [row[:2] for row in rows]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_can_be_made_from_its_message_alone(kind: type[RafloraError]) -> None:
    assert str(kind("client ada: no")) == "client ada: no"


def test_a_wrong_offset_carries_the_right_one() -> None:
    assert WrongOffset("chunk at 5", committed_bytes=3).committed_bytes == 3


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.reason not in {"internal", "config_invalid"}])
def test_the_protocol_page_lists_the_reason_with_its_status(kind: type[RafloraError]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert f"| `{kind.reason}` | {kind.code} |" in page


def test_every_error_of_every_room_has_a_word_of_its_own_kind() -> None:
    """Also of rooms that never speak to the wire: a class without a word would be found as RafloraError's."""
    pending, seen = list(RafloraError.__subclasses__()), []
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        seen.append(kind)
    assert [kind.__name__ for kind in seen if kind.reason == RafloraError.reason] == []
