"""What `python -m benchmarks.theorem` measures: rounds of the product's aggregation, with the prediction beside them.

Every function returns arrays over rounds; seeds are fixed, so a repetition gives the same numbers. Nothing here prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from benchmarks import regression
from benchmarks.collapse import (
    GLOBAL_RANK,
    LEVELS,
    SMALLEST,
    Training,
    adapter_with,
    draw_cohorts,
    drifted,
    expected_squares,
    owner_shares,
    play,
    predicted_energies,
    pulled,
    sites_of,
    theorem_bound,
)
from common.adapter import AdapterSpec, ModuleShape
from coordinator.aggregation.forecast import forecast_collapse
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import MethodOptions

# Non-square both ways; the first is wide enough that 10 clients' stack is thinner than the layer.
LAYERS = AdapterSpec((ModuleShape("wide", 352, 384), ModuleShape("up", 96, 66), ModuleShape("down", 72, 96)))
ONE_LAYER = AdapterSpec((ModuleShape("down", 66, 72),))
EVERYBODY = LEVELS * 2  # the ranks of 10 clients
POPULATION = LEVELS * 20  # the ranks of 100 clients
DRAWN = 10  # of the population, in a round
# A method multiplies a direction's energy by q to this power when clients return what they were sent.
POWERS = {"flexlora": 2, "fedit": 4, "raflora": 0}

SPECTRA = {
    "flat": np.ones(GLOBAL_RANK),
    ".95^i": 0.95 ** np.arange(GLOBAL_RANK),
    # The gap lets the higher directions grow for a while without overtaking the lower ones.
    "2 then 1": np.where(np.arange(GLOBAL_RANK) < SMALLEST, 2.0, 1.0),
}


@dataclass(frozen=True)
class Growth:
    """What a client multiplies the singular values by: up to the smallest rank, and above it."""

    low: float
    high: float

    def train(self, sizes: Matrix) -> Matrix:
        """The rule, for a slice of any rank."""
        return self.of(len(sizes)) * sizes

    def of(self, rank: int) -> Matrix:
        """mu per rank index."""
        return np.where(np.arange(rank) < SMALLEST, self.low, self.high)


@dataclass(frozen=True)
class Case:
    """One federation under the theorem's assumptions, all clients taking part."""

    spectrum: str
    growth: Growth
    method: str
    gamma: float
    measured: Matrix  # energies, [rounds + 1, rank]
    exact: Matrix  # the same by the recursion
    bound: Matrix  # C gamma^t, [rounds + 1]


@dataclass(frozen=True)
class Sampling:
    """Many federations that differ in the seed of the draw alone: flat spectra, slices returned as they came."""

    one_round: Matrix  # FlexLoRA: each index's energy after one round over that before, [single draws, rank]
    average: Matrix  # FlexLoRA, energies, [seeds, rounds + 1, rank]
    carried: Matrix  # raFLoRA, the same
    zeroed: Matrix  # raFLoRA if an index without owners were erased, the same
    squares: Matrix  # E[q^2] by the formula, [rank]
    gamma: float  # as the coordinator forecasts it
    absent: Matrix  # measured share of rounds in which nobody owns an index, [rank]
    absence: Matrix  # the same by counting, [rank]
    draws: int  # rounds counted for `absent`


@dataclass(frozen=True)
class Regime:
    """One federation whose clients add signal: where the recursion is not multiplicative."""

    name: str
    method: str
    measured: Matrix  # energies of one layer, [rounds + 1, rank]
    exact: Matrix  # the same by the regime's own recursion
    bound: Matrix  # what the theorem would say, [rounds + 1]
    fixed_points: Matrix  # singular values that the recursion ends at, [rank]; infinite where it grows for ever


@dataclass(frozen=True)
class Descent:
    """One method in one regression, over seeds."""

    setting: regression.Setting
    options: MethodOptions
    outcomes: tuple[regression.Outcome, ...]


CASES = (
    ("flat", Growth(1.0, 1.0)),
    ("flat", Growth(1.3, 1.3)),
    (".95^i", Growth(1.0, 1.0)),
    ("2 then 1", Growth(1.2, 1.0)),
    ("2 then 1", Growth(1.0, 1.1)),
    ("2 then 1", Growth(1.0, 1.3)),
)


def full_participation(rounds: int = 10, layers: AdapterSpec = LAYERS) -> list[Case]:
    """Every case of CASES under the three methods."""
    return [run_case(s, growth, method, rounds, layers) for s, growth in CASES for method in POWERS]


def run_case(spectrum: str, growth: Growth, method: str, rounds: int, layers: AdapterSpec) -> Case:
    """One case; gamma is the coordinator's own forecast, corrected for the growth."""
    sites = sites_of(EVERYBODY)
    start = adapter_with(layers, SPECTRA[spectrum], seed=1)
    measured = play(start, [sites] * rounds, growth.train, MethodOptions(method))
    energies = len(layers.modules) * SPECTRA[spectrum] ** 2
    factors = owner_shares(sites) ** POWERS[method] * growth.of(GLOBAL_RANK) ** 2
    forecast = forecast_collapse([(site.rank, site.num_examples) for site in sites]).factor
    gamma = forecast ** (POWERS[method] / 2) * (growth.high / growth.low) ** 2
    exact = predicted_energies(energies, factors, rounds)
    return Case(spectrum, growth, method, gamma, measured, exact, theorem_bound(energies, gamma, rounds))


def sampling(seeds: int = 200, rounds: int = 10, single_draws: int = 2000) -> Sampling:
    """m of K clients drawn by the service's own draw; every seed is one federation."""
    start = adapter_with(ONE_LAYER, SPECTRA["flat"], seed=1)
    many = [draw_cohorts(seed, POPULATION, DRAWN, rounds) for seed in range(seeds)]
    single = [draw_cohorts(seeds + seed, POPULATION, DRAWN, 1) for seed in range(single_draws)]
    flexlora, raflora = MethodOptions("flexlora"), MethodOptions("raflora")
    one_round = np.array([play(start, cohorts, as_sent, flexlora) for cohorts in single])
    largest = np.array([max(site.rank for site in sites) for cohorts in (*many, *single) for sites in cohorts])
    shares = owner_shares(sites_of(POPULATION))
    clients = len(POPULATION)
    return Sampling(
        one_round=one_round[:, 1] / one_round[:, 0],
        average=np.array([play(start, cohorts, as_sent, flexlora) for cohorts in many]),
        carried=np.array([play(start, cohorts, as_sent, raflora) for cohorts in many]),
        zeroed=np.array([play(start, cohorts, as_sent, raflora, zero=True) for cohorts in many]),
        squares=expected_squares(shares, DRAWN, clients),
        gamma=forecast_collapse([(rank, 1) for rank in POPULATION], DRAWN).factor,
        absent=np.asarray((largest[:, None] <= np.arange(GLOBAL_RANK)).mean(axis=0)),
        absence=np.array([comb(round(clients * (1.0 - q)), DRAWN) / comb(clients, DRAWN) for q in shares]),
        draws=len(largest),
    )


def overstated(rounds: int = 200, gain: float = 1.0, rates: Sequence[float] = (0.1, 0.9)) -> list[Regime]:
    """Additive drift and a pull to a target, under FlexLoRA and raFLoRA, from a flat spectrum of ones."""
    q, kept = owner_shares(sites_of(EVERYBODY)), np.ones(GLOBAL_RANK)
    regimes = []
    for method, factor in (("flexlora", q), ("raflora", kept)):
        with np.errstate(divide="ignore"):
            ends = factor * gain / (1.0 - factor)
        exact = drifted(factor, gain, rounds)
        regimes.append(_regime(f"drift {gain:g}", method, lambda sizes: sizes + gain, exact, ends))
        for rate in rates:
            ends = factor * rate / (1.0 - factor * (1.0 - rate))
            exact = pulled(factor, rate, rounds)
            regimes.append(_regime(f"pull {rate:g}", method, _pull(rate), exact, ends))
    return regimes


def descents(seeds: int = 3, settings: Sequence[regression.Setting] = regression.SETTINGS) -> list[Descent]:
    """Every method in every regression."""
    return [
        Descent(s, options, tuple(regression.run_regression(s, options, seed) for seed in range(seeds)))
        for s in settings
        for options in regression.METHODS
    ]


def as_sent(sizes: Matrix) -> Matrix:
    """No training: a client returns its slice as it came."""
    return sizes


def _pull(rate: float) -> Training:
    return lambda sizes: sizes + rate * (1.0 - sizes)


def _regime(name: str, method: str, training: Callable[[Matrix], Matrix], exact: Matrix, ends: Matrix) -> Regime:
    rounds = len(exact) - 1
    sites = sites_of(EVERYBODY)
    measured = play(adapter_with(ONE_LAYER, exact[0], seed=1), [sites] * rounds, training, MethodOptions(method))
    gamma = forecast_collapse([(site.rank, 1) for site in sites]).factor ** (POWERS[method] / 2)
    return Regime(name, method, measured, exact**2, theorem_bound(exact[0] ** 2, gamma, rounds), ends)
