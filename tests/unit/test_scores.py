"""What evaluations come to: means by hand, which adapter is the best, and when hope is given up."""

from math import inf, isnan, nan
from typing import Any

import pytest

from coordinator.federation.scores import (
    MAX_NAMES,
    Score,
    best_after,
    counted_value,
    reason_not_counted,
    reason_to_stop,
    scores_of,
)
from coordinator.federation.state import Best, Evaluation, RoundRecord, Stopping

ACCURACY = Stopping("accuracy", patience=3)
LOSS = Stopping("eval_loss", is_larger_better=False)
CENTRAL = Stopping("accuracy", is_central=True)


def record(*evaluations: tuple[str, int, Evaluation], number: int = 1) -> RoundRecord:
    return RoundRecord(number, 1, f"adapter-{number}", 0.0, 1.0, 2.0, (), evaluations=evaluations, evaluated_at=3.0)


def told(number: int, value: float, name: str = "accuracy") -> RoundRecord:
    return record(("ada", 2, Evaluation(10, {name: value})), number=number)


MIXED = record(
    ("ada", 2, Evaluation(10, {"accuracy": 0.5, "eval_loss": 2.0})),
    ("bob", 2, Evaluation(30, {"accuracy": 0.7})),
    ("cem", 8, Evaluation(40, {"accuracy": 0.9, "eval_loss": 1.0})),
    ("eve", 8, Evaluation(1_000, {"accuracy": 0.2}, is_central=True)),
    ("fay", 8, Evaluation(3_000, {"accuracy": 0.4, "rouge": 0.1}, is_central=True)),
)


def test_clients_that_train_are_one_mean_by_examples_and_evaluators_another() -> None:
    scores = scores_of(MIXED)
    # accuracy: (10 * 0.5 + 30 * 0.7 + 40 * 0.9) / 80; loss: bob told none, so (10 * 2 + 40 * 1) / 50
    assert scores.federated == Score(3, 80, {"accuracy": pytest.approx(0.775), "eval_loss": pytest.approx(1.2)})
    assert scores.central == Score(2, 4_000, {"accuracy": pytest.approx(0.35), "rouge": pytest.approx(0.1)})


def test_every_rank_has_a_score_of_its_own_without_the_evaluators() -> None:
    assert scores_of(MIXED).by_rank == (
        (2, Score(2, 40, {"accuracy": pytest.approx(0.65), "eval_loss": pytest.approx(2.0)})),
        (8, Score(1, 40, {"accuracy": pytest.approx(0.9), "eval_loss": pytest.approx(1.0)})),
    )


def test_where_nobody_evaluated_there_is_nothing() -> None:
    nothing = Score(0, 0, {})
    scores = scores_of(record())
    assert (scores.federated, scores.by_rank, scores.central) == (nothing, (), nothing)
    assert isnan(counted_value(record(), ACCURACY))


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_no_number_counts_for_nothing(bad: float) -> None:
    found = record(("ada", 2, Evaluation(10, {"accuracy": bad})), ("bob", 2, Evaluation(10, {"accuracy": 0.5})))
    assert scores_of(found).federated.metrics == {"accuracy": 0.5}
    assert isnan(counted_value(told(1, bad), ACCURACY))


def test_the_order_of_the_names_decides_nothing() -> None:
    parts = [(f"c{i}", 2, Evaluation(10**i, {"accuracy": 0.1 + 0.07 * i})) for i in range(9)]
    assert scores_of(record(*parts)).federated == scores_of(record(*parts[::-1])).federated


class Watched(dict[str, float]):
    """Metrics that count how often they are read from end to end."""

    reads = 0

    def items(self) -> Any:
        self.reads += 1
        return super().items()

    def __getitem__(self, name: str) -> float:
        raise AssertionError(f"{name} is looked up by itself: every name in every client's metrics")

    def get(self, name: str, default: float = nan) -> float:  # type: ignore[override]
        assert name == "accuracy", "a name that does not count is looked up"
        return super().get(name, default)


def test_names_of_each_client_s_own_make_no_more_work_than_common_ones() -> None:
    metrics = [Watched({"accuracy": 0.5} | {f"own_{i}_{n}": 1.0 for n in range(63)}) for i in range(30)]
    many = record(*((f"c{i}", 1 + i, Evaluation(10, told)) for i, told in enumerate(metrics)))
    assert counted_value(many, ACCURACY) == 0.5
    assert {told.reads for told in metrics} == {0}, "only the metric that counts is looked at"
    scores_of(many)
    assert {told.reads for told in metrics} == {3}, "for the names, for the whole and for the rank"


def test_a_round_reports_the_names_that_most_told_and_of_equals_the_first() -> None:
    common = {"zeal": 0.5, **{f"m{i:02}": 1.0 for i in range(40)}}
    found = record(
        ("ada", 2, Evaluation(10, {**common, **{f"b{i:02}": 1.0 for i in range(23)}})),
        ("bob", 4, Evaluation(10, {**common, **{f"a{i:02}": 1.0 for i in range(10)}})),
        ("eve", 8, Evaluation(10, {"rouge": 0.25}, is_central=True)),
    )
    scores = scores_of(found)
    expected = sorted([*common, *(f"a{i:02}" for i in range(10)), *(f"b{i:02}" for i in range(13))])
    assert len(expected) == MAX_NAMES
    assert list(scores.federated.metrics) == expected
    assert {name for _, score in scores.by_rank for name in score.metrics} == set(expected)
    assert scores.central.metrics == {"rouge": 0.25}
    assert counted_value(found, Stopping("b22")) == 1.0, "what counts needs no room in a report"


# ---------------------------------------------------------------- the best


def course(stopping: Stopping, *values: float) -> Best | None:
    best = None
    for number, value in enumerate(values, start=1):
        best = best_after(best, told(number, value, stopping.metric), stopping)
    return best


def best_of(stopping: Stopping, number: int, value: float, since: int) -> Best:
    asked = (stopping.metric, stopping.is_larger_better, stopping.is_central)
    return Best(number, f"adapter-{number}", value, since, *asked)


@pytest.mark.parametrize(
    ("stopping", "values", "number", "since"),
    [
        (ACCURACY, (0.5,), 1, 0),
        (ACCURACY, (0.5, 0.75, 0.25), 2, 1),
        (ACCURACY, (0.5, 0.5, 0.5), 1, 2),  # of equals the first
        (ACCURACY, (0.5, nan, 0.25), 1, 1),  # what nobody told is no evaluation
        (ACCURACY, (nan, nan, 0.25), 3, 0),
        (ACCURACY, (-1.0, 0.0), 2, 0),
        (LOSS, (2.0, 1.0, 1.5), 2, 1),
        (LOSS, (2.0, 2.0), 1, 1),
        (Stopping("accuracy", min_delta=0.25), (0.25, 0.5, 0.75), 3, 0),  # 0.25 is not more than 0.25, but 0.5 is
        (Stopping("eval_loss", is_larger_better=False, min_delta=0.25), (1.0, 0.75, 0.5), 3, 0),
    ],
)
def test_the_best_is_the_first_of_those_that_are_better_than_all_before(
    stopping: Stopping, values: tuple[float, ...], number: int, since: int
) -> None:
    assert course(stopping, *values) == best_of(stopping, number, values[number - 1], since)


def test_nothing_is_the_best_as_long_as_nothing_counts() -> None:
    assert course(ACCURACY, nan, nan) is None
    assert best_after(None, told(1, 0.5), Stopping()) is None
    assert best_after(None, told(1, 0.5), CENTRAL) is None
    assert best_after(None, told(1, 0.5, "rouge"), ACCURACY) is None


@pytest.mark.parametrize(
    "now",
    [Stopping("f1"), Stopping("accuracy", is_larger_better=False), Stopping("accuracy", is_central=True)],
)
def test_when_something_else_counts_the_next_counted_evaluation_is_the_first(now: Stopping) -> None:
    before = course(ACCURACY, 0.75, 0.5)
    worse = record(("eve", 8, Evaluation(10, {now.metric: 0.1}, is_central=now.is_central)), number=3)
    assert before is not None
    assert best_after(before, worse, now) == best_of(now, 3, 0.1, 0)
    assert best_after(before, record(number=3), now) == before  # what was the best stays until then


def test_other_patience_or_another_least_difference_is_no_other_question() -> None:
    before = course(ACCURACY, 0.75, 0.5)
    after = best_after(before, told(3, 0.8), Stopping("accuracy", min_delta=0.1, patience=9))
    assert after == best_of(ACCURACY, 1, 0.75, 2)


# ---------------------------------------------------------------- the end


def test_patience_runs_out_after_so_many_counted_evaluations() -> None:
    assert reason_to_stop(None, ACCURACY) == ""
    assert reason_to_stop(course(ACCURACY, 0.87, 0.5, 0.5), ACCURACY) == ""
    assert reason_to_stop(course(ACCURACY, 0.87, 0.5, 0.5, 0.5), ACCURACY) == (
        "no improvement of accuracy for 3 evaluations; best 0.87 in round 1"
    )
    once = Stopping("eval_loss", is_larger_better=False, patience=1)
    assert reason_to_stop(course(once, 1.23456789, 2.0), once) == (
        "no improvement of eval_loss for 1 evaluation; best 1.235 in round 1"
    )


def test_without_patience_it_never_ends_early() -> None:
    assert reason_to_stop(course(LOSS, 1.0, *[2.0] * 99), LOSS) == ""


def test_patience_with_another_metric_starts_anew() -> None:
    assert reason_to_stop(course(ACCURACY, 0.8, 0.1, 0.1, 0.1), Stopping("f1", patience=1)) == ""


# ---------------------------------------------------------------- what does not count


@pytest.mark.parametrize(
    ("found", "stopping", "why"),
    [
        (told(1, 0.5), ACCURACY, ""),
        (record(), ACCURACY, ""),
        (told(1, 0.5), Stopping(), ""),
        (MIXED, Stopping("f1"), "evaluation.metric 'f1' was not among accuracy, eval_loss"),
        (MIXED, Stopping("f1", is_central=True), "evaluation.metric 'f1' was not among accuracy, rouge"),
        (told(1, 0.5), CENTRAL, "evaluation.source is central, but no evaluator took part"),
        (
            record(("eve", 8, Evaluation(9, {"accuracy": 0.5}, is_central=True))),
            ACCURACY,
            "evaluation.source is federated, but only evaluators took part",
        ),
        (record(("ada", 2, Evaluation(9))), ACCURACY, "evaluation.metric 'accuracy' was not among (no metric at all)"),
    ],
)
def test_an_evaluation_that_does_not_count_says_why(found: RoundRecord, stopping: Stopping, why: str) -> None:
    assert reason_not_counted(found, stopping) == why


def test_a_sentence_names_a_few_metrics() -> None:
    many = record(("ada", 2, Evaluation(9, {f"m{i}": 1.0 for i in range(60)})))
    assert reason_not_counted(many, ACCURACY).endswith("m14, m15, ...")
