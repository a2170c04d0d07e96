"""What every method demands of its inputs and of its result, so that no method states it anew."""

from collections.abc import Sequence

import numpy as np

from common.adapter import Array, Factors
from common.errors import AdapterMismatch, InvalidRequest, NotFinite, WrongRank
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.updates import parts_of


def check_inputs(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> None:
    """Raises InvalidRequest, AdapterMismatch, WrongRank or NotFinite for factors that cannot be merged."""
    check_shapes(previous, updates, num_examples)
    check_finite(updates)


def check_shapes(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> None:
    """All of it but NotFinite: no number is looked at."""
    if not updates or len(updates) != len(num_examples):
        raise InvalidRequest(f"{len(updates)} updates with {len(num_examples)} num_examples; one each is expected")
    if min(num_examples) < 1:
        raise InvalidRequest(f"num_examples {min(num_examples)}: at least 1 is expected")
    out_features, in_features = previous.lora_B.shape[0], previous.lora_A.shape[1]
    for part in parts_of(updates):
        if part.shape != (out_features, in_features):
            raise AdapterMismatch(f"an update of a layer {part.shape}, but the layer is {(out_features, in_features)}")
        if not 0 < part.rank <= previous.rank:
            raise WrongRank(f"an update of rank {part.rank}; the global adapter has the ranks 1 to {previous.rank}")


def check_finite(updates: Sequence[Factors]) -> None:
    """Raises NotFinite if an update holds NaN or infinity."""
    for update in updates:
        # A diverged client is told here; a singular value decomposition would only fail to converge.
        if not (np.isfinite(update.lora_A).all() and np.isfinite(update.lora_B).all()):
            raise NotFinite("an update holds NaN or infinity")


def to_single(matrix: Matrix) -> Array:
    """The same in float32. Raises NotFinite if that cannot hold it."""
    with np.errstate(over="ignore"):
        single = matrix.astype(np.float32)
    if not np.isfinite(single).all():
        raise NotFinite(f"the merged update has the norm {np.linalg.norm(matrix):.3g}, beyond float32")
    return single
