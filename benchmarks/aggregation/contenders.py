"""Who takes turns: ours through its public entry point, others' ways as they write them, and the machine itself."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.aggregation.inputs import GLOBAL_RANK, Inputs
from benchmarks.interleaved import Turn
from common.adapter import Adapter, Array, Factors
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.round import EffectiveUpdate, aggregate_adapters

_SGEMM_SIDE = 2048
_READ_NUMBERS = 1 << 24
_MODULE = "layer"


def raflora(inputs: Inputs, method: str = "raflora") -> Factors:
    """What the simulation calls and what a coordinator runs; checks, report and all."""
    updates = [
        EffectiveUpdate(f"client-{k:05}", Adapter({_MODULE: update}, {}), num_examples)
        for k, (update, num_examples) in enumerate(zip(inputs.updates, inputs.num_examples, strict=True))
    ]
    previous = Adapter({_MODULE: inputs.previous}, {})
    return aggregate_adapters(previous, updates, MethodOptions(method)).adapter.modules[_MODULE]


def dense_product(inputs: Inputs, dtype: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """The first half of FlexLoRA as its authors compute it: every client's product, added up, m x n."""
    total = sum(inputs.num_examples)
    W = np.zeros((inputs.previous.lora_B.shape[0], inputs.previous.lora_A.shape[1]), dtype)
    for update, n in zip(inputs.updates, inputs.num_examples, strict=True):
        W += dtype(n / total) * (update.lora_B.astype(dtype) @ update.lora_A.astype(dtype))
    return W


def full_svd(W: NDArray[Any]) -> Factors:
    """The second half: all singular vectors, of which the first ones are kept."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return Factors(Vt[:GLOBAL_RANK], U[:, :GLOBAL_RANK] * S[:GLOBAL_RANK])


def stacked_qr(inputs: Inputs) -> Factors:
    """As NVIDIA FLARE's HLoRA example: QR of both stacks, SVD of the core, in float32."""
    total = sum(inputs.num_examples)
    weighted = [np.float32(n / total) * u.lora_B for u, n in zip(inputs.updates, inputs.num_examples, strict=True)]
    left, left_core = np.linalg.qr(np.hstack(weighted))
    right, right_core = np.linalg.qr(np.vstack([update.lora_A for update in inputs.updates]).T)
    U, S, Vt = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Factors(Vt[:GLOBAL_RANK] @ right.T, left @ (U[:, :GLOBAL_RANK] * S[:GLOBAL_RANK]))


def padded_mean(inputs: Inputs) -> Factors:
    """FedIT: both factors padded with zeros to one rank and averaged apart; not the average of the products."""
    total = sum(inputs.num_examples)
    lora_A, lora_B = np.zeros_like(inputs.previous.lora_A), np.zeros_like(inputs.previous.lora_B)
    for update, n in zip(inputs.updates, inputs.num_examples, strict=True):
        lora_A[: update.rank] += np.float32(n / total) * update.lora_A
        lora_B[:, : update.rank] += np.float32(n / total) * update.lora_B
    return Factors(lora_A, lora_B)


class Machine:
    """How fast this machine multiplies and reads at best, with numbers that were made beforehand."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._square = rng.standard_normal((_SGEMM_SIDE, _SGEMM_SIDE), dtype=np.float32)
        self._numbers = rng.standard_normal(_READ_NUMBERS, dtype=np.float32)

    def multiply(self) -> Array:
        """One large sgemm."""
        return self._square @ self._square

    def read(self) -> float:
        """One pass over 64 MB."""
        return float(np.dot(self._numbers, self._numbers))

    def floor_seconds(self, inputs: Inputs, multiply: Turn, read: Turn) -> float:
        """The least that a module can take: every number read once, and two multiplications by a block of the rank.

        For few directions one Gram matrix instead. CPU seconds, from this round's turns.
        """
        numbers = sum(inputs.previous.lora_B.shape[:1] + inputs.previous.lora_A.shape[1:]) * inputs.directions
        rate = 2.0 * _SGEMM_SIDE**3 / multiply.cpu_seconds
        products = numbers * min(inputs.directions, 4 * GLOBAL_RANK) / rate
        return max(numbers * read.cpu_seconds / _READ_NUMBERS, products)
