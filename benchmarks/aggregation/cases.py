"""The cases of the aggregation part, and what each of them is held to."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from rich.progress import Progress
from threadpoolctl import threadpool_limits

from benchmarks.aggregation.contenders import Machine, dense_product, full_svd, padded_mean, raflora, stacked_qr
from benchmarks.aggregation.exactness import excess_error
from benchmarks.aggregation.inputs import Case, Inputs, inputs_of
from benchmarks.aggregation.memory import LAYERS, growth_mib, job_of, write_inputs
from benchmarks.interleaved import Figure, Goal, Spread, Turn, cpu_ratio, take_turns
from common.codec import digest_of, encode
from coordinator.aggregation.round import AggregationJob, aggregate
from coordinator.merging import MAX_THREADS, make_pool

PART = "aggregation"
_FEW, _MANY = 10, 1000  # clients of the rounds whose memory is compared
_CPU = "CPU seconds of one thread through aggregate_adapters, theirs over ours"
Turns: TypeAlias = Mapping[str, list[Turn]]
Measure: TypeAlias = Callable[[Callable[[str], None], int], list[Figure]]


def figures(progress: Progress, only: str | None, repetitions: int) -> list[Figure]:
    """All cases one after the other, or the one that is named."""
    chosen = {name: measure for name, measure in CASES.items() if only in {None, name}}
    found = []
    with threadpool_limits(limits=1):
        for name, measure in chosen.items():
            bar = progress.add_task(f"aggregation {name}", total=None)
            found += measure(lambda _, bar=bar: progress.advance(bar), repetitions)  # type: ignore[misc]
            progress.remove_task(bar)
    return found


def _square(after_turn: Callable[[str], None], repetitions: int) -> list[Figure]:
    """3072 x 3072. The full SVD, by far the slowest, has one turn a round for both cohorts: its time is the shape's."""
    many, few, machine = inputs_of(Case(3072, 3072, 50)), inputs_of(Case(3072, 3072, 10)), Machine()
    W = dense_product(many)
    turns = take_turns(
        {
            "ours 50": lambda: raflora(many),
            "ours 10": lambda: raflora(few),
            "qr 50": lambda: stacked_qr(many),
            "qr 10": lambda: stacked_qr(few),
            "padded 50": lambda: padded_mean(many),
            "product 50": lambda: dense_product(many),
            "product 10": lambda: dense_product(few),
            "multiply": machine.multiply,
            "read": machine.read,
            "svd": lambda: full_svd(W),
        },
        repetitions,
        after_turn,
    )
    shared = "; one full SVD a round for both cohorts"
    return [
        _dense("3072 x 3072, 50 clients", turns, "50", Goal(60, 150), shared),
        _dense("3072 x 3072, 10 clients", turns, "10", Goal(150, 500), shared),
        _qr("3072 x 3072, 50 clients", turns, "50", Goal(15, 40)),
        _qr("3072 x 3072, 10 clients", turns, "10", Goal(1.5, 3)),
        _exactness_costs("3072 x 3072, 50 clients", turns),
        _over_the_floor("3072 x 3072, 50 clients", turns, many, machine),
    ]


def _small(after_turn: Callable[[str], None], repetitions: int) -> list[Figure]:
    inputs = inputs_of(Case(768, 768, 50))
    turns = take_turns(
        {
            "ours 50": lambda: raflora(inputs),
            "product 50": lambda: dense_product(inputs),
            "svd": lambda W=dense_product(inputs): full_svd(W),
            "qr 50": lambda: stacked_qr(inputs),
            "padded 50": lambda: padded_mean(inputs),
        },
        repetitions,
        after_turn,
    )
    return [
        _dense("768 x 768, 50 clients", turns, "50", Goal(6, 15)),
        _qr("768 x 768, 50 clients", turns, "50"),
        _exactness_costs("768 x 768, 50 clients", turns),
    ]


def _wide(after_turn: Callable[[str], None], repetitions: int) -> list[Figure]:
    inputs, machine = inputs_of(Case(8192, 3072, 50)), Machine()
    contenders = {"ours 50": lambda: raflora(inputs), "multiply": machine.multiply, "read": machine.read}
    turns = take_turns(contenders, repetitions, after_turn)
    return [_over_the_floor("8192 x 3072, 50 clients", turns, inputs, machine)]


def _excess(after_turn: Callable[[str], None], repetitions: int) -> list[Figure]:
    """As many cohorts of each kind as there are repetitions."""
    goals = {"real": Goal(1e-6, 1e-8, at_least=False), "first": Goal(1e-6, 1e-8, at_least=False)}
    goals["flat"] = goals["real"]
    found = []
    for kind, clients in (("real", 50), ("real", 10), ("first", 50), ("flat", 50)):
        values = []
        for seed in range(repetitions):
            values.append(excess_error(replace(Case(768, 1024, clients), kind=kind, seed=seed)))  # type: ignore[arg-type]
            after_turn(kind)
        note = "by the dense average in float64; 768 x 1024, one cohort a repetition"
        name = f"error over the optimal truncation, {kind}, {clients} clients"
        found.append(Figure(PART, name, Spread.of(values), "", goals[kind], note))
    return found


def _memory(after_turn: Callable[[str], None], _: int) -> list[Figure]:
    """Once: the growth of a process does not depend on what else the machine does."""
    with tempfile.TemporaryDirectory(prefix="raflora-bench-") as name:
        folder = Path(name)
        write_inputs(folder)
        few, many = (_grown(folder, clients, after_turn) for clients in (_FEW, _MANY))
    note = (
        "peak growth through aggregate from files, on as many threads as a coordinator has by default (its cores, at "
        f"most {MAX_THREADS}); {LAYERS} of LLaMA-3B's 28 layers' q and v, once"
    )
    same = f"{note}; the clients share ten distinct files"
    ratio, limit = Goal(1.2, 1.1, at_least=False), Goal(512, 256, at_least=False)
    return [
        Figure(PART, f"memory, {_MANY} clients over {_FEW}", Spread.of([many / few]), "x", ratio, same),
        Figure(PART, f"memory, {_MANY} clients", Spread.of([many]), "MiB", limit, same),
        Figure(PART, f"memory, {_FEW} clients", Spread.of([few]), "MiB", limit, note),
    ]


def _grown(folder: Path, clients: int, after_turn: Callable[[str], None]) -> float:
    after_turn("memory")
    return growth_mib(folder, clients)


def _bytes(after_turn: Callable[[str], None], repetitions: int) -> list[Figure]:
    """The share of runs that end in the same bytes: other orders of arrival, threads, one to three processes."""
    with tempfile.TemporaryDirectory(prefix="raflora-bench-") as name:
        folder = Path(name)
        write_inputs(folder, layers=1)
        job = job_of(folder, 30, layers=1)
        expected, same = _digest(job), []
        for turn in range(repetitions):
            shuffled = replace(job, inputs=(*job.inputs[turn::2], *job.inputs[:turn], *job.inputs[turn + 1 :: 2]))
            with make_pool(turn % 4) as pool:
                same.append(digest_of(encode(aggregate(shuffled, pool.map).adapter)) == expected)
            after_turn("bytes")
    note = (
        "shuffled arrival, on a coordinator's default threads and in 1, 2 and 3 processes, against one thread in "
        "order; nothing is restarted here: tests/integration/test_restart.py holds restarts to the same bytes"
    )
    return [Figure(PART, "same bytes", Spread.of([sum(same) / len(same)]), "of all runs", Goal(1, 1), note)]


def _digest(job: AggregationJob) -> str:
    return digest_of(encode(aggregate(job).adapter))


def _dense(what: str, turns: Turns, clients: str, goal: Goal, beside: str = "") -> Figure:
    both = [_sum(product, svd) for product, svd in zip(turns[f"product {clients}"], turns["svd"], strict=True)]
    ratio = cpu_ratio(both, turns[f"ours {clients}"])
    return Figure(PART, f"dense product and full SVD (FlexLoRA's way), {what}", ratio, "x", goal, _CPU + beside)


def _qr(what: str, turns: Turns, clients: str, goal: Goal | None = None) -> Figure:
    ratio = cpu_ratio(turns[f"qr {clients}"], turns[f"ours {clients}"])
    return Figure(PART, f"stacked QR and core SVD (HLoRA's way), {what}", ratio, "x", goal, _CPU)


def _exactness_costs(what: str, turns: Turns) -> Figure:
    ratio = cpu_ratio(turns["ours 50"], turns["padded 50"])
    note = "CPU seconds of ours over an average of the padded factors, which is not the average of the updates"
    return Figure(PART, f"what exactness costs, {what}", ratio, "x FedIT's", None, note)


def _over_the_floor(what: str, turns: Turns, inputs: Inputs, machine: Machine) -> Figure:
    rounds = zip(turns["ours 50"], turns["multiply"], turns["read"], strict=True)
    values = [ours.cpu_seconds / machine.floor_seconds(inputs, multiply, read) for ours, multiply, read in rounds]
    note = "CPU seconds over two multiplications by a block of the rank, at the rate of a large sgemm in the same round"
    return Figure(PART, f"time over the floor, {what}", Spread.of(values), "x", Goal(5, 2.5, at_least=False), note)


def _sum(one: Turn, other: Turn) -> Turn:
    return Turn(one.wall_seconds + other.wall_seconds, one.cpu_seconds + other.cpu_seconds)


CASES: Mapping[str, Measure] = {
    "3072x3072": _square,
    "768x768": _small,
    "8192x3072": _wide,
    "excess": _excess,
    "memory": _memory,
    "bytes": _bytes,
}
