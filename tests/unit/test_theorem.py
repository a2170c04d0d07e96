"""Theorem 4.4 and its limits, asserted on the product's own aggregation: short versions of `benchmarks.theorem`."""

from math import comb
from pathlib import Path

import numpy as np
import pytest

from benchmarks import theorem, theorem_picture
from benchmarks.collapse import (
    GLOBAL_RANK,
    LEVELS,
    SMALLEST,
    Site,
    adapter_with,
    draw_cohorts,
    energies_of,
    expected_squares,
    owner_shares,
    play,
    predicted_energies,
    share_above,
    sites_of,
    train,
)
from benchmarks.regression import SETTINGS, Outcome, run_regression
from benchmarks.theorem_runs import (
    CASES,
    EVERYBODY,
    POPULATION,
    POWERS,
    SPECTRA,
    Descent,
    Growth,
    Regime,
    Sampling,
    as_sent,
    overstated,
    run_case,
    sampling,
)
from benchmarks.theorem_tables import Findings, Table, fixed_points, mean_and_error, tables_of
from common.adapter import AdapterSpec, ModuleShape
from coordinator.aggregation.forecast import forecast_collapse
from coordinator.aggregation.method import MethodOptions

SINGLE = 1e-6  # relative: adapters are kept in float32
STANDARD_ERRORS = 4.0
LAYERS = AdapterSpec((ModuleShape("up", 96, 66), ModuleShape("down", 68, 90)))
FIRSTS = np.array(LEVELS[:-1])  # the first index of every higher partition
SHARES = owner_shares(sites_of(EVERYBODY))
FLEXLORA, RAFLORA = MethodOptions("flexlora"), MethodOptions("raflora")

# --- The algebra, by hand


def test_owner_shares_of_five_equal_levels() -> None:
    np.testing.assert_allclose(SHARES[[0, *FIRSTS]], [1.0, 0.8, 0.6, 0.4, 0.2])


def test_owner_shares_are_weighted_by_examples() -> None:
    np.testing.assert_allclose(owner_shares([Site("a", 1, 3), Site("b", 3, 1)]), [1.0, 0.25, 0.25])


def test_expected_square_of_a_draw_is_what_counting_gives() -> None:
    # 2 of 4 clients are drawn, 2 of the 4 are owners: none, one, both in 1, 4, 1 of the 6 draws.
    assert expected_squares(np.array([0.5]), 2, 4)[0] == pytest.approx((4 * 0.25 + 1 * 1.0) / 6)


def test_the_recursion_reorders_what_overtakes() -> None:
    np.testing.assert_allclose(predicted_energies(np.array([2.0, 1.0]), np.array([1.0, 3.0]), 1), [[2, 1], [3, 2]])


# --- All clients take part


@pytest.mark.parametrize("method", POWERS)
@pytest.mark.parametrize(("spectrum", "growth"), CASES)
def test_energies_follow_the_recursion(spectrum: str, growth: Growth, method: str) -> None:
    case = run_case(spectrum, growth, method, 6, LAYERS)
    np.testing.assert_allclose(share_above(case.measured), share_above(case.exact), rtol=SINGLE)
    assert np.all(share_above(case.measured) <= case.bound * (1.0 + SINGLE))


@pytest.mark.parametrize(("method", "power"), POWERS.items())
def test_one_minus_rho_is_the_closed_form(method: str, power: int) -> None:
    case = run_case(".95^i", Growth(1.3, 1.3), method, 6, LAYERS)  # common growth cancels
    energies = 0.95 ** (2 * np.arange(GLOBAL_RANK))
    for t, measured in enumerate(share_above(case.measured)):
        left = SHARES ** (power * t) * energies
        assert measured == pytest.approx(left[SMALLEST:].sum() / left.sum(), rel=SINGLE)


def test_raflora_keeps_rho() -> None:
    case = run_case("flat", Growth(1.0, 1.0), "raflora", 6, LAYERS)
    np.testing.assert_allclose(share_above(case.measured), 7 / 8, rtol=SINGLE)


def test_gamma_is_the_coordinators_forecast() -> None:
    assert run_case("flat", Growth(1.0, 1.0), "flexlora", 1, LAYERS).gamma == pytest.approx(0.64)


def test_a_client_returns_its_own_slice_whatever_its_scaling() -> None:
    adapter = adapter_with(LAYERS, SPECTRA[".95^i"], seed=2)
    returned = energies_of(train(adapter, 48, as_sent))  # its scaling 16 / 48 is not exact in binary
    np.testing.assert_allclose(returned, energies_of(adapter)[:48], rtol=SINGLE)


# --- Some clients are drawn


@pytest.fixture(scope="module")
def drawn() -> Sampling:
    return sampling(seeds=30, rounds=3, single_draws=250)


def test_the_mean_energy_ratio_of_a_round_is_the_expected_square(drawn: Sampling) -> None:
    for index in FIRSTS:
        mean, error = mean_and_error(drawn.one_round[:, index])
        assert abs(mean - drawn.squares[index]) < STANDARD_ERRORS * error


def test_sampling_makes_the_forecast_of_the_coordinator(drawn: Sampling) -> None:
    assert drawn.gamma == pytest.approx(drawn.squares[SMALLEST])
    assert drawn.gamma == forecast_collapse([(rank, 7) for rank in POPULATION], 10).factor


def test_the_mean_of_rho_over_its_complement_is_exact_and_below_the_bound(drawn: Sampling) -> None:
    above = share_above(drawn.average)
    for t in range(1, above.shape[1]):
        mean, error = mean_and_error(above[:, t] / (1.0 - above[:, t]))
        assert abs(mean - (drawn.squares[SMALLEST:] ** t).sum() / SMALLEST) < STANDARD_ERRORS * error
        assert mean <= 7.0 * drawn.gamma**t


def test_the_top_level_is_absent_in_a_tenth_of_the_rounds(drawn: Sampling) -> None:
    exact = comb(80, 10) / comb(100, 10)
    assert exact == pytest.approx(0.0951, abs=1e-4)
    error = np.sqrt(exact * (1.0 - exact) / drawn.draws)
    assert abs(drawn.absent[-1] - exact) < STANDARD_ERRORS * error


def test_carry_keeps_what_zeroing_erases(drawn: Sampling) -> None:
    start = drawn.zeroed[0, 0, -1]
    np.testing.assert_allclose(drawn.carried[:, :, -1], start, rtol=SINGLE)
    mean, error = mean_and_error(drawn.zeroed[:, -1, -1] / start)
    assert abs(mean - (1.0 - drawn.absence[-1]) ** 3) < STANDARD_ERRORS * error


def test_one_round_without_owners_erases_a_partition_or_keeps_it() -> None:
    start = adapter_with(LAYERS, np.ones(GLOBAL_RANK), seed=3)
    cohorts = [sites_of([8, 48])]
    kept, erased = (play(start, cohorts, as_sent, RAFLORA, zero=zero)[-1] for zero in (False, True))
    np.testing.assert_allclose(kept, 2.0, rtol=SINGLE)
    np.testing.assert_allclose(erased, np.where(np.arange(GLOBAL_RANK) < 48, 2.0, 0.0), rtol=SINGLE)


def test_the_draw_is_the_services_own_and_repeats() -> None:
    first, again, other = (draw_cohorts(seed, POPULATION, 10, 3) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(cohort) for cohort in first] == [10, 10, 10]


# --- Where the theorem overstates


@pytest.fixture(scope="module")
def regimes() -> list[Regime]:
    return overstated(rounds=40)


def test_every_regime_follows_its_own_recursion(regimes: list[Regime]) -> None:
    for regime in regimes:
        np.testing.assert_allclose(share_above(regime.measured), share_above(regime.exact), rtol=SINGLE)


def test_drift_ends_at_its_fixed_point(regimes: list[Regime]) -> None:
    drift = next(r for r in regimes if r.name == "drift 1" and r.method == "flexlora")
    np.testing.assert_allclose(drift.fixed_points[FIRSTS], [4.0, 1.5, 2 / 3, 0.25])
    # 0.8^40 of the way is still to go.
    np.testing.assert_allclose(np.sqrt(drift.measured[-1, FIRSTS]), [4.0, 1.5, 2 / 3, 0.25], rtol=2e-4)


def test_a_pull_ends_at_its_fixed_point(regimes: list[Regime]) -> None:
    ends = {"pull 0.1": [0.286, 0.130, 0.063, 0.024], "pull 0.9": [0.783, 0.574, 0.375, 0.184]}
    for name, expected in ends.items():
        pull = next(r for r in regimes if r.name == name and r.method == "flexlora")
        np.testing.assert_allclose(np.sqrt(pull.measured[-1, FIRSTS]), expected, atol=6e-4)


def test_under_drift_the_share_falls_like_one_over_t_squared_not_geometrically(regimes: list[Regime]) -> None:
    drift = next(r for r in regimes if r.name == "drift 1" and r.method == "flexlora")
    above = share_above(drift.measured)
    expected = 2 * np.log(21 / 41) / np.log(2)  # the lower directions are at 1 + t
    assert np.log2(above[40] / above[20]) == pytest.approx(expected, abs=0.1)
    assert above[40] > 1e4 * drift.bound[40]


def test_raflora_suppresses_nothing_in_any_regime(regimes: list[Regime]) -> None:
    for regime in regimes:
        if regime.method == "raflora":
            np.testing.assert_allclose(share_above(regime.measured), 7 / 8, rtol=SINGLE)


# --- Gradient descent


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    settings = {s.name: s for s in SETTINGS}
    return {
        (name, method.name): run_regression(settings[name], method, seed=0)
        for name in ("all clients", "noise 4")
        for method in (FLEXLORA, RAFLORA)
    }


def test_gradient_descent_collapses_under_flexlora_but_far_less_than_the_bound(
    outcomes: dict[tuple[str, str], Outcome],
) -> None:
    flexlora, raflora = outcomes["all clients", "flexlora"], outcomes["all clients", "raflora"]
    assert 0.4 < flexlora.rho < 0.7  # 1/8 would be none, the bound says 1 - 2e-11
    assert raflora.rho == pytest.approx(1 / 8, abs=0.03)
    assert raflora.error < 0.5 * flexlora.error


def test_strong_noise_makes_raflora_the_worse(outcomes: dict[tuple[str, str], Outcome]) -> None:
    assert outcomes["noise 4", "raflora"].error > 1.0 > outcomes["noise 4", "flexlora"].error


# --- What is printed and drawn


def test_tables_and_figure_of_a_small_run(drawn: Sampling, regimes: list[Regime], tmp_path: Path) -> None:
    cases = [run_case("flat", Growth(1.0, 1.0), method, 2, LAYERS) for method in POWERS]
    outcome = Outcome(rho=0.5, effective_rank=3.0, error=0.25)
    findings = Findings(cases, drawn, regimes, [Descent(SETTINGS[0], MethodOptions("hetlora"), (outcome, outcome))])
    tables = tables_of(findings)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert len({table.title for table in tables}) == len(tables)
    assert "| drift 1 | 9-16 | 0.8 | 4 |" in theorem.markdown(fixed_points(regimes))
    theorem_picture.draw(findings, tmp_path / "theorem.png")
    assert (tmp_path / "theorem.png").stat().st_size < 150_000


def test_markdown_has_a_dash_where_theory_says_nothing() -> None:
    table = Table("A title", "A note", ("method", "rho "), (("hetlora", float("nan")), ("fedit", 0.98765)))
    assert theorem.markdown(table).splitlines() == [
        "**A title.** A note.",
        "",
        "| method | rho |",
        "| --- | --- |",
        "| hetlora | - |",
        "| fedit | 0.9877 |",
    ]
