"""How fast one module is aggregated: ours against the dense formulation of FlexLoRA's own code.

`python -m benchmarks.aggregation --clients 10 50 --shape 768x768 3072x3072 --json`

CPU seconds of one thread, both in one process and in turn, so that a busy machine slows both. The dense way is
written after FederatedScope's FlexLoRA branch: add up every client's product, take the full SVD, both in float32.
The inputs are made: every client starts from its slice of one adapter with a 1/i spectrum and moves by 30 %.
`stack` is the sum of the clients' ranks, `ratio` is dense over ours, `error` is that of our product, with FlexLoRA's
weights, against the truncated float64 SVD of the dense average.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_info, threadpool_limits

from common.adapter import Array, Factors
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import make_method

GLOBAL_RANK = 64
RANKS = (8, 16, 32, 48, 64)
MOVED = 0.3  # how far a client's factors are from the slice it was sent, relative to their norm
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """One layer and one cohort."""

    out_features: int
    in_features: int
    clients: int


@dataclass(frozen=True)
class Inputs:
    """What both sides are given."""

    previous: Factors
    updates: list[Factors]
    num_examples: list[int]


@dataclass(frozen=True)
class Row:
    """What was measured of one case; times in CPU seconds, spreads as (largest - smallest) / median."""

    case: Case
    stacked_directions: int
    repetitions: int
    raflora_seconds: float
    raflora_spread: float
    dense_seconds: float
    dense_spread: float
    ratio: float  # median of the repetitions' ratios dense / raflora
    product_error: float  # ours (FlexLoRA weights) against the float64 SVD of the dense average


def main() -> None:
    """Measure the cases of the command line and print a table, or JSON on standard output."""
    arguments = _arguments()
    cases = [Case(rows, columns, clients) for rows, columns in arguments.shape for clients in arguments.clients]
    with threadpool_limits(limits=1):
        rows = measure(cases, arguments.repetitions)
    setting = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": "; ".join(f"{b['internal_api']} {b['version']}" for b in threadpool_info() if b["user_api"] == "blas"),
        "machine": platform.machine(),
        "global_rank": GLOBAL_RANK,
    }
    if arguments.json:
        print(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _print(setting, rows)


def measure(cases: Sequence[Case], repetitions: int) -> list[Row]:
    """One row a case. The two sides take turns; one unmeasured turn each comes first."""
    rows = []
    with Progress(console=CONSOLE, transient=True) as progress:
        for case in cases:
            label = f"{case.out_features} x {case.in_features}, {case.clients} clients"
            turns = progress.add_task(label, total=repetitions + 1)
            inputs = inputs_of(case)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(repetitions + 1):
                ours.append(cpu_seconds(raflora, inputs))
                theirs.append(cpu_seconds(dense_flexlora, inputs))
                progress.advance(turns)
            rows.append(_row(case, inputs, ours[1:], theirs[1:]))
    return rows


def inputs_of(case: Case) -> Inputs:
    """The cohort's factors; the same for the same case."""
    rng = np.random.default_rng([case.out_features, case.in_features, case.clients])
    U, _ = np.linalg.qr(rng.standard_normal((case.out_features, GLOBAL_RANK)))
    V, _ = np.linalg.qr(rng.standard_normal((case.in_features, GLOBAL_RANK)))
    previous = Factors(_single(V.T), _single(U / np.arange(1, GLOBAL_RANK + 1)))
    updates = []
    for k in range(case.clients):
        rank = RANKS[k % len(RANKS)]
        A, B = previous.lora_A[:rank], previous.lora_B[:, :rank]
        updates.append(Factors(_moved(A, rng), _moved(B, rng)))
    return Inputs(previous, updates, [int(n) for n in rng.integers(50, 500, case.clients)])


def raflora(inputs: Inputs) -> Factors:
    """What the coordinator runs."""
    method = make_method(MethodOptions("raflora")).merge
    return method(inputs.previous, inputs.updates, inputs.num_examples).factors


def dense_flexlora(inputs: Inputs) -> Factors:
    """FlexLoRA as its authors compute it."""
    U, S, Vt = np.linalg.svd(dense_average(inputs, np.float32), full_matrices=False)
    return Factors(Vt[:GLOBAL_RANK], U[:, :GLOBAL_RANK] * S[:GLOBAL_RANK])


def dense_average(inputs: Inputs, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """The weighted sum of the products, m x n."""
    total = sum(inputs.num_examples)
    W = np.zeros((inputs.previous.lora_B.shape[0], inputs.previous.lora_A.shape[1]), dtype)
    for update, n in zip(inputs.updates, inputs.num_examples, strict=True):
        W += dtype(n / total) * (update.lora_B.astype(dtype) @ update.lora_A.astype(dtype))
    return W


def cpu_seconds(work: Callable[[Inputs], object], inputs: Inputs) -> float:
    """User and system time of this process while it works."""
    start = time.process_time()
    work(inputs)
    return time.process_time() - start


def _row(case: Case, inputs: Inputs, ours: list[float], theirs: list[float]) -> Row:
    return Row(
        case=case,
        stacked_directions=sum(update.rank for update in inputs.updates),
        repetitions=len(ours),
        raflora_seconds=statistics.median(ours),
        raflora_spread=_spread(ours),
        dense_seconds=statistics.median(theirs),
        dense_spread=_spread(theirs),
        ratio=statistics.median(dense / own for own, dense in zip(ours, theirs, strict=True)),
        product_error=_product_error(inputs),
    )


def _product_error(inputs: Inputs) -> float:
    method = make_method(MethodOptions("flexlora")).merge
    found = method(inputs.previous, inputs.updates, inputs.num_examples).factors
    U, S, Vt = np.linalg.svd(dense_average(inputs, np.float64), full_matrices=False)
    best = (U[:, :GLOBAL_RANK] * S[:GLOBAL_RANK]) @ Vt[:GLOBAL_RANK]
    return float(np.linalg.norm(found.lora_B.astype(float) @ found.lora_A - best) / np.linalg.norm(best))


def _print(setting: dict[str, object], rows: Sequence[Row]) -> None:
    table = Table(title="One module: CPU seconds of one thread (spread)")
    for column in ("layer", "clients", "stack", "raflora", "dense SVD", "ratio", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.case.out_features}x{row.case.in_features}",
            str(row.case.clients),
            str(row.stacked_directions),
            f"{row.raflora_seconds:.3f} ({row.raflora_spread:.0%})",
            f"{row.dense_seconds:.3f} ({row.dense_spread:.0%})",
            f"{row.ratio:.1f}x",
            f"{row.product_error:.0e}",
        )
    console = Console()
    console.print(table)
    console.print(f"median of {rows[0].repetitions} repetitions; {', '.join(f'{k} {v}' for k, v in setting.items())}")


def _spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _moved(factor: Array, rng: np.random.Generator) -> Array:
    step = rng.standard_normal(factor.shape)
    return _single(factor + MOVED * np.linalg.norm(factor) / np.linalg.norm(step) * step)


def _single(array: NDArray[Any]) -> Array:
    return np.asarray(array, dtype=np.float32)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and min(int(rows), int(columns)) >= GLOBAL_RANK):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 768x768 with sides of at least {GLOBAL_RANK}")
    return int(rows), int(columns)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50], help="cohort sizes (10 50)")
    parser.add_argument("--shape", type=_shape, nargs="+", default=[(768, 768), (1024, 2048)], metavar="MxN")
    parser.add_argument("--repetitions", type=int, default=5, help="measured turns a side, at least 5 (5)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    arguments = parser.parse_args()
    if arguments.repetitions < 5 or min(arguments.clients) < 1:
        parser.error("at least 5 repetitions and 1 client are needed")
    return arguments


if __name__ == "__main__":
    main()
