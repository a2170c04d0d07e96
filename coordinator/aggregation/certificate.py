"""What vouches for a merged module: which way it was computed, and how far it can be from the truth."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Nothing decomposed; QR and SVD of the stack; Golub-Kahan on the factors; SVD of the product itself.
Way: TypeAlias = Literal["none", "exact", "iteration", "dense"]


@dataclass(frozen=True)
class Certificate:
    """Of one module."""

    way: Way
    half_passes: int = 0  # multiplications by the stack or its transpose
    # ||W^T U - V S|| / S_r of the triplets before the last half pass, which can only improve on them; 0 where LAPACK
    # decomposed in float64.
    residual: float = 0.0
    captured: float = 1.0  # share of the energy of the average that the global rank holds


NOTHING_DECOMPOSED = Certificate("none")


@dataclass(frozen=True)
class RoundCertificate:
    """The worst of a round's modules, and how many were computed which way."""

    half_passes: int = 0
    residual: float = 0.0
    captured: float = 1.0
    exact: int = 0
    iterated: int = 0
    dense: int = 0


NO_ROUND_CERTIFICATE = RoundCertificate()


def worst_of(certificates: Iterable[Certificate]) -> RoundCertificate:
    """What a round's report says."""
    all_of_them = list(certificates)
    ways = [certificate.way for certificate in all_of_them]
    return RoundCertificate(
        half_passes=max((certificate.half_passes for certificate in all_of_them), default=0),
        residual=max((certificate.residual for certificate in all_of_them), default=0.0),
        captured=min((certificate.captured for certificate in all_of_them), default=1.0),
        exact=ways.count("exact"),
        iterated=ways.count("iteration"),
        dense=ways.count("dense"),
    )
