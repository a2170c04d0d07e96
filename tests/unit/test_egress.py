"""The egress report: one durable line for everything that leaves."""

import json
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from worker.egress import REPORT, Departure, record

UPDATE = Departure(
    kind="update",
    round=2,
    attempt=1,
    digest="a" * 64,
    size_bytes=1000,
    num_tensors=5,
    dtype="bfloat16",
    lora_rank=4,
    num_examples=40,
    metrics={"train_loss": 0.25},
)


def test_every_departure_is_a_line_with_all_that_left(tmp_path: Path) -> None:
    record(tmp_path, UPDATE, time="2026-01-01T00:00:00+00:00")
    record(tmp_path, replace(UPDATE, round=3), time="2026-01-01T00:01:00+00:00")

    first, second = map(json.loads, (tmp_path / REPORT).read_text().splitlines())
    assert first == {"time": "2026-01-01T00:00:00+00:00", **asdict(UPDATE)}
    assert second["round"] == 3


def test_the_report_is_for_the_site_alone(tmp_path: Path) -> None:
    record(tmp_path, UPDATE, time="2026-01-01T00:00:00+00:00")
    assert stat.S_IMODE((tmp_path / REPORT).stat().st_mode) == 0o600


def test_what_cannot_be_written_down_stops_the_departure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(tmp_path, replace(UPDATE, metrics={"train_loss": float("nan")}), time="2026-01-01T00:00:00+00:00")
    assert not (tmp_path / REPORT).exists()
