"""One round's aggregation: checked files or adapters in, the next global adapter and its report out.

The result is a function of its input alone: not of the order of arrival, of the number of processes or of
what maps the modules. Files are read where a method needs them: of one that averages products a few blocks of one
module are in memory at a time and worker, however many clients there are (in a layer narrower than five global ranks
all of one module's factors are). Nothing here writes or waits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from common.adapter import Adapter, AdapterSpec, Array, Factors
from common.codec import Layout, WireDtype, read_module, read_tensor
from common.errors import AdapterMismatch, InvalidRequest, NotFinite
from common.memory import keep_memory_flat
from coordinator.aggregation.certificate import worst_of
from coordinator.aggregation.method import Merged, MethodOptions
from coordinator.aggregation.methods import make_method
from coordinator.aggregation.report import Participation, RoundReport, report_round
from coordinator.aggregation.stored import StoredPart, StoredUpdates

_LAYOUTS_KEPT = 64  # more distinct ranks than a federation has; bounds the cache
_T = TypeVar("_T")


class Run(Protocol):
    """What map does, in this process or in others: the results in the order of the names."""

    def __call__(self, function: Callable[[str], _T], names: Sequence[str], /) -> Iterable[_T]:
        """Apply the function to every name."""


@dataclass(frozen=True)
class AggregationInput:
    """One accepted update, as it lies in the store: checked against its layout when it arrived."""

    client_id: str
    path: Path
    rank: int
    scaling: float  # what the client multiplied lora_B lora_A by
    num_examples: int


@dataclass(frozen=True)
class AggregationJob:
    """Everything that a round's aggregation depends on; picklable."""

    spec: AdapterSpec
    wire_dtype: WireDtype  # of the inputs
    global_rank: int
    previous: Path  # the global adapter that the round started from, in float32
    inputs: tuple[AggregationInput, ...]  # kept sorted by client id
    options: MethodOptions
    levels: tuple[int, ...]  # the distinct ranks in the federation; for the report only

    def __post_init__(self) -> None:
        inputs = tuple(sorted(self.inputs, key=lambda entry: entry.client_id))
        _check_ids([entry.client_id for entry in inputs])
        object.__setattr__(self, "inputs", inputs)


@dataclass(frozen=True)
class EffectiveUpdate:
    """One client's trained adapter in memory, its scaling folded in (common.adapter.effective)."""

    client_id: str
    adapter: Adapter
    num_examples: int


@dataclass(frozen=True)
class Aggregated:
    """What a round brought about."""

    adapter: Adapter  # the next global adapter
    report: RoundReport  # on the adapter alone, without what changed in the base
    # By module, what every client adds to its frozen weight; empty unless the method changes the base.
    base_changes: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class _Cohort:
    """Whose updates are merged, in their order."""

    client_ids: tuple[str, ...]
    num_examples: tuple[int, ...]


def aggregate(job: AggregationJob, run: Run = map) -> Aggregated:
    """The next global adapter, module by module through `run` (map, or a pool's map), and the report on it.

    Raises what a method raises; NotFinite names the module and the client with the largest update.
    """
    make_method(job.options)  # A wrong name is told here, not by a pool.
    names = [module.name for module in job.spec.modules]
    tensor_names = [tensor.name for tensor in job.spec.tensors]
    with _blas().limit(limits=1):
        merged = dict(zip(names, run(partial(_merge_stored, job), names), strict=True))
        tensors = dict(zip(tensor_names, run(partial(_average_stored, job), tensor_names), strict=True))
    ranks, num_examples = zip(*((entry.rank, entry.num_examples) for entry in job.inputs), strict=True)
    return _assemble(merged, tensors, Participation(ranks, num_examples, job.levels))


def aggregate_adapters(
    previous: Adapter, updates: Sequence[EffectiveUpdate], options: MethodOptions, levels: Sequence[int] = ()
) -> Aggregated:
    """The same for adapters in memory: equal input gives equal bytes. `levels` as in AggregationJob."""
    updates = sorted(updates, key=lambda update: update.client_id)
    cohort = _Cohort(
        client_ids=tuple(update.client_id for update in updates),
        num_examples=tuple(update.num_examples for update in updates),
    )
    _check_ids(cohort.client_ids)
    shapes = _shapes_of(previous)
    for update in updates:
        if _shapes_of(update.adapter) != shapes:
            raise AdapterMismatch(f"{update.client_id}: other modules or tensors than the global adapter's")
    with _blas().limit(limits=1):
        merged = {}
        for name, factors in previous.modules.items():
            of_module = [update.adapter.modules[name] for update in updates]
            merged[name] = _merge(options, name, factors, of_module, cohort)
        tensors = {
            name: _average((update.adapter.tensors[name] for update in updates), cohort.num_examples)
            for name in previous.tensors
        }
    ranks = tuple(update.adapter.rank for update in updates)
    return _assemble(merged, tensors, Participation(ranks, cohort.num_examples, tuple(levels)))


def initialise_pool() -> None:
    """The initializer of a process pool for `run`: one BLAS thread, since bits can depend on their number."""
    threadpool_limits(limits=1)
    keep_memory_flat()  # matrices of a megabyte come and go, as messages do in the coordinator


@cache
def _blas() -> ThreadpoolController:
    # Looking for the loaded libraries takes milliseconds; numpy's is loaded by now, and no other one computes here.
    return ThreadpoolController()


def _merge_stored(job: AggregationJob, name: str) -> Merged:
    """One module of a job; the only part of the files that is read."""
    previous = read_module(job.previous, _layout(job.spec, job.global_rank, WireDtype.FLOAT32), name)
    layouts = {rank: _layout(job.spec, rank, job.wire_dtype) for rank in {entry.rank for entry in job.inputs}}
    updates = StoredUpdates([StoredPart(e.client_id, e.path, layouts[e.rank], name, e.scaling) for e in job.inputs])
    cohort = _Cohort(
        client_ids=tuple(entry.client_id for entry in job.inputs),
        num_examples=tuple(entry.num_examples for entry in job.inputs),
    )
    return _merge(job.options, name, previous, updates, cohort)


def _average_stored(job: AggregationJob, name: str) -> Array:
    layouts = {rank: _layout(job.spec, rank, job.wire_dtype) for rank in {entry.rank for entry in job.inputs}}
    values = (read_tensor(entry.path, layouts[entry.rank], name) for entry in job.inputs)
    return _average(values, [entry.num_examples for entry in job.inputs])


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _layout(spec: AdapterSpec, rank: int, dtype: WireDtype) -> Layout:
    # A layout computes the whole file's header once; a module's task must not compute it anew.
    return Layout(spec, rank, dtype)


def _merge(options: MethodOptions, name: str, previous: Factors, updates: Sequence[Factors], cohort: _Cohort) -> Merged:
    method = make_method(options)
    try:
        return method.merge(previous, updates, cohort.num_examples)
    except NotFinite as error:
        sizes = [_size_of(updates, index) for index in range(len(updates))]
        largest = cohort.client_ids[int(np.argmax(sizes))]
        raise NotFinite(f"{name}: {error}; the largest update is {largest}'s") from error


def _size_of(updates: Sequence[Factors], index: int) -> float:
    try:
        factors = updates[index]
    except NotFinite:  # of a file, which is checked as it is read
        return np.inf
    norms = [np.linalg.norm(matrix.astype(np.float64)) for matrix in (factors.lora_A, factors.lora_B)]
    size = float(norms[0] * norms[1])
    return size if np.isfinite(size) else np.inf  # NaN is larger than nothing, but it is the culprit


def _average(values: Iterable[Array], num_examples: Sequence[int]) -> Array:
    """The mean weighted by num_examples, added in float64 in the clients' order, one array at a time."""
    total = sum(num_examples)
    mean = sum(value.astype(np.float64) * (n / total) for value, n in zip(values, num_examples, strict=True))
    return np.asarray(mean).astype(np.float32)


def _assemble(merged: Mapping[str, Merged], tensors: dict[str, Array], participation: Participation) -> Aggregated:
    adapter = Adapter({name: module.factors for name, module in merged.items()}, tensors)
    energy_lost = sum(module.energy_lost for module in merged.values())
    spectra = [module.singular_values for module in merged.values()]
    certificate = worst_of(module.certificate for module in merged.values())
    report = report_round(spectra, energy_lost, participation, certificate)
    changes = {name: module.base_change for name, module in merged.items() if module.base_change is not None}
    return Aggregated(adapter, report, changes)


def _shapes_of(adapter: Adapter) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """What a spec says, unchecked: a thousand specs would be checked for the sake of one comparison."""
    modules = {name: (f.lora_B.shape[0], f.lora_A.shape[1]) for name, f in adapter.modules.items()}
    return modules, {name: tensor.shape for name, tensor in adapter.tensors.items()}


def _check_ids(client_ids: Sequence[str]) -> None:
    if not client_ids:
        raise InvalidRequest("aggregation: no updates; a round without any keeps its adapter and is not aggregated")
    if len(set(client_ids)) != len(client_ids):
        raise InvalidRequest("aggregation: a client has two updates in one round; one each is expected")
