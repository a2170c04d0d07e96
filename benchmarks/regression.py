"""A federation that really descends a gradient, small enough to run hundreds of times: what the theorem leaves out.

Every client fits its own matrix, T + bias + noise, with its LoRA factors: `rate` times the gradient of
1/2 ||lora_B lora_A - target||^2 on both factors, `local_steps` times a round. T is what all have in common. The
coordinator's side is the product's aggregation. Nothing here prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.collapse import Site, draw_cohorts, owner_shares, pulled, share_above, sites_of
from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, initial_adapter, slice_adapter
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.round import EffectiveUpdate, aggregate_adapters

MODULE = "layer"
SPEC = AdapterSpec((ModuleShape(MODULE, 40, 48),))
RANKS = (2, 2, 4, 4, 8, 8, 12, 12, 16, 16)
SMALLEST, GLOBAL_RANK = RANKS[0], RANKS[-1]

Stack = NDArray[np.float64]  # one matrix a client


@dataclass(frozen=True)
class Setting:
    """One regression; `bias` and `noise` are Frobenius norms relative to T's."""

    name: str
    drawn: int = len(RANKS)  # clients a round
    decay: float = 1.0  # T's singular values are decay^i
    local_steps: int = 5
    rate: float = 0.1
    bias: float = 0.3  # of each client's target, the same in all rounds
    noise: float = 0.0  # of each client's target, new in every round
    rounds: int = 60


@dataclass(frozen=True)
class Outcome:
    """The global adapter after the last round."""

    rho: float
    effective_rank: float  # exp of the spectrum's entropy, as in RoundReport
    error: float  # distance to T, relative to T's norm


SETTINGS = (
    Setting("all clients"),
    Setting("3 of 10 a round", drawn=3),
    Setting("spectrum .8^i", decay=0.8),
    Setting("rate .02", rate=0.02),
    Setting("40 local steps", local_steps=40),
    Setting("one round of 200 steps", local_steps=200, rounds=1),
    Setting("noise 2", noise=2.0),
    Setting("noise 4", noise=4.0),
)
METHODS = (
    MethodOptions("flexlora"),
    MethodOptions("raflora"),
    MethodOptions("raflora", shrinkage="share"),
    MethodOptions("fedit"),
    MethodOptions("hetlora"),
    MethodOptions("rb-lora"),
)


def run_regression(setting: Setting, options: MethodOptions, seed: int) -> Outcome:
    """All rounds of one federation; the same data, start and draws for every method of a seed."""
    rng = np.random.default_rng(seed)
    target = _target(setting, rng)
    norm = float(np.linalg.norm(target))
    own = {site.client_id: target + _gaussian(rng, target, setting.bias * norm) for site in sites_of(RANKS)}
    adapter = initial_adapter(SPEC, GLOBAL_RANK, seed)
    for sites in draw_cohorts(seed, RANKS, setting.drawn, setting.rounds):
        targets = np.stack([own[s.client_id] + _gaussian(rng, target, setting.noise * norm) for s in sites])
        updates = descend(adapter, sites, targets, setting)
        merged = aggregate_adapters(adapter, updates, options, RANKS)
        adapter = merged.adapter
    factors = adapter.modules[MODULE]
    error = np.linalg.norm(factors.lora_B.astype(np.float64) @ factors.lora_A - target) / norm
    return Outcome(merged.report.rho, merged.report.effective_rank, float(error))


def descend(adapter: Adapter, sites: Sequence[Site], targets: Stack, setting: Setting) -> list[EffectiveUpdate]:
    """One round's local training of all clients at once; targets are [clients, 40, 48]."""
    slices = [slice_adapter(adapter, site.rank, scaling=1.0).modules[MODULE] for site in sites]
    A, B = np.zeros((len(sites), GLOBAL_RANK, 48)), np.zeros((len(sites), 40, GLOBAL_RANK))
    for k, factors in enumerate(slices):
        A[k, : factors.rank], B[k, :, : factors.rank] = factors.lora_A, factors.lora_B
    for _ in range(setting.local_steps):
        residual = B @ A - targets
        # Rows and columns of zeros beyond a client's rank have the gradient zero: they stay what they are.
        A, B = A - setting.rate * B.swapaxes(1, 2) @ residual, B - setting.rate * residual @ A.swapaxes(1, 2)
    return [
        EffectiveUpdate(
            site.client_id,
            Adapter(
                {MODULE: Factors(A[k, : site.rank].astype(np.float32), B[k, :, : site.rank].astype(np.float32))}, {}
            ),
            site.num_examples,
        )
        for k, site in enumerate(sites)
    ]


def predicted_rho(setting: Setting, options: MethodOptions) -> float:
    """What the model of a pull says of rho for a method, all clients taking part: NaN where it says nothing.

    A round moves a client's singular values by the share 1 - (1 - rate)^local_steps of the way to T's.
    """
    shares = owner_shares(sites_of(RANKS))
    pull = 1.0 - (1.0 - setting.rate) ** setting.local_steps
    kept = np.ones_like(shares)
    # What a round multiplies a direction by, and the share of the way to the target that it goes.
    models = {
        "flexlora": (shares, pull),
        "fedit": (shares**2, pull),
        "raflora": (kept, pull * shares if options.shrinkage == "share" else pull),
        "rb-lora": (kept, pull),
    }
    if options.name not in models:
        return float("nan")
    factors, rate = models[options.name]
    values = pulled(factors, rate, setting.rounds, start=0.0)[-1] * setting.decay ** np.arange(GLOBAL_RANK)
    return 1.0 - float(share_above(values**2, SMALLEST))


def _target(setting: Setting, rng: np.random.Generator) -> Matrix:
    U, _ = np.linalg.qr(rng.standard_normal((40, GLOBAL_RANK)))
    V, _ = np.linalg.qr(rng.standard_normal((48, GLOBAL_RANK)))
    return np.asarray((U * setting.decay ** np.arange(GLOBAL_RANK)) @ V.T)


def _gaussian(rng: np.random.Generator, like: Matrix, norm: float) -> Matrix:
    draw = rng.standard_normal(like.shape)
    return np.asarray(norm / np.linalg.norm(draw) * draw)
