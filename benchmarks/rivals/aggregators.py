"""The rivals' own aggregation functions, one call an order: `python aggregators.py FACTORS.npz`.

It runs in the rivals' environment and imports nothing of ours. Every line of its input names a contender; the answer is
what one call of it took: wall and CPU seconds. Inputs are in memory and in the form that the contender takes.
Averages of factors need factors of one shape, so theirs are padded with zeros to the largest rank before they count.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Call = Callable[[], object]


@dataclass(frozen=True)
class Cohort:
    """One module of every client."""

    lora_A: list[NDArray[np.float32]]
    lora_B: list[NDArray[np.float32]]
    num_examples: list[int]

    def padded(self) -> "Cohort":
        """All of the largest rank."""
        rank = max(len(A) for A in self.lora_A)
        return Cohort(
            [np.pad(A, ((0, rank - len(A)), (0, 0))) for A in self.lora_A],
            [np.pad(B, ((0, 0), (0, rank - B.shape[1]))) for B in self.lora_B],
            self.num_examples,
        )


def read(path: Path) -> Cohort:
    """From the file that both sides read."""
    with np.load(path) as content:
        num_examples = [int(n) for n in content["num_examples"]]
        clients = range(len(num_examples))
        return Cohort([content[f"A{k}"] for k in clients], [content[f"B{k}"] for k in clients], num_examples)


def chorus_fedex(cohort: Cohort) -> Call:
    """chorus-fl: every client's product added up, one full SVD. Exact."""
    import torch  # noqa: PLC0415
    from chorus.server.aggregation import FedExLoRA  # noqa: PLC0415

    torch.set_num_threads(1)
    deltas = [
        {"layer.lora_A.weight": torch.from_numpy(A), "layer.lora_B.weight": torch.from_numpy(B)}
        for A, B in zip(cohort.lora_A, cohort.lora_B, strict=True)
    ]
    weights = [float(n) for n in cohort.num_examples]
    return lambda: FedExLoRA().aggregate(deltas, weights)


def nvflare_accumulator(cohort: Cohort) -> Call:
    """NVIDIA FLARE: factors added up as they come. Inexact: the mean of products is not the product of means."""
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper  # noqa: PLC0415

    padded = cohort.padded()

    def call() -> object:
        helper = WeightedAggregationHelper()
        for k, (A, B) in enumerate(zip(padded.lora_A, padded.lora_B, strict=True)):
            helper.add({"A": A, "B": B}, padded.num_examples[k], f"site-{k}", 0)
        return helper.get_result()

    return call


def flower_aggregate(cohort: Cohort) -> Call:
    """Flower: FedAvg of arrays in memory. Inexact, as above."""
    from flwr.server.strategy.aggregate import aggregate  # noqa: PLC0415

    padded = cohort.padded()
    results = [([A, B], n) for A, B, n in zip(padded.lora_A, padded.lora_B, padded.num_examples, strict=True)]
    return lambda: aggregate(results)


def flower_aggregate_inplace(cohort: Cohort) -> Call:
    """Flower: FedAvg of arrays as they came over the wire, decoded as they are added. Inexact, as above."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters  # noqa: PLC0415
    from flwr.server.strategy.aggregate import aggregate_inplace  # noqa: PLC0415

    padded = cohort.padded()
    done = Status(Code.OK, "")
    results = [
        (None, FitRes(done, ndarrays_to_parameters([A, B]), n, {}))
        for A, B, n in zip(padded.lora_A, padded.lora_B, padded.num_examples, strict=True)
    ]
    return lambda: aggregate_inplace(results)


CONTENDERS: dict[str, Callable[[Cohort], Call]] = {
    "chorus-fedex": chorus_fedex,
    "nvflare-accumulator": nvflare_accumulator,
    "flower-aggregate": flower_aggregate,
    "flower-aggregate-inplace": flower_aggregate_inplace,
}


def main() -> None:
    """One turn a line."""
    cohort = read(Path(sys.argv[1]))
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in calls:
            calls[name] = CONTENDERS[name](cohort)
        wall, cpu = time.perf_counter(), time.process_time()
        calls[name]()
        print(
            json.dumps({"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}),
            flush=True,
        )


if __name__ == "__main__":
    main()
