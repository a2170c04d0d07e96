"""FLoRA (arXiv 2409.05976): all updates are stacked and merged into the base model; the next round starts anew.

The base changes by sum_k n_k / N s_k B_k A_k, as [p_k B_k] against [A_k]: exact, no decomposition. Then lora_B = 0 and
a fresh random lora_A for everybody.

- Down, per client and layer: (m + n) R, R the sum of the round's ranks; up (m + n) r_k. Server: copying; every client
  merges, O(m n R).
- Known failure: the download grows with the number of clients; each round starts from lora_B = 0, which short rounds
  pay for; the base drifts away from the released one. A coordinator cannot serve it; the simulation can run it.
- Their code gives the server the scaling alpha max(r) against the clients' 2 r_k; we fold every client's own scaling
  in. The fresh lora_A has orthonormal rows, as the seeded first one has, and its seed is the digest of the previous
  one: a round is a function of its inputs, and no two rounds start alike.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from common.adapter import Factors
from coordinator.aggregation.checks import check_inputs, to_single
from coordinator.aggregation.factor_means import as_they_are
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import Merged, Method, MethodFactory, MethodOptions
from coordinator.aggregation.stacking import stacked_average

_REFUSAL = (
    "every client, also one that is not invited, would have to fetch the sum of all ranks in each round, "
    "and the base model would no longer be the released one"
)


def merge(previous: Factors, updates: Sequence[Factors], num_examples: Sequence[int]) -> Merged:
    """One module by FLoRA; the change of the base has the sum of the ranks as its rank."""
    check_inputs(previous, updates, num_examples)
    left, right = stacked_average(updates, num_examples)
    into_base = Factors(to_single(right), to_single(left))
    return as_they_are(np.zeros(previous.lora_B.shape), _fresh_rows(previous), base_change=into_base)


def _fresh_rows(previous: Factors) -> Matrix:
    digest = hashlib.sha256(previous.lora_A.tobytes()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    orthonormal, triangle = np.linalg.qr(generator.standard_normal(previous.lora_A.shape[::-1]))
    rows: Matrix = (orthonormal * np.sign(np.diag(triangle))).T
    return rows


def _make(options: MethodOptions) -> Method:
    return Method(options.name, merge, service_refusal=_REFUSAL)


FLORA = MethodFactory("flora", _make)
