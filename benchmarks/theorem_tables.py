"""The findings of `python -m benchmarks.theorem` as tables of plain numbers: what was measured, what theory says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from benchmarks.collapse import LEVELS, SMALLEST, owner_shares, share_above, sites_of
from benchmarks.regression import predicted_rho
from benchmarks.theorem_runs import EVERYBODY, Case, Descent, Regime, Sampling
from coordinator.aggregation.low_rank import Matrix

Cell: TypeAlias = str | int | float

FIRST_OF_PARTITION = (0, *LEVELS[:-1])
ROUNDS_SHOWN = (6, 10, 20, 50, 100)
PARTITIONS = tuple(f"{low + 1}-{high}" for low, high in zip(FIRST_OF_PARTITION, LEVELS, strict=True))


@dataclass(frozen=True)
class Table:
    """A title, a sentence on how to read it, and rows; NaN where there is nothing to say."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Findings:
    """Everything that one run of the command measured."""

    cases: Sequence[Case]
    sampling: Sampling
    regimes: Sequence[Regime]
    descents: Sequence[Descent]


def tables_of(findings: Findings) -> list[Table]:
    """All tables, in the order of the results page."""
    return [
        round_by_round(findings.cases),
        every_case(findings.cases),
        one_sampled_round(findings.sampling),
        sampled_rounds(findings.sampling),
        carry_against_zero(findings.sampling),
        fixed_points(findings.regimes),
        shares_of_regimes(findings.regimes),
        regressions(findings.descents),
    ]


def largest_deviation(case: Case) -> float:
    """Of the measured 1 - rho from the exact form, relative, over all rounds."""
    return float(np.max(np.abs(share_above(case.measured) / share_above(case.exact) - 1.0)))


def round_by_round(cases: Sequence[Case]) -> Table:
    """1 - rho from a flat spectrum when clients return what they were sent."""
    flat = {c.method: c for c in cases if c.spectrum == "flat" and c.growth.low == c.growth.high == 1.0}
    above = {method: share_above(case.measured) for method, case in flat.items()}
    columns = ["round"]
    series = []
    for method in ("flexlora", "fedit"):
        columns += [method, f"{method} exact", f"{method} C gamma^t"]
        series += [above[method], share_above(flat[method].exact), flat[method].bound]
    columns.append("raflora")
    series.append(above["raflora"])
    rows = tuple((t, *(float(values[t]) for values in series)) for t in range(len(series[0])))
    return Table(
        "1 - rho(t), all 10 clients, flat spectrum, slices returned as they came",
        "exact: sum_(i>r1) q^2t e_i / sum_i q^2t e_i (q^4t for fedit)",
        tuple(columns),
        rows,
    )


def every_case(cases: Sequence[Case]) -> Table:
    """The end of every case, and how far the rounds came from the exact form."""
    rows = tuple(
        (
            case.spectrum,
            f"{case.growth.low:g}, {case.growth.high:g}",
            case.method,
            case.gamma,
            float(share_above(case.measured)[0]),
            float(share_above(case.measured)[-1]),
            float(share_above(case.exact)[-1]),
            float(case.bound[-1]),
            largest_deviation(case),
            float(np.max(share_above(case.measured) / case.bound)),
        )
        for case in cases
    )
    last = len(cases[0].bound) - 1
    columns = ("spectrum", "mu to r1, above", "method", "gamma", "1-rho(0)", f"1-rho({last})", "exact", "C gamma^t")
    return Table(
        f"All 10 clients, {last} rounds: the end, and the largest relative deviation of any round",
        "exact: the recursion; 1-rho / bound: at most 1 where the theorem holds; a gamma of 1 or more claims nothing",
        (*columns, "deviation", "1-rho / bound, largest"),
        rows,
    )


def one_sampled_round(sampling: Sampling) -> Table:
    """The energy ratio of one round against E[q^2]."""
    shares = owner_shares(sites_of(EVERYBODY))
    rows = []
    for name, index in zip(PARTITIONS[1:], FIRST_OF_PARTITION[1:], strict=True):
        ratios = sampling.one_round[:, index]
        mean, error = mean_and_error(ratios)
        expected = float(sampling.squares[index])
        rows.append(
            (name, float(shares[index]), float(shares[index] ** 2), expected, mean, error, (mean - expected) / error)
        )
    return Table(
        f"FlexLoRA, 10 of 100 drawn: energy after one round over that before, {len(sampling.one_round)} seeds",
        "E[q^2] = q^2 + q (1-q)/m (K-m)/(K-1); s.e. is the standard error of the mean",
        ("ranks", "q", "q^2", "E[q^2]", "mean", "s.e.", "(mean - E) / s.e."),
        tuple(rows),
    )


def sampled_rounds(sampling: Sampling) -> Table:
    """(1 - rho) / rho over rounds against its expectation, and 1 - rho against the bound."""
    above = share_above(sampling.average)  # [seeds, rounds + 1]
    energies = sampling.average[0, 0]
    rows = []
    for t in range(1, above.shape[1]):
        mean, error = mean_and_error(above[:, t] / (1.0 - above[:, t]))
        expected = float((energies * sampling.squares**t)[SMALLEST:].sum() / energies[:SMALLEST].sum())
        bound = float(energies[SMALLEST:].sum() / energies[:SMALLEST].sum() * sampling.gamma**t)
        mean_above, error_above = mean_and_error(above[:, t])
        rows.append((t, expected, mean, error, bound, mean_above, error_above, float(np.mean(above[:, t] > bound))))
    return Table(
        f"FlexLoRA, 10 of 100 drawn, {len(above)} seeds",
        "exact: sum_(i>r1) E[q^2]^t e_i / sum_(i<=r1) e_i; the theorem bounds the mean, not each run",
        ("round", "(1-rho)/rho exact", "mean", "s.e.", "C gamma^t", "1-rho mean", "s.e. ", "runs above the bound"),
        tuple(rows),
    )


def carry_against_zero(sampling: Sampling) -> Table:
    """How often a partition has no owner, and what becomes of it."""
    rounds = sampling.zeroed.shape[1] - 1
    rows = []
    for name, index in zip(PARTITIONS, FIRST_OF_PARTITION, strict=True):
        absence, measured = float(sampling.absence[index]), float(sampling.absent[index])
        error = float(np.sqrt(absence * (1.0 - absence) / sampling.draws))
        start = sampling.zeroed[0, 0, index]
        kept, kept_error = mean_and_error(sampling.zeroed[:, -1, index] / start)
        carried = float((sampling.carried[:, -1, index] / start).mean())
        rows.append((name, absence, measured, error, carried, (1.0 - absence) ** rounds, kept, kept_error))
    return Table(
        f"raFLoRA, 10 of 100 drawn: partitions without an owner ({sampling.draws} draws), "
        f"and what is left of their energy after {rounds} rounds ({len(sampling.zeroed)} seeds)",
        "absent: C(K-K_h, m) / C(K, m); carry is the product's rule, zero erases what nobody owns",
        ("ranks", "absent exact", "absent", "s.e.", "left, carry", "left, zero: exact", "left, zero", "s.e. "),
        tuple(rows),
    )


def fixed_points(regimes: Sequence[Regime]) -> Table:
    """Where the singular values end when every round adds signal."""
    shares = owner_shares(sites_of(EVERYBODY))
    rows = []
    for regime in (each for each in regimes if each.method == "flexlora"):
        deviation = float(np.max(np.abs(regime.measured / regime.exact - 1.0)))
        for name, index in zip(PARTITIONS[1:], FIRST_OF_PARTITION[1:], strict=True):
            end = float(regime.fixed_points[index])
            measured = float(np.sqrt(regime.measured[-1, index]))
            rows.append((regime.name, name, float(shares[index]), end, measured, deviation))
    last = len(regimes[0].bound) - 1
    return Table(
        f"Where the theorem overstates: FlexLoRA's singular values after {last} rounds, from 1",
        "drift g: q g/(1-q); pull eta to a target of 1: q eta/(1-q(1-eta)); "
        "deviation: the largest of any energy in any round from the regime's own recursion",
        ("regime", "ranks", "q", "fixed point", "measured", "deviation"),
        tuple(rows),
    )


def shares_of_regimes(regimes: Sequence[Regime]) -> Table:
    """1 - rho over rounds beside the bound that the theorem would give."""
    rows: list[tuple[Cell, ...]] = []
    for regime in regimes:
        measured, exact = share_above(regime.measured), share_above(regime.exact)
        last = len(measured) - 1
        # Under raFLoRA nothing happens: its last round says so.
        for t in sorted({t for t in ROUNDS_SHOWN if t < last and regime.method == "flexlora"} | {last}):
            slope = _slope(measured, t) if "drift" in regime.name and regime.method == "flexlora" else float("nan")
            rows.append(
                (regime.name, regime.method, t, float(measured[t]), float(exact[t]), float(regime.bound[t]), slope)
            )
    return Table(
        "Where the theorem overstates: 1 - rho(t)",
        "slope: d log(1-rho) / d log t between t/2 and t; -2 is a fall like 1/t^2",
        ("regime", "method", "round", "measured", "exact", "C gamma^t", "slope"),
        tuple(rows),
    )


def regressions(descents: Sequence[Descent]) -> Table:
    """The three measures of every regression and method, mean and standard deviation over seeds."""
    rows = []
    for descent in descents:
        spread = [
            number
            for name in ("rho", "effective_rank", "error")
            for number in _mean_and_deviation([getattr(outcome, name) for outcome in descent.outcomes])
        ]
        shrinkage = "" if descent.options.shrinkage == "weight-floor" else f" ({descent.options.shrinkage})"
        expected = predicted_rho(descent.setting, descent.options)
        rows.append((descent.setting.name, descent.options.name + shrinkage, expected, *spread))
    return Table(
        f"Gradient descent on a 40 x 48 regression of rank 16, {len(descents[0].outcomes)} seeds",
        "pull model: rho by sigma <- q (sigma + eta (1 - sigma)), all clients; error: distance to T over T's norm; the "
        "theorem's bound on 1 - rho after 60 rounds is 7 x .64^60 = 1.6e-11 under FlexLoRA from a flat spectrum",
        ("setting", "method", "rho, pull model", "rho", "s.d.", "effective rank", "s.d. ", "error", " s.d."),
        tuple(rows),
    )


def mean_and_error(values: Matrix) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _slope(values: Matrix, t: int) -> float:
    return float(np.log(values[t] / values[t // 2]) / np.log(2.0))
