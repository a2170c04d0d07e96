"""What the operator lets organisations send: pure, by hand, with the clock as an argument."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from common.adapter import AdapterSpec, ModuleShape
from common.errors import InvalidRequest, NormTooLarge, QuotaExceeded, TooManyExamples
from coordinator.config import LimitsConfig
from coordinator.federation.state import Contribution, RoundRecord, State, Update
from coordinator.limits import (
    DAY_SECONDS,
    Ledger,
    OrganisationBounds,
    bounds_of,
    check_founding_size,
    partition_bounds,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64


def limits(**changes: Any) -> LimitsConfig:
    return LimitsConfig.model_validate(changes)


def row(organisation: str, **changes: Any) -> dict[str, Any]:
    return {"organisation": organisation, **changes}


def hospital(client_id: str) -> str:
    return client_id.partition(".")[0]


def ledger(state: State | None = None, now: float = 0.0, **changes: Any) -> Ledger:
    return Ledger(limits(**changes), hospital, state or State(), now)


def test_the_first_line_that_matches_replaces_what_it_sets() -> None:
    table = limits(
        max_examples=100,
        organisations=[row("charite", max_uploads=9), row("c*", max_examples=5), row("*", upload_bytes_per_day=7)],
    )
    assert bounds_of(table, "charite") == OrganisationBounds(100, 9, None)
    assert bounds_of(table, "clinic") == OrganisationBounds(5, 4, None)
    assert bounds_of(table, "bank") == OrganisationBounds(100, 4, 7)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("a", max_uploads=1), row("a", max_uploads=2)], "'a' never counts, because 'a' stands before it"),
        ([row("*", max_uploads=1), row("a", max_uploads=2)], "'a' never counts, because '\\*' stands before it"),
        ([row("a")], "'a' sets no limit"),
        ([row("[a", max_uploads=1)], "is no pattern"),
        ([row(" a", max_uploads=1)], "is no pattern"),
        ([row("a\x1b", max_uploads=1)], "is no pattern"),
        ([row("", max_uploads=1)], "at least 1 character"),
        ([row("a", max_uploads=0)], "greater than or equal to 1"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_at_the_start(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        limits(organisations=rows)


def test_more_examples_than_allowed_are_refused_with_one_line_in_the_log() -> None:
    book = ledger(max_examples=100, organisations=[row("bank", max_examples=5)])
    book.check_examples("clinic.1", 100)
    book.check_examples("bank.1", 5)
    with capture_logs() as lines, pytest.raises(TooManyExamples, match=r"num_examples 6, .* at most 5"):
        book.check_examples("bank.1", 6)
    assert lines == [
        {
            "event": "refused by a limit", "log_level": "warning", "reason": "too_many_examples",
            "client": "bank.1", "organisation": "bank", "found": 6, "allowed": 5,
        }
    ]  # fmt: skip


def test_the_partition_above_the_bound_is_named() -> None:
    book = ledger(max_partition_norm=2.0)
    book.check_norms("bank.1", (2, 8), (2.0, 1.9))
    with capture_logs() as lines, pytest.raises(NormTooLarge, match=r"partition 2 to 8 is 2.1, .* at most 2 "):
        book.check_norms("bank.1", (2, 8), (0.1, 2.1))
    assert (lines[0]["found"], lines[0]["allowed"]) == (2.1, 2.0)
    with pytest.raises(NormTooLarge):
        book.check_norms("bank.1", (2,), (float("nan"),))
    ledger().check_norms("bank.1", (2,), (1e9,))  # no bound


def test_partitions_end_where_somebody_s_rank_ends() -> None:
    assert partition_bounds([2, 8, 4, 16], 8) == (2, 4, 8)
    assert partition_bounds([2, 16], 5) == (2, 5)
    assert partition_bounds([], 3) == (3,)


def test_a_day_s_bytes_are_charged_to_the_organisation() -> None:
    book = ledger(upload_bytes_per_day=100)
    book.announce("bank.1", A, 60, now=0.0)
    book.announce("clinic.1", A, 100, now=0.0)
    with capture_logs() as lines, pytest.raises(QuotaExceeded, match=r"101 bytes .* allows 100"):
        book.announce("bank.2", B, 41, now=10.0)
    assert (lines[0]["found"], lines[0]["allowed"]) == (101, 100)
    book.announce("bank.2", B, 40, now=10.0)
    with pytest.raises(QuotaExceeded):
        book.announce("bank.3", C, 1, now=DAY_SECONDS - 1)
    book.announce("bank.3", C, 60, now=DAY_SECONDS)  # the first one's day is over


def test_an_upload_that_goes_on_is_charged_once_and_one_that_begins_again_anew() -> None:
    book = ledger(upload_bytes_per_day=100)
    for _ in range(5):
        book.announce("bank.1", A, 50, now=0.0)
    book.announce("bank.1", B, 50, now=0.0)  # takes the place of the other
    with pytest.raises(QuotaExceeded):
        book.announce("bank.1", A, 50, now=0.0)
    book.announce("bank.1", B, 50, now=0.0)
    book.forget("bank.1")  # refused or accepted: the same bytes again are new bytes on the wire
    with pytest.raises(QuotaExceeded):
        book.announce("bank.1", B, 50, now=0.0)


def test_a_restart_remembers_what_was_accepted_in_the_last_day() -> None:
    def record(number: int, closed_at: float) -> RoundRecord:
        sent = (Contribution("bank.1", 2, Update(A, 40, 10)), Contribution("clinic.1", 2, Update(B, 7, 10)))
        return RoundRecord(number, 1, C, closed_at - 1, closed_at, closed_at + 1, sent)

    state = replace(State(), history=(record(1, 100.0), record(2, 50_000.0)))
    book = ledger(state, now=DAY_SECONDS + 100.0, upload_bytes_per_day=100)
    with pytest.raises(QuotaExceeded, match="101 bytes"):
        book.announce("bank.1", C, 61, now=DAY_SECONDS + 100.0)
    book.announce("bank.1", C, 60, now=DAY_SECONDS + 100.0)


def test_streams_are_counted_by_client_while_they_are_open() -> None:
    book = ledger(max_uploads=2)
    with book.stream("bank.1"), book.stream("bank.2"):
        with book.stream("bank.1"):  # came back before its old stream has noticed
            pass
        with pytest.raises(QuotaExceeded, match=r"2 other uploads .* allows 2"), book.stream("bank.3"):
            pass
        with pytest.raises(QuotaExceeded):
            book.announce("bank.3", A, 1, now=0.0)
        with book.stream("clinic.1"):
            pass
    with book.stream("bank.3"):
        book.announce("bank.1", A, 1, now=0.0)


def test_a_spec_cannot_found_a_larger_adapter_than_allowed() -> None:
    spec = AdapterSpec((ModuleShape("a", 60, 40),))
    check_founding_size(limits(adapter_bytes=800), spec, 2, "client 'ada'")
    with capture_logs() as lines, pytest.raises(InvalidRequest, match=r"client 'ada'.* 800 bytes at rank 2"):
        check_founding_size(limits(adapter_bytes=799), spec, 2, "client 'ada'")
    assert (lines[0]["found"], lines[0]["allowed"]) == (800, 799)
