"""Theorem 4.4's algebra, and federations that train as it assumes, run through the product's own aggregation.

A client keeps the singular directions that it was sent and changes their singular values by a rule (`Training`).
q is the weight share of the clients that own a rank index; docs/method.md derives the rest. Nothing here prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from common.adapter import Adapter, AdapterSpec, Factors, effective, initial_adapter, slice_adapter
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.round import EffectiveUpdate, aggregate_adapters
from coordinator.federation.ranks import select_cohort
from coordinator.federation.state import Client, Profile, Rules

LEVELS = (8, 16, 32, 48, 64)  # the paper's ranks
SMALLEST, GLOBAL_RANK = LEVELS[0], LEVELS[-1]
LORA_ALPHA = 16.0  # divided by the rank: clients of different ranks have different scalings

# Singular values as a client was sent them, [rank], to those that it returns.
Training: TypeAlias = Callable[[Matrix], Matrix]


@dataclass(frozen=True)
class Site:
    """One client of a round."""

    client_id: str
    rank: int
    num_examples: int = 1


def sites_of(ranks: Sequence[int]) -> tuple[Site, ...]:
    """Clients of these ranks, all of the same weight."""
    return tuple(Site(f"site-{index:03d}", rank) for index, rank in enumerate(ranks))


# --- The algebra


def owner_shares(sites: Sequence[Site]) -> Matrix:
    """q, [largest rank]: the weight share of the clients that own each rank index."""
    weights = np.array([site.num_examples for site in sites], dtype=np.float64)
    ranks = np.array([site.rank for site in sites])
    owns = ranks[:, None] > np.arange(ranks.max())
    return np.asarray((weights[:, None] * owns).sum(axis=0) / weights.sum())


def expected_squares(shares: Matrix, drawn: int, clients: int) -> Matrix:
    """E[q^2] when `drawn` of `clients` equal clients are drawn without replacement."""
    return shares**2 + shares * (1.0 - shares) / drawn * (clients - drawn) / (clients - 1)


def share_above(energies: Matrix, smallest: int = SMALLEST) -> Matrix:
    """1 - rho: the share of the energy above the smallest rank; energies are [..., rank]."""
    return np.asarray(energies[..., smallest:].sum(axis=-1) / energies.sum(axis=-1))


def predicted_energies(energies: Matrix, factors: Matrix, rounds: int) -> Matrix:
    """The exact recursion e_i <- factor_i e_i, [rounds + 1, rank], re-ordered by size after every round as an SVD does.

    Where no direction overtakes another this is e_i(t) = factor_i^t e_i(0).
    """
    series = [energies]
    for _ in range(rounds):
        series.append(np.sort(series[-1] * factors)[::-1])
    return np.array(series)


def theorem_bound(energies: Matrix, gamma: float, rounds: int, smallest: int = SMALLEST) -> Matrix:
    """C gamma^t for t = 0 to `rounds`, with C = (1 - rho(0)) / rho(0)."""
    constant = energies[smallest:].sum() / energies[:smallest].sum()
    return np.asarray(constant * gamma ** np.arange(rounds + 1))


def drifted(shares: Matrix, gain: float, rounds: int) -> Matrix:
    """Singular values from 1 under sigma <- q (sigma + gain): they end at q gain / (1 - q), [rounds + 1, rank]."""
    times = np.arange(rounds + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        sums = np.where(shares < 1.0, shares * (1.0 - shares**times) / (1.0 - shares), times)
    return np.asarray(shares**times + gain * sums)


def pulled(shares: Matrix, rate: Matrix | float, rounds: int, start: float = 1.0) -> Matrix:
    """Singular values from `start` under sigma <- q (sigma + rate (1 - sigma)), [rounds + 1, rank].

    They end at q rate / (1 - q (1 - rate)) of their target, 1.
    """
    fixed = shares * rate / (1.0 - shares * (1.0 - rate))
    return np.asarray(fixed + (start - fixed) * (shares * (1.0 - rate)) ** np.arange(rounds + 1)[:, None])


# --- The federations


def adapter_with(spec: AdapterSpec, spectrum: Matrix, seed: int) -> Adapter:
    """A global adapter whose modules all have this descending spectrum, in seeded directions."""
    start = initial_adapter(spec, len(spectrum), seed)
    rng = np.random.default_rng(seed)
    modules = {}
    for name, factors in start.modules.items():
        columns, _ = np.linalg.qr(rng.standard_normal(factors.lora_B.shape))
        modules[name] = Factors(factors.lora_A, (columns * spectrum).astype(np.float32))
    return Adapter(modules, {})


def play(
    start: Adapter, cohorts: Sequence[Sequence[Site]], training: Training, options: MethodOptions, zero: bool = False
) -> Matrix:
    """The adapter's energies before the first and after every round, [rounds + 1, rank].

    With `zero`, an index that nobody of a round owns is erased before the round: the alternative to carrying it.
    """
    adapter, energies = start, [energies_of(start)]
    for sites in cohorts:
        if zero:
            adapter = _erased_above(max(site.rank for site in sites), adapter)
        trained = {rank: train(adapter, rank, training) for rank in {site.rank for site in sites}}
        updates = [EffectiveUpdate(site.client_id, trained[site.rank], site.num_examples) for site in sites]
        adapter = aggregate_adapters(adapter, updates, options).adapter
        energies.append(energies_of(adapter))
    return np.array(energies)


def energies_of(adapter: Adapter) -> Matrix:
    """The energy of each rank index over all modules, [rank]: lora_B's column times lora_A's row, squared norms."""
    return np.asarray(sum(_sizes_of(factors) ** 2 for factors in adapter.modules.values()))


def train(adapter: Adapter, rank: int, training: Training) -> Adapter:
    """The effective update of a client that was sent its slice at its own scaling and trained by the rule."""
    scaling = LORA_ALPHA / rank
    received = effective(slice_adapter(adapter, rank, scaling=scaling), scaling=scaling)
    modules = {name: _moved(factors, training) for name, factors in received.modules.items()}
    return Adapter(modules, {})


def draw_cohorts(seed: int, ranks: Sequence[int], drawn: int, rounds: int) -> tuple[tuple[Site, ...], ...]:
    """The service's own draw, rounds 1 to `rounds`, among clients of these ranks and the same weight."""
    rules = Rules(
        num_rounds=rounds,
        global_rank=max(ranks),
        seed=seed,
        min_clients=1,
        fraction=drawn / len(ranks),
        quorum=1.0,
        round_deadline_seconds=60.0,
        lease_ttl_seconds=60.0,
        evaluate_every=0,
    )
    members = tuple(
        Client(site.client_id, "", Profile(max_rank=site.rank, num_examples=1), site.rank, order)
        for order, site in enumerate(sites_of(ranks))
    )
    cohorts = (select_cohort(rules, members, number, 0) for number in range(1, rounds + 1))
    return tuple(tuple(Site(client_id, rank) for client_id, rank in cohort) for cohort in cohorts)


def _moved(factors: Factors, training: Training) -> Factors:
    sizes = _sizes_of(factors)
    # A direction without energy has nothing to scale: it stays dead, as the multiplicative recursion has it.
    scales = np.divide(training(sizes), sizes, out=np.zeros_like(sizes), where=sizes > 0.0)
    return Factors(factors.lora_A, (factors.lora_B * scales).astype(np.float32))


def _sizes_of(factors: Factors) -> Matrix:
    # Some methods keep lora_A at another length than 1.
    rows, columns = factors.lora_A.astype(np.float64), factors.lora_B.astype(np.float64)
    return np.asarray(np.linalg.norm(columns, axis=0) * np.linalg.norm(rows, axis=1))


def _erased_above(rank: int, adapter: Adapter) -> Adapter:
    keeps = np.arange(adapter.rank) < rank
    modules = {n: Factors(f.lora_A, f.lora_B * keeps.astype(np.float32)) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)
