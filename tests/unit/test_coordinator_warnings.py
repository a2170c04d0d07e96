"""What an operator is warned of, with histories made by hand; a healthy run must never be warned of."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from coordinators import config_of
from rounds import ADA, BOB, CEM, RANKS, after, started, tick

from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.report import RankPartition, RoundReport
from coordinator.federation.state import Contribution, RoundRecord, State, Update
from coordinator.warnings import founding_warnings, signs_of, uncovered_rounds, warnings_of

PAPER = MethodOptions("raflora")
EVERYBODY = (ADA, BOB, CEM)
PARTITIONS = (RankPartition(0, 2, 0.5, 3, 3.0), RankPartition(2, 4, 0.3, 2, 2.0), RankPartition(4, 8, 0.2, 1, 1.0))
ALONE = "one client alone trains ranks 5-8"
DIVERGES = "the global adapter seems to diverge"


def record(number: int, clients: Sequence[str] = EVERYBODY, *, norm: float = 1.0, **losses: float) -> RoundRecord:
    """A finished round; `losses` by client id."""
    contributions = tuple(
        Contribution(c, RANKS[c], Update(f"{c}-{number}", 100, 10, {"train_loss": losses[c]} if c in losses else {}))
        for c in clients
    )
    report = RoundReport(PARTITIONS, 0.5, 5.5, 7, norm**2, 0.0, norm)
    text = json.dumps({"report": report.to_json(), "aggregation_seconds": 0.25})
    return RoundRecord(number, 1, f"adapter-{number}", 10.0, 40.0, 41.0, contributions, text)


def run(norms: Sequence[float], losses: Sequence[float]) -> list[RoundRecord]:
    return [
        record(i + 1, [CEM, CEM], norm=norm, cem=loss) for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    ]


def geometric(first: float, per_ten_rounds: float, rounds: int) -> list[float]:
    return [first * per_ten_rounds ** (i / 10) for i in range(rounds)]


def about(history: Sequence[RoundRecord], options: MethodOptions = PAPER) -> list[str]:
    return [sign.about for sign in signs_of(history, options)]


def federation(*rounds: RoundRecord) -> State:
    return replace(started(num_rounds=9), round=len(rounds), history=rounds)


# ---------------------------------------------------------------- divergence


def diverging(rounds: int = 40) -> list[RoundRecord]:
    """The run of raFLoRA at a constant learning rate of 1e-2: norms 28, 86, 281 and 1131 at rounds 10, 20, 30, 40."""
    falling = [4.0 - 0.29 * i for i in range(10)]
    rising = [1.07 + 0.035 * i for i in range(30)]
    return run(geometric(10.0, 3.3, 40)[:rounds], (falling + rising)[:rounds])


def test_a_norm_that_doubles_while_the_loss_rises_is_told_from_the_twentieth_round_on() -> None:
    assert [DIVERGES in about(diverging(rounds)) for rounds in (19, 20, 30, 40)] == [False, True, True, True]
    (sign,) = signs_of(diverging(20), PAPER)
    assert sign.sentence == (
        "the global adapter seems to diverge: rounds 10 to 20 took its norm from 29.3 to 96.6, the training loss from "
        "1.14 to 1.32; found a new federation with a lower training.learning_rate that decays, or with method raflora "
        "and an aggregation.weight_floor (0.3, say)"
    )


@pytest.mark.parametrize("method", ["flexlora", "fedit"])
def test_the_advice_is_one_that_the_method_can_take(method: str) -> None:
    (sign,) = signs_of(diverging(), MethodOptions(method))
    assert sign.sentence.endswith("found a new federation with a lower training.learning_rate that decays")


@pytest.mark.parametrize("per_ten_rounds", [1.3, 1.6])
def test_a_healthy_run_is_never_warned_of(per_ten_rounds: float) -> None:
    # The mean loss of a round depends on who was drawn: it falls on the whole, but not in every round.
    losses = [3.0 * 0.95**i + 0.3 * math.sin(i) for i in range(60)]
    history = run(geometric(10.0, per_ten_rounds, 60), losses)
    assert all(about(history[:rounds]) == [] for rounds in range(61))


def test_a_loss_that_rises_alone_is_no_divergence() -> None:
    assert about(run(geometric(10.0, 1.6, 40), [1.0 + 0.05 * i for i in range(40)])) == []


def test_a_norm_that_grows_alone_is_no_divergence() -> None:
    assert about(run(geometric(10.0, 4.0, 40), [3.0 * 0.95**i for i in range(40)])) == []


def test_the_first_ten_rounds_may_grow_as_they_like() -> None:
    norms = [*geometric(0.001, 1e4, 10), *geometric(4.0, 1.4, 10)]
    assert about(run(norms, [1.0 + 0.05 * i for i in range(20)])) == []


def test_clients_that_tell_no_loss_raise_no_alarm() -> None:
    silent = [record(i + 1, [CEM, CEM], norm=3.0**i) for i in range(30)]
    assert about(silent) == []
    halves = [*silent[:25], *diverging()[25:30]]
    assert about(halves) == []


def test_an_adapter_that_is_still_nothing_raises_no_alarm() -> None:
    assert about(run([0.0] * 15 + [1.0] * 15, [1.0 + 0.1 * i for i in range(30)])) == []


# ---------------------------------------------------------------- a partition of one client


def test_a_lone_owner_is_told_after_three_rounds_with_what_can_be_done() -> None:
    history = [record(number) for number in range(1, 4)]
    assert (about(history[:2]), about(history)) == ([], [ALONE])
    (sign,) = signs_of(history, PAPER)
    assert sign.sentence == (
        "ranks 5-8 had at most one client in each of the last 3 rounds, whose noise goes into the adapter whole: let "
        "more clients of rank 8 take part, or found the next federation with method raflora and an "
        "aggregation.weight_floor (0.3, say)"
    )
    assert signs_of([*history, record(4)], PAPER) == (sign,), "it says the same as long as it lasts"


def test_partitions_of_the_same_lone_owner_are_one_warning() -> None:
    assert about([record(number, [ADA, CEM]) for number in range(1, 4)]) == ["one client alone trains ranks 3-8"]


def test_a_partition_that_now_and_then_has_nobody_still_has_a_lone_owner() -> None:
    history = [record(1, [ADA, BOB, BOB]), record(2, [ADA, BOB, BOB]), record(3)]
    assert about(history) == [ALONE]
    assert about([record(number, [ADA, BOB, BOB]) for number in (1, 2, 3)]) == ["ranks 5-8 were trained by nobody"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (MethodOptions("rb-lora"), [ALONE]),
        (MethodOptions("raflora", shrinkage="effective-owners", kappa=0.0), [ALONE]),
        (MethodOptions("raflora", weight_floor=0.25), []),
        (MethodOptions("raflora", shrinkage="sqrt-share"), []),
        (MethodOptions("raflora", shrinkage="effective-owners"), []),
        (MethodOptions("flexlora"), []),
    ],
)
def test_who_bounds_a_lone_owner_is_not_told_to(options: MethodOptions, expected: list[str]) -> None:
    assert about([record(number) for number in range(1, 4)], options) == expected


def test_a_federation_of_one_client_has_no_lone_owner() -> None:
    assert about([record(number, [CEM]) for number in range(1, 6)]) == []


# ---------------------------------------------------------------- a partition of nobody, and the federation itself


def test_a_partition_that_nobody_trains_is_worth_a_warning() -> None:
    rounds = [record(1, [CEM, CEM]), *(record(number, [ADA, BOB, BOB]) for number in (2, 3))]
    assert warnings_of(federation(*rounds), PAPER) == []
    rounds.append(record(4, [ADA, BOB, BOB]))
    assert warnings_of(federation(*rounds), PAPER) == ["ranks 5-8 were trained by nobody for 3 rounds"]
    assert uncovered_rounds(rounds) == {(0, 2): 0, (2, 4): 0, (4, 8): 3}


def test_a_federation_that_paused_itself_is_worth_a_warning() -> None:
    state = after(tick(100.0), tick(200.0), start=started(max_attempts=1))
    (warning,) = warnings_of(state, PAPER)
    assert warning == "the federation paused itself", "why stands in the explanation, which is shown above"
    assert warnings_of(started(), PAPER) == []


def test_a_federation_that_has_no_rounds_yet_has_no_signs() -> None:
    assert signs_of([], PAPER) == ()
    assert uncovered_rounds([]) == {}


def test_a_sign_keeps_its_name_while_its_numbers_change() -> None:
    (one,), (other,) = signs_of(diverging(21), PAPER), signs_of(diverging(22), PAPER)
    assert one.about == other.about
    assert one.sentence != other.sentence


# ---------------------------------------------------------------- before anybody has joined


def test_a_federation_that_knows_its_callers_is_not_left_to_the_first_one(tmp_path: Path) -> None:
    config = config_of(tmp_path, server__identity={"folder": str(tmp_path)})
    open_to_all = config.model_copy(update={"adapter": config.adapter.model_copy(update={"spec": None})})
    (sentence,) = founding_warnings(open_to_all, is_founded=False)
    assert "model.base_model_digest" in sentence
    assert founding_warnings(open_to_all, is_founded=True) == ()
    model = config.model.model_copy(update={"base_model_digest": "0" * 64})
    assert founding_warnings(open_to_all.model_copy(update={"model": model}), is_founded=False) == ()
    adapter = config.adapter.model_copy(update={"spec": tmp_path / "spec.json"})
    assert founding_warnings(config.model_copy(update={"adapter": adapter}), is_founded=False) == ()
    assert founding_warnings(config_of(tmp_path), is_founded=False) == ()
