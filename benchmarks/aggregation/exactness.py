"""How much more error our truncation has than the optimal one, by the dense average in float64."""

import numpy as np

from benchmarks.aggregation.contenders import dense_product, raflora
from benchmarks.aggregation.inputs import GLOBAL_RANK, Case, inputs_of

_NO_ERROR = 1e-12  # of the energy: what is less is rounding, and the average has no more directions than the rank


def excess_error(case: Case) -> float:
    """Error over the optimal truncation's, less one; for FlexLoRA's weights, which the dense average has.

    Half the excess of the squared error, which is the same to first order and does not drown in rounding. Where the
    optimum has no error, relative to the whole energy.
    """
    inputs = inputs_of(case)
    W = dense_product(inputs, np.float64)
    smaller = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    squares = np.linalg.eigvalsh(smaller)
    energy = float(np.sum(W * W))
    optimum = energy - float(np.sum(squares[-GLOBAL_RANK:]))
    found = raflora(inputs, "flexlora")
    error = float(np.linalg.norm(W - found.lora_B.astype(np.float64) @ found.lora_A.astype(np.float64))) ** 2
    return abs(error - optimum) / (2.0 * (optimum if optimum > _NO_ERROR * energy else energy))
