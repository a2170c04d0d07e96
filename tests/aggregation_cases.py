"""Federations of one module for property tests: random, non-square, with unequal ranks and scalings."""

from dataclasses import dataclass, fields, replace

import numpy as np
from dense_reference import Client
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from common.adapter import Factors
from coordinator.aggregation.method import Merged, MethodOptions
from coordinator.aggregation.methods import make_method

RAFLORA = MethodOptions("raflora")
FLEXLORA = MethodOptions("flexlora")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE = 2e-6  # the result is float32


@dataclass(frozen=True)
class Federation:
    """A previous global adapter's module and a round's clients; clients[k].A and .B are exact in float32."""

    previous: Factors
    clients: tuple[Client, ...]
    seed: int

    @property
    def rank(self) -> int:
        return self.previous.rank

    @property
    def ranks(self) -> list[int]:
        return [c.rank for c in self.clients]

    @property
    def num_examples(self) -> list[int]:
        return [c.num_examples for c in self.clients]

    @property
    def PB(self) -> np.ndarray:
        return self.previous.lora_B.astype(np.float64)

    @property
    def PA(self) -> np.ndarray:
        return self.previous.lora_A.astype(np.float64)

    def scale(self) -> float:
        """A norm that bounds the result: what an error is measured against."""
        return float(np.linalg.norm(product(self.previous)) + sum(np.linalg.norm(c.update()) for c in self.clients))


# Every method with the settings that change what it computes.
EVERY_METHOD = (
    MethodOptions("fedit"),
    MethodOptions("hetlora"),
    MethodOptions("flexlora"),
    MethodOptions("flora"),
    MethodOptions("ffa-lora"),
    MethodOptions("fedex-lora"),
    MethodOptions("rb-lora"),
    MethodOptions("replication"),
    MethodOptions("florist", energy_threshold=0.8),
    MethodOptions("florist", energy_threshold=1.0),
    RAFLORA,
    MethodOptions("raflora", weight_floor=0.35),
    MethodOptions("raflora", shrinkage="sqrt-share"),
    MethodOptions("raflora", shrinkage="share"),
    MethodOptions("raflora", shrinkage="effective-owners"),
)


def label(options: MethodOptions) -> str:
    """For pytest: the name and whatever is not default."""
    default = MethodOptions(options.name)
    changed = [
        getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)
    ]
    return " ".join(str(part) for part in (options.name, *changed))


def fitting(federation: Federation, options: MethodOptions) -> Federation:
    """The federation with clients such as the method has them: under ffa-lora nobody trains lora_A."""
    if not make_method(options).freezes_lora_A:
        return federation
    clients = tuple(replace(c, A=federation.PA[: c.rank]) for c in federation.clients)
    return replace(federation, clients=clients)


def effect(merged: Merged) -> np.ndarray:
    """All that the round did to a client of the global rank: the adapter and what was added to the base."""
    change = 0.0 if merged.base_change is None else product(merged.base_change)
    return product(merged.factors) + change


def single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).astype(np.float64)


def product(factors: Factors) -> np.ndarray:
    return factors.lora_B.astype(np.float64) @ factors.lora_A.astype(np.float64)


def factors_of(client: Client) -> Factors:
    return Factors(client.A, (client.scaling * client.B).astype(np.float32))


def merge(federation: Federation, options: MethodOptions = RAFLORA) -> Merged:
    return make_method(options).merge(
        federation.previous, [factors_of(c) for c in federation.clients], federation.num_examples
    )


def global_module(rng: np.random.Generator, m: int, n: int, rank: int, *, trained: bool = True) -> Factors:
    """U S and V^T with a spectrum of distinct values, or lora_B = 0 as in round 0."""
    U, _ = np.linalg.qr(rng.standard_normal((m, rank)))
    V, _ = np.linalg.qr(rng.standard_normal((n, rank)))
    S = (1.0 + np.arange(rank)) ** -0.7 if trained else np.zeros(rank)
    return Factors(V.T, U * S)


def untrained(federation: Federation) -> Federation:
    """Everybody returns exactly the slice it was sent."""
    previous = federation.previous
    clients = tuple(
        Client(previous.lora_B[:, : c.rank].astype(float), previous.lora_A[: c.rank].astype(float), c.num_examples)
        for c in federation.clients
    )
    return replace(federation, clients=clients)


@st.composite
def federations(draw: st.DrawFn, *, equal_ranks: bool = False, trained: bool = True) -> Federation:
    m, n = draw(st.sampled_from([(13, 9), (9, 14), (30, 17), (16, 41)]))
    rank = draw(st.integers(1, min(m, n)))
    levels = [rank] if equal_ranks else draw(st.lists(st.integers(1, rank), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    clients = []
    for r in draw(st.lists(st.sampled_from(levels), min_size=1, max_size=6)):
        scaling = draw(st.sampled_from([0.5, 1.0, 2.0, 16.0]))  # powers of two: exact in float32
        clients.append(
            Client(
                single(rng.standard_normal((m, r))) / scaling,
                single(rng.standard_normal((r, n))),
                draw(st.integers(1, 49)),
                scaling,
            )
        )
    return Federation(global_module(rng, m, n, rank, trained=trained), tuple(clients), seed)


floors = st.sampled_from([0.0, 0.1, 0.35, 1.0])


def assert_same(found: np.ndarray, expected: np.ndarray, federation: Federation) -> None:
    assert np.linalg.norm(found - expected) <= TOLERANCE * federation.scale()


def assert_alive(factors: Factors) -> None:
    """A gradient G of the update reaches lora_B's column i as G lora_A[i], which is zero only if the row is."""
    np.testing.assert_allclose(factors.lora_A @ factors.lora_A.T, np.eye(factors.rank), atol=1e-6)
    G = np.random.default_rng(0).standard_normal((factors.lora_B.shape[0], factors.lora_A.shape[1]))
    assert np.all(np.linalg.norm(G @ factors.lora_A.T, axis=0) > 1e-3)


def projection(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows
