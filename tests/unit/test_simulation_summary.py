"""Means, spreads and paired differences, on rows that can be checked by hand."""

import math
from dataclasses import replace

import pytest
from simulated_rows import a_run, an_experiment, key

from simulation.report.findings import best_and_worst, findings_of
from simulation.report.summary import Spread, default_baseline, differences, is_running_away, spread_of, summarise
from simulation.report.tables import mega, points, share, signed_points, spread_text
from simulation.results import Results
from simulation.schedule import Choice


def summary_of(results: Results, arm: str):
    return next(each for each in summarise(results) if each.arm == arm)


def sentences(results: Results, *, against: bool) -> str:
    return "\n".join(each.sentence for each in findings_of(summarise(results)) if each.is_against == against)


def test_a_spread_is_of_single_seeds() -> None:
    assert spread_of([1.0, 3.0]) == Spread(2.0, math.sqrt(2.0), 2)
    assert spread_of([1.0, 3.0]).standard_error == pytest.approx(1.0)


def test_what_was_not_measured_is_not_in_the_mean() -> None:
    assert spread_of([1.0, math.nan]).n == 1
    assert spread_of([]).n == 0
    assert math.isnan(spread_of([1.0]).sd)


def test_an_arm_is_summed_up_over_its_seeds() -> None:
    results = a_run(key("raflora", 0), 0.8, factor=0.5) + a_run(key("raflora", 1), 0.6, factor=0.5)
    found = summary_of(results, "raflora")
    assert found.accuracy.mean == pytest.approx(0.7)
    assert found.accuracy.sd == pytest.approx(0.1 * math.sqrt(2))
    assert found.finished == 2
    # 0.4 in the first round, halved twice; there are three rounds, so none is the twelfth.
    assert {number: spread.mean for number, spread in found.energy_above.items()} == pytest.approx({1: 0.4, 3: 0.1})
    assert found.rho.mean == pytest.approx(0.9)
    assert found.accuracy_at_rank[4].mean == pytest.approx(0.66)
    assert found.download_bytes == 3000


def test_a_diverged_run_is_counted_and_not_averaged() -> None:
    results = a_run(key("raflora", 0), 0.8) + a_run(key("raflora", 1), 0.1, status="diverged: not finite")
    found = summary_of(results, "raflora")
    assert found.accuracy == Spread(0.8, pytest.approx(math.nan, nan_ok=True), 1)
    assert found.diverged == ("diverged: not finite",)


def test_an_arm_of_one_rank_is_a_reference() -> None:
    found = summarise(an_experiment())
    assert [each.arm for each in found if each.is_reference] == ["all-rank-4", "all-rank-16"]
    assert summary_of(an_experiment(), "all-rank-4").energy_above[1].mean == 0.0


def test_arms_stand_in_the_order_of_the_experiment() -> None:
    found = summarise(an_experiment(), ["flora", "raflora"])
    assert [each.arm for each in found][:2] == ["flora", "raflora"]


def test_a_difference_is_paired_by_seed() -> None:
    results = (
        a_run(key("raflora", 0), 0.8)
        + a_run(key("raflora", 1), 0.7)
        + a_run(key("raflora", 2), 0.9)
        + a_run(key("flexlora", 0), 0.7)
        + a_run(key("flexlora", 1), 0.75)
    )
    (found,) = differences(summarise(results), "flexlora")
    assert found.difference.mean == pytest.approx(0.025)  # +0.1 and -0.05; seed 2 has no pair
    assert (found.difference.n, found.wins, found.is_clear) == (2, 1, False)


def test_flexlora_is_the_baseline_where_it_is_there() -> None:
    assert default_baseline(summarise(an_experiment())) == "flexlora"
    assert default_baseline(summarise(a_run(key("flora"), 0.5))) == "flora"


def test_a_rival_that_is_clearly_above_is_said_first() -> None:
    first = findings_of(summarise(an_experiment()))[0]
    assert first.is_against
    assert first.sentence == "flora is above raflora by 0.5 points (3 of 3 seeds), for the same download."


def test_a_better_slice_for_a_small_client_is_said() -> None:
    results = a_run(key("raflora"), 0.8, rank_gain=0.1) + a_run(key("flexlora"), 0.75, rank_gain=0.0)
    assert "Clients at rank 4 (75.0 against 60.0 %) and rank 8 (75.0 against 70.0 %) receive" in sentences(
        results, against=True
    )


def test_divergence_is_said_with_its_reason() -> None:
    results = an_experiment() + a_run(key("raflora", 7), 0.1, status="diverged: not finite")
    assert "raflora: 1 of 4 runs did not finish at learning rate 0.005 (linear): diverged: not finite" in sentences(
        results, against=True
    )


@pytest.mark.parametrize(
    ("growth", "loss_step", "is_away"),
    # Norms as measured: 28, 86, 281, 1131 every ten rounds with a rising loss; a healthy run grows by a third.
    [(1.12, 0.02, True), (1.12, -0.02, False), (1.03, 0.02, False)],
)
def test_a_run_whose_norm_keeps_doubling_while_the_loss_rises_is_said(
    growth: float, loss_step: float, is_away: bool
) -> None:
    found = a_run(key("raflora"), 0.5, rounds=40)
    rows = [replace(row, norm=3 * growth**row.round, train_loss=2 + loss_step * row.round) for row in found.rounds]
    assert is_running_away(rows) == is_away
    assert not is_running_away(rows[:15])  # too early to tell
    said = sentences(replace(found, rounds=tuple(rows)), against=True)
    assert ("raflora: in 1 of 1 finished runs the norm of the global update kept doubling" in said) == is_away


def test_one_rate_for_everybody_is_said() -> None:
    assert "No rate was chosen here" in sentences(an_experiment(), against=True)
    assert "No rate was chosen here" not in sentences(an_experiment(stage="best"), against=True)


def test_a_reference_below_speaks_for_the_higher_ranks() -> None:
    said = sentences(an_experiment(), against=False)
    assert "raflora is 8.8 points above all-rank-4 (everybody at rank 4): the higher ranks contribute." in said
    assert "all-rank-16 (everybody at rank 16) reaches 4.0 points more than raflora" in said


def test_data_on_which_rank_does_not_matter_are_named() -> None:
    results = (
        a_run(key("raflora"), 0.8) + a_run(key("low"), 0.800, levels=(4,)) + a_run(key("high"), 0.802, levels=(16,))
    )
    assert "rank hardly matters on this data" in sentences(results, against=True)


def test_one_seed_makes_nothing_certain() -> None:
    assert "One seed only" in sentences(a_run(key("raflora"), 0.8) + a_run(key("flexlora"), 0.7), against=True)


def test_a_choice_at_the_edge_of_the_grid_is_said() -> None:
    found = findings_of(summarise(an_experiment()), [Choice("raflora", 0.02, "linear", 0.8, at_the_edge=True)])
    assert any("edge of the grid" in each.sentence and "raflora (0.02)" in each.sentence for each in found)


def test_an_arm_that_diverged_leads_nowhere() -> None:
    results = an_experiment() + a_run(key("flora", 7), 0.1, status="diverged: x")
    assert best_and_worst(summarise(results))["accuracy"] == ("raflora", "flexlora")


def test_nobody_leads_where_all_are_alike() -> None:
    assert "download" not in best_and_worst(summarise(an_experiment()))


def test_numbers_read_as_in_a_paper() -> None:
    assert spread_text(Spread(0.868, 0.001, 3), points) == "86.8 ± 0.1 (3)"
    assert spread_text(Spread(0.083, 0.004, 3), signed_points) == "+8.3 ± 0.4 (3)"
    assert spread_text(Spread(0.5, math.nan, 1), points) == "50.0 (1)"
    assert spread_text(Spread(math.nan, math.nan, 0), points) == ""
    assert (share(0.214), share(0.00016), share(0.0)) == ("0.214", "1.6e-4", "0")
    assert (mega(12_345_678), mega(123_456_789)) == ("12.3", "123")
