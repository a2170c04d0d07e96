"""Methods that change the base model: what their changes add up to, weigh on the wire, and look like as a spectrum."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from common.adapter import Adapter, Factors
from common.codec import encode
from common.errors import NotFinite
from coordinator.aggregation.report import Participation, RoundReport, report_round
from coordinator.aggregation.round import EffectiveUpdate
from simulation.local_work import BaseChange


def accumulated(base: BaseChange, changes: Mapping[str, Factors]) -> BaseChange:
    """The sum of all changes so far, dense, in float64. Raises NotFinite if a frozen weight could not hold it."""
    total = dict(base)
    for name, factors in changes.items():
        # One BLAS thread, as in the aggregation: bits can depend on their number.
        with np.errstate(over="ignore", invalid="ignore"), threadpool_limits(limits=1):
            product = factors.lora_B.astype(np.float64) @ factors.lora_A.astype(np.float64)
            added = total[name] + product if name in total else product
            is_held = bool(np.isfinite(added.astype(np.float32)).all())
        if not is_held:
            raise NotFinite(f"{name}: the change of the base model is beyond float32")
        total[name] = added
    return total


def base_content(base: BaseChange) -> bytes:
    """As a file: safetensors in float64, so that a resumed run adds on to the same numbers."""
    return save({name: np.ascontiguousarray(base[name]) for name in sorted(base)})


def base_of(content: bytes) -> BaseChange:
    """The inverse."""
    return load(content)


def change_bytes(changes: Mapping[str, Factors]) -> int:
    """What a client downloads to follow a round's change of the base: the factors in float32."""
    # One file a module: each may have a rank of its own.
    return sum(len(encode(Adapter({name: factors}, {}))) for name, factors in changes.items())


def weight_bytes(base: BaseChange) -> int:
    """What a client downloads that takes the changed weights whole: in float32."""
    return sum(4 * change.size for change in base.values())


def report_on_model(
    base: BaseChange, adapter: Adapter, updates: Sequence[EffectiveUpdate], levels: Sequence[int]
) -> RoundReport:
    """The report on everything that was learned: the accumulated change of the base plus the global adapter.

    Its spectrum is longer than the global rank: what a method has put into the base has no rank limit.
    """
    with threadpool_limits(limits=1):
        spectra = [_spectrum_of(base.get(name), factors) for name, factors in adapter.modules.items()]
    ranks = tuple(update.adapter.rank for update in updates)
    num_examples = tuple(update.num_examples for update in updates)
    return report_round(spectra, 0.0, Participation(ranks, num_examples, (*levels, adapter.rank)))


def _spectrum_of(base: NDArray[np.float64] | None, factors: Factors) -> NDArray[np.float64]:
    product = factors.lora_B.astype(np.float64) @ factors.lora_A.astype(np.float64)
    learned = product if base is None else base + product
    return np.asarray(np.linalg.svd(learned, compute_uv=False), dtype=np.float64)
