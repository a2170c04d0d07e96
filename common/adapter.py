"""LoRA adapters as values: what they look like (AdapterSpec) and what they hold (Adapter).

Nothing here knows files, PEFT's key names or an aggregation method. Arrays are float32 and read-only.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import floor, prod

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from common.errors import AdapterMismatch, InvalidRequest, WrongRank

Array = NDArray[np.float32]

MAX_TENSORS = 16_384  # more than any transformer has
MAX_NUMBERS = 1 << 30  # of one adapter; bounds what a peer's spec can make us allocate
MAX_DIMENSION = 1 << 24
MAX_AXES = 8
MAX_NAME_CHARS = 512
_SEEDED_TENSOR_STD = 0.02  # transformers' initializer_range of every classification head


@dataclass(frozen=True, order=True)
class ModuleShape:
    """One adapted linear layer."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, order=True)
class TensorShape:
    """One tensor that is trained whole (a classification head's weight, say)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterSpec:
    """The names and shapes of everything that is trained, whatever the rank; sorted by name."""

    modules: tuple[ModuleShape, ...]
    tensors: tuple[TensorShape, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(sorted(self.modules)))
        object.__setattr__(self, "tensors", tuple(sorted(self.tensors)))
        names = [m.name for m in self.modules] + [t.name for t in self.tensors]
        if not self.modules:
            raise InvalidRequest("adapter spec: no adapted module; at least one is needed")
        if len(names) > MAX_TENSORS:
            raise InvalidRequest(f"adapter spec: {len(names)} entries; at most {MAX_TENSORS} are allowed")
        if len(set(names)) != len(names):
            raise InvalidRequest("adapter spec: a name stands twice")
        # A tensor of such a name could not be told from a module's factor, or from a file's metadata.
        reserved = {"__metadata__"} | {f"{m.name}.lora_{factor}" for m in self.modules for factor in "AB"}
        for name, shape in self._shapes():
            if name in reserved or not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARS:
                raise InvalidRequest(f"adapter spec: {name[:MAX_NAME_CHARS]!r} cannot be a name")
            if len(shape) > MAX_AXES or any(not 0 < size <= MAX_DIMENSION for size in shape):
                raise InvalidRequest(f"adapter spec: {name} has the impossible shape {shape[:MAX_AXES]}")
        self.check_size(1)

    def check_size(self, rank: int) -> None:
        """Raises InvalidRequest if an adapter of this rank would hold more than MAX_NUMBERS numbers."""
        numbers = numbers_of(self, rank)
        if numbers > MAX_NUMBERS:
            raise InvalidRequest(f"adapter spec: {numbers} numbers at rank {rank}; at most {MAX_NUMBERS} are allowed")

    def _shapes(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        yield from ((m.name, (m.out_features, m.in_features)) for m in self.modules)
        yield from ((t.name, t.shape) for t in self.tensors)

    @cached_property
    def largest_rank(self) -> int:
        """The largest rank that every module can hold: the smallest of all sides."""
        return min(min(m.out_features, m.in_features) for m in self.modules)


def numbers_of(spec: AdapterSpec, rank: int) -> int:
    """How many numbers an adapter of this rank holds."""
    factors = sum(module.out_features + module.in_features for module in spec.modules)
    return rank * factors + sum(prod(tensor.shape) for tensor in spec.tensors)


@dataclass(frozen=True)
class Factors:
    """One module's LoRA factors: the update is scaling * lora_B @ lora_A."""

    lora_A: Array  # [rank, in_features]
    lora_B: Array  # [out_features, rank]

    def __post_init__(self) -> None:
        if self.lora_A.ndim != 2 or self.lora_B.ndim != 2 or self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise AdapterMismatch(
                f"factors: lora_A {self.lora_A.shape} and lora_B {self.lora_B.shape} do not share a rank"
            )
        object.__setattr__(self, "lora_A", _frozen(self.lora_A))
        object.__setattr__(self, "lora_B", _frozen(self.lora_B))

    @property
    def rank(self) -> int:
        """The number of directions."""
        return int(self.lora_A.shape[0])


@dataclass(frozen=True)
class Adapter:
    """All factors of one rank, and the tensors that are trained beside them."""

    modules: Mapping[str, Factors]
    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        ranks = {factors.rank for factors in self.modules.values()}
        if len(ranks) != 1:
            raise AdapterMismatch(f"adapter: modules have the ranks {sorted(ranks)}; exactly one is expected")
        tensors = {name: _frozen(tensor) for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", tensors)

    @property
    def rank(self) -> int:
        """The rank of every module."""
        return next(iter(self.modules.values())).rank

    @property
    def spec(self) -> AdapterSpec:
        """Its names and shapes."""
        return AdapterSpec(
            tuple(ModuleShape(n, f.lora_B.shape[0], f.lora_A.shape[1]) for n, f in self.modules.items()),
            tuple(TensorShape(n, t.shape) for n, t in self.tensors.items()),
        )


def slice_adapter(adapter: Adapter, rank: int, *, scaling: float) -> Adapter:
    """The first `rank` directions, for a client that multiplies lora_B lora_A by `scaling`.

    The adapter holds effective updates (scaling 1), so lora_B is divided by the receiver's scaling:
    what the client computes is then the first `rank` directions exactly.
    Raises WrongRank if the adapter has fewer directions.
    """
    if not 0 < rank <= adapter.rank:
        raise WrongRank(f"rank slice {rank}: the global adapter has the ranks 1 to {adapter.rank}")
    divisor = np.float32(scaling)
    modules = {n: Factors(f.lora_A[:rank], f.lora_B[:, :rank] / divisor) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)


def shrunk_rank(rank: int, share: float) -> int:
    """The largest rank that is no more than this share of `rank`; may be 0."""
    # 0.7 * 90 is 62.99999999999999 in binary, and means 63.
    return floor(round(share * rank, 9))


def effective(adapter: Adapter, *, scaling: float) -> Adapter:
    """The inverse of the scaling in slice_adapter: factors whose product is the update itself."""
    factor = np.float32(scaling)
    modules = {n: Factors(f.lora_A, f.lora_B * factor) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)


def check_rank(spec: AdapterSpec, rank: int) -> None:
    """Raises WrongRank if a module is too narrow for this global rank, InvalidRequest if the whole is too large."""
    if not 0 < rank <= spec.largest_rank:
        narrow = min(spec.modules, key=lambda m: min(m.out_features, m.in_features))
        raise WrongRank(
            f"global rank {rank}: module {narrow.name} is {narrow.out_features} x {narrow.in_features}, "
            f"so at most rank {spec.largest_rank} fits; lower the rank or leave the module out"
        )
    spec.check_size(rank)


def initial_adapter(spec: AdapterSpec, rank: int, seed: int) -> Adapter:
    """Round 0: lora_B = 0 and one seeded lora_A of orthonormal rows: slices are nested, no direction is dead.

    Tensors outside LoRA of two or more dimensions are drawn from N(0, 0.02^2), vectors are zero: the usual
    initial values of a classification head, made here once so that all clients start alike.

    Raises WrongRank if a module is too narrow, InvalidRequest if the whole is too large.
    """
    check_rank(spec, rank)
    # Bits can depend on the number of BLAS threads; and for panels as narrow as these, more of them only wait.
    with threadpool_limits(limits=1):
        return Adapter(_initial_factors(spec, rank, seed), _initial_tensors(spec, seed))


def _initial_factors(spec: AdapterSpec, rank: int, seed: int) -> dict[str, Factors]:
    modules = {}
    for module in spec.modules:
        gaussian = _generator(seed, module.name).standard_normal((module.in_features, rank))
        orthonormal, triangle = np.linalg.qr(gaussian)
        rows = (orthonormal * np.sign(np.diag(triangle))).T
        modules[module.name] = Factors(rows.astype(np.float32), np.zeros((module.out_features, rank), dtype=np.float32))
    return modules


def _initial_tensors(spec: AdapterSpec, seed: int) -> dict[str, Array]:
    tensors = {}
    for tensor in spec.tensors:
        scale = _SEEDED_TENSOR_STD if len(tensor.shape) > 1 else 0.0
        values = scale * _generator(seed, tensor.name).standard_normal(tensor.shape)
        tensors[tensor.name] = values.astype(np.float32)
    return tensors


def _generator(seed: int, name: str) -> np.random.Generator:
    # Named streams: adding a module does not change the values of the others.
    stream = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(stream[:16], "big")))


def _frozen(array: Array) -> Array:
    frozen = np.asarray(array, dtype=np.float32, order="C")
    if frozen.flags.writeable:
        frozen = frozen.view()
        frozen.flags.writeable = False
    return frozen
