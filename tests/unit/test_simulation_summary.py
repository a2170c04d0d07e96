"""Means, spreads and paired differences, on rows that can be checked by hand."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from simulated_rows import a_run, an_experiment, key

from simulation.experiment import ExperimentConfig
from simulation.report.findings import best_and_worst, findings_of
from simulation.report.stages import cpu_variant, default_baseline, stages_of
from simulation.report.summary import NOT_MEASURED, Spread, differences, is_running_away, spread_of, summarise
from simulation.report.tables import mebi, points, runs_text, share, signed_points, spread_text
from simulation.results import Results
from simulation.schedule import Choice


def summary_of(results: Results, arm: str):
    return next(each for each in summarise(results) if each.arm == arm)


def experiment(arms: Mapping[str, Mapping[str, object]], **clients: object) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {"path": "digits", "task": "image-classification"},
            "data": {"train": "digits", "test": "digits"},
            "clients": {"count": 6, "ranks": [4, 8, 16], "per_round": 2} | clients,
            "rounds": {"num_rounds": 3},
            "training": {"learning_rate": 0.005},
            "arms": [{"name": name, **settings} for name, settings in arms.items()],
        }
    )


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
    assert found.lost == ("diverged: not finite",)


def test_an_arm_of_one_rank_is_a_reference() -> None:
    found = summarise(an_experiment())
    assert [each.arm for each in found if each.is_reference] == ["all-rank-4", "all-rank-16"]
    assert summary_of(an_experiment(), "all-rank-4").energy_above[1].mean == 0.0


def test_arms_stand_in_the_order_of_the_experiment() -> None:
    found = summarise(an_experiment(), experiment({"flora": {"method": "flora"}, "raflora": {}}))
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
    assert first.sentence == "Above raflora: flora (+0.5 points)."


def test_a_better_slice_for_a_small_client_is_said() -> None:
    results = Results()
    for seed in range(3):
        results += a_run(key("raflora", seed), 0.8, rank_gain=0.1) + a_run(key("flexlora", seed), 0.75, rank_gain=0.0)
    said = sentences(results, against=True)
    assert "than raflora's: at rank 4 (60.0 %) flexlora (+15.0 points); at rank 8 (70.0 %) flexlora (+5.0" in said
    # The same gaps in one seed are not clear, and nothing is said.
    one = a_run(key("raflora"), 0.8, rank_gain=0.1) + a_run(key("flexlora"), 0.75, rank_gain=0.0)
    assert "at rank 4" not in sentences(one, against=True)


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
    def said(gap: float, *, spread: float = 0.0, seeds: int = 3) -> str:
        results = Results()
        for seed in range(seeds):
            results += a_run(key("raflora", seed), 0.8) + a_run(key("low", seed), 0.8, levels=(4,))
            results += a_run(key("high", seed), 0.8 + gap + spread * (seed - 1), levels=(16,))
        return sentences(results, against=True)

    assert "rank hardly matters on this data" in said(0.002)
    assert "rank hardly matters on this data" in said(-0.002)
    assert "rank hardly matters on this data" not in said(0.002, seeds=1)
    assert "rank hardly matters on this data" not in said(0.002, spread=0.02)  # it might be four points
    assert "rank hardly matters on this data" not in said(-0.05)
    assert "Everybody at rank 16 is 5.0 points below everybody at rank 4" in said(-0.05)


def test_one_seed_makes_nothing_certain() -> None:
    assert "One seed only" in sentences(a_run(key("raflora"), 0.8) + a_run(key("flexlora"), 0.7), against=True)


def test_a_choice_at_the_edge_of_the_grid_is_said() -> None:
    found = findings_of(summarise(an_experiment()), [Choice("raflora", 0.02, "linear", 0.8, at_the_edge=True)])
    assert any("edge of the grid" in each.sentence and "raflora (0.02)" in each.sentence for each in found)


def test_an_arm_that_diverged_leads_nowhere() -> None:
    results = an_experiment() + a_run(key("flora", 7), 0.1, status="diverged: x")
    assert best_and_worst(summarise(results))["accuracy"] == ("raflora", "flexlora")


def test_who_is_not_told_apart_from_the_next_leads_nowhere() -> None:
    results = Results()
    for seed in range(3):
        results += a_run(key("raflora", seed), 0.80) + a_run(key("flexlora", seed), 0.79 + 0.02 * (seed - 1))
    assert "accuracy" not in best_and_worst(summarise(results))


def test_nobody_leads_where_all_are_alike() -> None:
    assert "download" not in best_and_worst(summarise(an_experiment()))


def test_numbers_read_as_in_a_paper() -> None:
    assert spread_text(Spread(0.868, 0.001, 3), points) == "86.8 ± 0.1 (3)"
    assert spread_text(Spread(0.083, 0.004, 3), signed_points) == "+8.3 ± 0.4 (3)"
    assert spread_text(Spread(0.5, math.nan, 1), points) == "50.0 (1)"
    assert spread_text(Spread(math.nan, math.nan, 0), points) == ""
    assert (share(0.214), share(0.00016), share(0.0)) == ("0.214", "1.6e-4", "0")
    assert (mebi(12_345_678), mebi(123_456_789)) == ("11.8", "118")


def test_three_seeds_need_four_standard_errors() -> None:
    # Mean 1, standard error 1/3: beyond two of them, within Student's 4.303 at two degrees of freedom.
    near = spread_of([1 - 3**-0.5, 1.0, 1 + 3**-0.5])
    assert near.standard_error == pytest.approx(1 / 3)
    assert not near.is_clear
    assert near.margin == pytest.approx(4.303 / 3)
    assert spread_of([0.9, 1.0, 1.1]).is_clear
    assert not spread_of([1.0, 1.0]).is_clear  # two seeds never are


def test_the_accuracy_at_the_clients_own_ranks_weighs_each_rank_by_its_clients() -> None:
    results = a_run(key("raflora"), 0.8, rank_gain=0.1)  # 0.6, 0.7 and 0.8 at ranks 4, 8 and 16
    weighted = experiment({"raflora": {}}, count=4, rank_weights=[2, 1, 1])
    (found,) = summarise(results, weighted)
    assert found.own_ranks.mean == pytest.approx((0.6 + 0.6 + 0.7 + 0.8) / 4)
    # A rank that nobody has need not be measured; one that somebody has must be.
    (found,) = summarise(results, experiment({"raflora": {}}, count=4, ranks=[4, 8, 16, 32], rank_weights=[2, 1, 1, 0]))
    assert found.own_ranks.n == 1
    (found,) = summarise(results, experiment({"raflora": {}}, count=4, ranks=[4, 8, 16, 32]))
    assert found.own_ranks.n == 0


def test_a_rival_that_serves_the_small_clients_better_is_said() -> None:
    results = Results()
    for seed in range(3):
        results += a_run(key("raflora", seed), 0.8, rank_gain=0.1) + a_run(key("flexlora", seed), 0.75, rank_gain=0.0)
    found = findings_of(summarise(results, experiment({"raflora": {}, "flexlora": {"method": "flexlora"}})))
    assert "At the clients' own ranks, above raflora: flexlora (+5.0 points)." in [each.sentence for each in found]


def test_an_accuracy_of_an_earlier_round_is_not_the_last() -> None:
    found = a_run(key("raflora"), 0.8)
    results = replace(found, accuracy=tuple(row for row in found.accuracy if row.round < 3))
    summary = summary_of(results, "raflora")
    assert (summary.accuracy.n, summary.lost) == (0, (NOT_MEASURED,))


def test_arms_with_other_settings_are_no_rivals() -> None:
    results = Results()
    for seed in range(3):
        results += a_run(key("raflora", seed), 0.8) + a_run(key("flexlora", seed), 0.7)
        results += a_run(key("flexlora iid", seed), 0.9, method="flexlora")
        results += a_run(key("raflora iid", seed), 0.85, method="raflora")
    iid = {"set": {"clients.alpha": 100.0}}
    arms = {"raflora": {}, "flexlora": {"method": "flexlora"}, "raflora iid": iid}
    settings = experiment(arms | {"flexlora iid": {"method": "flexlora", **iid}})
    (stage,) = stages_of(results, settings)
    assert [(group.setting, group.baseline) for group in stage.groups] == [
        ("", "flexlora"),
        ("clients.alpha = 100.0", "flexlora iid"),
    ]
    said = [each.sentence for each in findings_of(stage.summaries)]
    assert "Above raflora iid: flexlora iid (+5.0 points)." in said
    assert "Below raflora: flexlora (-10.0 points)." in said
    assert not any("raflora:" in sentence and "iid" in sentence for sentence in said)


def test_rates_that_arms_set_are_nobodys_own_rate() -> None:
    results = a_run(key("raflora"), 0.8) + a_run(key("flexlora", rate=0.03), 0.7)
    (stage,) = stages_of(results, experiment({"raflora": {}}))
    assert stage.title == "Every arm at the learning rate of its own settings"
    assert not any("one for everybody" in each.sentence for each in findings_of(stage.summaries))


def test_an_arm_that_diverged_early_does_not_make_the_others_short() -> None:
    results = a_run(key("hot"), 0.1, method="flexlora", rounds=2, status="diverged: x") + a_run(
        key("raflora"), 0.8, rounds=20
    )
    assert "Only" not in sentences(results, against=True).replace("One seed only", "")
    assert "Only one round" in sentences(a_run(key("raflora"), 0.8, rounds=1), against=True)


def test_a_reference_that_is_not_told_apart_is_said_to_be_so() -> None:
    results = a_run(key("raflora"), 0.8) + a_run(key("low"), 0.7, levels=(4,))
    assert "low (everybody at rank 4) and raflora are not told apart by one seed" in sentences(results, against=True)


def test_of_many_variants_plain_raflora_and_the_best_are_spoken_of() -> None:
    results, arms = Results(), {"raflora": {}, "flexlora": {"method": "flexlora"}}
    for number in range(1, 6):
        arms[f"floor {number}"] = {"weight_floor": number / 10}
    for seed in range(3):
        for index, arm in enumerate(arms):
            results += a_run(key(arm, seed), 0.7 + index / 100, method="flexlora" if arm == "flexlora" else "raflora")
    found = findings_of(summarise(results, experiment(arms)))
    shown = [each.sentence for each in found if not each.is_detail]
    assert any("most accurate variant of raflora is floor 5 (+6.0 points" in sentence for sentence in shown)
    assert not any("floor 3" in sentence for sentence in shown)
    assert any("Below floor 3: flexlora" in each.sentence for each in found)


def test_a_run_that_stopped_did_not_diverge() -> None:
    results = (
        a_run(key("raflora"), 0.8)
        + a_run(key("raflora", 1), 0.1, status="stopped: too few answered")
        + a_run(key("raflora", 2), 0.1, status="diverged: not finite")
    )
    assert runs_text(summary_of(results, "raflora")) == "1, 1 diverged, 1 stopped"


def test_the_variant_for_a_cpu_is_told_from_the_whole() -> None:
    whole = experiment({"raflora": {}}).model_copy(update={"without_gpu": {"rounds.num_rounds": 2}})
    assert cpu_variant(whole) == ""
    assert cpu_variant(whole.on_cpu()) == "rounds.num_rounds = 2"
