"""Reports and forecasts, with numbers that can be checked by hand."""

import json
import math

import numpy as np
import pytest

from coordinator.aggregation.certificate import Certificate, RoundCertificate, worst_of
from coordinator.aggregation.forecast import CollapseForecast, forecast_collapse
from coordinator.aggregation.report import Participation, RankPartition, RoundReport, report_round, spectrum_of


def spectra(*singular_values: list[float]) -> list[np.ndarray]:
    """One module each."""
    return [np.array(values) for values in singular_values]


def test_a_report_by_hand() -> None:
    # Energies by index over both modules: 9 + 7, 4 + 1, 3 + 1 and 0, so 25 in all.
    modules = spectra([3.0, 2.0, math.sqrt(3.0), 0.0], [math.sqrt(7.0), 1.0, 1.0, 0.0])
    participation = Participation(ranks=(1, 1, 3), num_examples=(10, 30, 40), levels=(1, 3))
    report = report_round(modules, 75.0, participation)
    assert report.energy == pytest.approx(25.0)
    assert report.norm == pytest.approx(5.0)
    assert report.rho == pytest.approx(16 / 25)
    assert report.rank_99 == 3
    assert report.energy_lost == pytest.approx(0.75)
    low, middle, high = report.partitions
    assert (low.low, low.high, low.contributors) == (0, 1, 3)
    assert low.effective_contributors == pytest.approx(80**2 / (100 + 900 + 1600))
    assert middle == RankPartition(1, 3, pytest.approx(9 / 25), 1, 1.0)  # type: ignore[arg-type]
    assert high == RankPartition(3, 4, 0.0, 0, 0.0)  # the global rank is above everybody's
    shares = np.sqrt([16, 5, 4]) / np.sqrt([16, 5, 4]).sum()
    assert report.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize(("spectrum", "rank"), [([2.0, 2.0, 2.0, 2.0], 4.0), ([5.0, 0.0, 0.0, 0.0], 1.0)])
def test_the_effective_rank_counts_equal_directions(spectrum: list[float], rank: float) -> None:
    report = report_round(spectra(spectrum), 0.0, Participation((4,), (1,), (4,)))
    assert report.effective_rank == pytest.approx(rank)
    assert report.rank_99 == int(rank)


def test_levels_are_the_federations_and_a_changed_rank_has_its_place() -> None:
    participation = Participation(ranks=(3,), num_examples=(5,), levels=(2, 4))
    partitions = report_round(spectra([1.0] * 4), 0.0, participation).partitions
    assert [(p.low, p.high, p.contributors) for p in partitions] == [(0, 2, 1), (2, 3, 1), (3, 4, 0)]
    assert sum(p.energy_share for p in partitions) == pytest.approx(1.0)


def test_an_untrained_adapter_has_a_report_of_zeros() -> None:
    report = report_round(spectra([0.0] * 4), 0.0, Participation((2,), (1,), (2, 4)))
    assert (report.rho, report.effective_rank, report.rank_99, report.energy, report.energy_lost) == (0, 0, 0, 0, 0)


def test_a_report_survives_json() -> None:
    report = report_round(spectra([3.0, 1.0, 0.0]), 0.5, Participation((1, 3), (2, 5), (1, 3)))
    assert RoundReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_spectrum_is_the_root_of_the_modules_energies() -> None:
    np.testing.assert_allclose(spectrum_of(spectra([3.0, 0.0], [4.0, 1.0])), [5.0, 1.0])


def test_a_spectrum_longer_than_all_ranks_has_a_partition_of_nobody() -> None:
    report = report_round(spectra([2.0, 1.0, 1.0], [1.0]), 0.0, Participation((1, 2), (5, 5), (1, 2)))
    assert [(p.low, p.high, p.contributors) for p in report.partitions] == [(0, 1, 2), (1, 2, 1), (2, 3, 0)]
    assert [p.energy_share for p in report.partitions] == pytest.approx([5 / 7, 1 / 7, 1 / 7])


def test_a_report_of_an_older_journal_can_be_read() -> None:
    old = (
        '{"partitions": [{"low": 0, "high": 2, "energy_share": 1.0, "contributors": 1, "effective_contributors": 1.0}],'
        ' "rho": 1.0, "effective_rank": 1.5, "rank_99": 2, "energy": 4.0, "energy_lost": 0.0, "norm": 2.0}'
    )
    report = RoundReport.from_json(json.loads(old))
    assert report.partitions == (RankPartition(0, 2, 1.0, 1, 1.0),)
    assert report.norm == 2.0
    assert report.certificate == RoundCertificate()


def test_a_report_survives_the_journal_with_its_certificate() -> None:
    certificates = [
        Certificate("exact"),
        Certificate("iteration", half_passes=4, residual=1e-3, captured=0.99),
        Certificate("iteration", half_passes=7, residual=1e-5, captured=0.98),
        Certificate("dense", captured=0.9),
    ]
    worst = worst_of(certificates)
    assert worst == RoundCertificate(half_passes=7, residual=1e-3, captured=0.9, exact=1, iterated=2, dense=1)
    report = report_round(spectra([3.0, 1.0]), 0.5, Participation((1, 2), (2, 5), (1, 2)), worst)
    assert RoundReport.from_json(json.loads(json.dumps(report.to_json()))) == report


# --- The forecast


def test_five_equal_levels_halve_every_one_and_a_half_rounds() -> None:
    forecast = forecast_collapse([(rank, 100) for rank in (2, 4, 8, 16, 32)])
    assert forecast.factor == pytest.approx(0.64)
    assert forecast.half_life_rounds == pytest.approx(1.5532, abs=1e-4)
    assert forecast.sentence == "under a rank-agnostic average the energy above rank 2 would halve every 1.6 rounds"
    assert (forecast.smallest_rank, forecast.largest_rank) == (2, 32)


def test_equal_ranks_do_not_collapse() -> None:
    assert forecast_collapse([(8, 10), (8, 500)]) == CollapseForecast(
        8, 8, 1.0, 0.0, "all clients have rank 8: no rank collapse to expect"
    )


def test_no_clients_are_no_forecast() -> None:
    assert forecast_collapse([]).sentence == "no clients yet: nothing to forecast"
    assert forecast_collapse([(8, 10)]).sentence == "one client so far, of rank 8: nothing to forecast"


def test_sampling_adds_the_variance_of_the_share() -> None:
    census = [(rank, 1) for rank in (8, 16, 32, 48, 64) for _ in range(20)]
    assert forecast_collapse(census, cohort=10).factor == pytest.approx(0.6545, abs=1e-4)
    rng = np.random.default_rng(0)
    above = np.array([rank > 8 for rank, _ in census])
    drawn = [above[rng.permutation(100)[:10]].mean() ** 2 for _ in range(5000)]
    assert forecast_collapse(census, cohort=10).factor == pytest.approx(np.mean(drawn), abs=0.01)


def test_a_cohort_of_everybody_is_no_sampling() -> None:
    census = [(2, 30), (4, 10)]
    assert forecast_collapse(census, cohort=2) == forecast_collapse(census) == forecast_collapse(census, cohort=99)
    assert forecast_collapse(census).factor == pytest.approx(0.25**2)


def test_a_fast_collapse_is_told_as_a_share() -> None:
    sentence = forecast_collapse([(2, 90), (4, 10)]).sentence
    assert sentence == "under a rank-agnostic average the energy above rank 2 would fall to 0.01 of itself every round"


def test_clients_that_have_not_told_their_examples_weigh_alike() -> None:
    assert forecast_collapse([(2, 0), (4, 0), (4, 0)]).factor == pytest.approx(4 / 9)
