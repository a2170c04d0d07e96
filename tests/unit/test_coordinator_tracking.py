"""What of a round is tracked, and what the log says of its best adapter."""

import json
from dataclasses import replace
from typing import Any, cast

import pytest
from rounds import after, one_round, started
from structlog.testing import capture_logs

from coordinator.aggregation.report import RankPartition, RoundReport
from coordinator.federation.state import Best, Contribution, RoundRecord, Update
from coordinator.narrator import _tell_of_rounds
from coordinator.tracking import values_of_round

REPORT = RoundReport((RankPartition(0, 2, 1.0, 2, 2.0),), 0.5, 1.5, 2, 2.0, 0.01, 1.4)


def record(*losses: tuple[int, float | None]) -> RoundRecord:
    contributions = tuple(
        Contribution(f"c{n}", 2, Update(f"{n}", 100, examples, {} if loss is None else {"train_loss": loss}, 4.0))
        for n, (examples, loss) in enumerate(losses)
    )
    report = json.dumps({"report": REPORT.to_json(), "aggregation_seconds": 0.25})
    return RoundRecord(1, 1, "adapter-1", 0.0, 5.0, 6.0, contributions, report)


def test_a_round_s_training_loss_is_the_mean_over_examples() -> None:
    values = values_of_round(record((10, 1.0), (30, 3.0)))
    assert values["round/train_loss"] == pytest.approx((10 * 1.0 + 30 * 3.0) / 40)
    assert (values["round/updates"], values["round/examples"]) == (2.0, 40.0)


def test_a_loss_that_one_site_keeps_to_itself_is_not_tracked() -> None:
    assert "round/train_loss" not in values_of_round(record((10, 1.0), (30, None)))


@pytest.mark.parametrize("metric", ["round", "event", "accuracy"])
def test_the_log_names_the_best_adapter_whatever_its_metric_is_called(metric: str) -> None:
    before = after(*one_round(), start=started())
    state = replace(before, best=Best(1, "adapter-1", 0.87654, metric=metric))
    with capture_logs() as lines:
        _tell_of_rounds(cast(Any, None), before, state)
    assert lines == [
        {"event": "best adapter", "log_level": "info", "round": 1, "metric": metric, "value": 0.8765},
    ]
