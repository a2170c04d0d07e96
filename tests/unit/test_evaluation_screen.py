"""How well the adapter does, as a person sees it: on 80 columns, with nothing shown that nobody measured."""

from io import StringIO

import pytest
from canned_coordinator import summary, training
from raflora.v1 import status_pb2 as pb
from rich.console import Console, RenderableType

from cli.evaluation_screen import best_line, evaluation_lines, evaluations_table, headline, value_of
from cli.screens import round_line, status_screen


def drawn(screen: RenderableType) -> list[str]:
    shown = StringIO()
    Console(file=shown, width=80, markup=False, highlight=False, color_system=None).print(screen)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def evaluated(number: int = 3) -> pb.RoundSummary:
    """Two ranks and an evaluator."""
    found = summary(number, accuracy=0.625)
    found.MergeFrom(
        pb.RoundSummary(
            federated_metrics={"accuracy": 0.625, "eval_loss": 0.75},
            central_metrics={"accuracy": 0.5, "eval_loss": 1.25},
            rank_levels=[
                pb.RankLevelSummary(lora_rank=2, clients=2, num_examples=40, metrics={"accuracy": 0.5}),
                pb.RankLevelSummary(lora_rank=8, clients=1, num_examples=40, metrics={"accuracy": 0.75}),
            ],
        )
    )
    return found


def test_a_round_tells_every_rank_s_score_and_the_evaluators_one() -> None:
    assert [str(line) for line in evaluation_lines(evaluated())] == [
        "accuracy by rank  2: 50.0 %, 8: 75.0 %",
        "central  accuracy 50.0 %, eval_loss 1.250",
    ]
    assert evaluation_lines(summary(3)) == []


def test_a_language_model_has_no_accuracy_but_a_loss_or_an_exact_match() -> None:
    loss_only = pb.RoundSummary(round=1, evaluations=[pb.EvaluationSummary()], federated_metrics={"eval_loss": 2.5})
    assert "  accuracy -  loss 2.500  " in str(round_line(loss_only, 9))
    exact = pb.RoundSummary(round=1, federated_metrics={"exact_match": 0.25, "eval_loss": 2.5})
    assert "  exact_match 25.0 %  loss 2.500  " in str(round_line(exact, 9))


@pytest.mark.parametrize("share", ["accuracy", "accuracy_norm", "exact_match", "token_accuracy"])
def test_every_share_of_right_answers_is_percent(share: str) -> None:
    assert value_of({share: 0.25}, share) == "25.0 %"


def test_what_is_no_share_is_a_number_and_what_is_not_measured_a_dash() -> None:
    assert value_of({"eval_loss": 2.5}, "eval_loss") == "2.500"
    assert value_of({"eval_loss": 2.5}, "accuracy") == "-"


def test_token_accuracy_is_no_headline() -> None:
    found = pb.RoundSummary(federated_metrics={"eval_loss": 2.5, "token_accuracy": 0.5})
    assert headline(found) == ("accuracy", "-")


def test_evaluators_alone_measure_nothing_of_the_clients() -> None:
    alone = pb.RoundSummary(
        evaluations=[pb.EvaluationSummary(central=True)], central_metrics={"accuracy": 0.5, "f1": 0.25}
    )
    assert headline(alone) == ("accuracy", "-")
    assert [str(line) for line in evaluation_lines(alone)] == ["central  accuracy 50.0 %"]


def test_the_best_round_and_the_patience_are_one_line() -> None:
    best = pb.BestAdapter(round=9, metric="accuracy", value=0.87, source="central", evaluations_since=3, patience=5)
    status = training()
    status.best.CopyFrom(best)
    line = "best  round 9, central accuracy 87.0 %, 3 of 5 without a better one"
    assert str(best_line(status)) == line
    assert line in drawn(status_screen(status))
    status.best.CopyFrom(pb.BestAdapter(round=9, metric="eval_loss", value=1.25, source="federated"))
    assert str(best_line(status)) == "best  round 9, federated eval_loss 1.250, 0 evaluations since"
    assert not any(shown.startswith("best ") for shown in drawn(status_screen(training())))


def test_the_table_of_evaluations_fits_a_narrow_terminal() -> None:
    many = evaluated(4)
    for rank in (16, 32, 48, 64):
        many.rank_levels.add(lora_rank=rank, metrics={"accuracy": 0.875})
    lines = drawn(evaluations_table([summary(1), evaluated(3), many]) or "")
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["evaluated", "federated", "loss", "by", "rank", "central"]
    assert lines[2].split()[:4] == ["3", "62.5", "%", "0.750"]
    assert "64: 87.5 %" in " ".join(" ".join(lines).split())


def test_where_there_is_one_rank_and_no_evaluator_there_is_no_second_table() -> None:
    assert evaluations_table([summary(1), summary(2)]) is None


def test_a_name_from_the_wire_does_not_steer_the_terminal() -> None:
    status = training()
    status.best.CopyFrom(pb.BestAdapter(round=1, metric="\x1b[2Jf1", value=0.5, source="\x1b]0;x"))
    found = pb.RoundSummary(central_metrics={"\x1b[2J": 0.5})
    assert "\x1b" not in "".join([str(best_line(status)), *map(str, evaluation_lines(found))])
