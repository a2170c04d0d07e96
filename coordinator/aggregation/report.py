"""What a round did to the ranks of the global adapter, as numbers an operator can read.

All follow from singular values and from who took part. Nothing here knows factors, or how they were merged.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordinator.aggregation.certificate import NO_ROUND_CERTIFICATE, RoundCertificate
from coordinator.aggregation.low_rank import Matrix

_MOST_OF_THE_ENERGY = 0.99


@dataclass(frozen=True)
class RankPartition:
    """The rank indices from low (inclusive) to high (exclusive)."""

    low: int
    high: int
    energy_share: float
    contributors: int  # clients of this round that own it
    effective_contributors: float  # 1 / sum of their squared weights; 0 if there are none


@dataclass(frozen=True)
class RoundReport:
    """The global adapter's spectrum after a round.

    The adapter's spectrum is, per index, the root of the sum of the modules' squared singular values, so that its
    energy below an index is what a client of that rank receives (of a method that decomposes; of factor means it is
    the most that it can receive). Without energy (nothing trained yet) shares and ranks are 0.
    """

    partitions: tuple[RankPartition, ...]
    rho: float  # energy share within the smallest rank of the federation
    effective_rank: float  # exp of the entropy of the spectrum
    rank_99: int  # the least rank that holds 99 % of the energy
    energy: float  # sum of squared singular values over all modules
    energy_lost: float  # share of the merged update's energy that truncation to the global rank cut off
    norm: float  # root of the energy: the Frobenius norm over all modules
    # How the modules were computed and what vouches for it; journals from before it have the default.
    certificate: RoundCertificate = NO_ROUND_CERTIFICATE

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RoundReport":
        """The inverse of to_json."""
        partitions = tuple(RankPartition(**partition) for partition in content["partitions"])
        certificate = RoundCertificate(**content.get("certificate", {}))
        return cls(**{**content, "partitions": partitions, "certificate": certificate})


@dataclass(frozen=True)
class Participation:
    """Who took part: what a report needs to know of the round beside its result."""

    ranks: tuple[int, ...]  # of the round's clients
    num_examples: tuple[int, ...]  # of the same clients
    levels: tuple[int, ...]  # the distinct ranks in the whole federation


def report_round(
    spectra: Collection[Matrix],
    energy_lost: float,
    participation: Participation,
    certificate: RoundCertificate = NO_ROUND_CERTIFICATE,
) -> RoundReport:
    """The report on a merged adapter, or on anything else that has singular values.

    `spectra` are the modules' singular values, each descending, of any length (a method that changes the base has
    more of them than the global rank). `energy_lost` is the energy (not the share) that truncation cut off.
    """
    spectrum = spectrum_of(spectra)
    energies = spectrum**2
    energy = float(energies.sum())
    bounds = _bounds(participation, len(spectrum))
    partitions = tuple(
        _partition(low, high, energies, participation) for low, high in zip((0, *bounds), bounds, strict=False)
    )
    return RoundReport(
        partitions=partitions,
        rho=partitions[0].energy_share,
        effective_rank=_effective_rank(spectrum),
        rank_99=_rank_holding(_MOST_OF_THE_ENERGY, energies),
        energy=energy,
        energy_lost=energy_lost / (energy + energy_lost) if energy_lost > 0.0 else 0.0,
        norm=float(np.sqrt(energy)),
        certificate=certificate,
    )


def spectrum_of(spectra: Collection[Matrix]) -> Matrix:
    """One value per index, as long as the longest: the root of the modules' summed squared singular values."""
    squares = np.zeros(max(len(singular_values) for singular_values in spectra))
    for singular_values in spectra:
        squares[: len(singular_values)] += singular_values**2
    return np.asarray(np.sqrt(squares))


def _bounds(participation: Participation, length: int) -> tuple[int, ...]:
    # A rank that an operator changed in the open round and indices above everybody's rank have their place.
    levels: Iterable[int] = (*participation.levels, *participation.ranks, length)
    return tuple(sorted({min(level, length) for level in levels}))


def _partition(low: int, high: int, energies: Matrix, participation: Participation) -> RankPartition:
    pairs = zip(participation.ranks, participation.num_examples, strict=True)
    owners = [float(num_examples) for rank, num_examples in pairs if rank >= high]
    return RankPartition(
        low=low,
        high=high,
        energy_share=_share(float(energies[low:high].sum()), float(energies.sum())),
        contributors=len(owners),
        effective_contributors=_share(sum(owners) ** 2, sum(n * n for n in owners)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def _effective_rank(spectrum: Matrix) -> float:
    live = spectrum[spectrum > 0.0]
    if len(live) == 0:
        return 0.0
    shares = live / live.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _rank_holding(share: float, energies: Matrix) -> int:
    held = np.cumsum(energies)
    if held[-1] == 0.0:
        return 0
    return int(np.searchsorted(held, share * held[-1])) + 1
