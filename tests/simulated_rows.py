"""Rows as simulated runs leave them, made by hand: an experiment that nobody had to train."""

import math
from collections.abc import Sequence

from simulation.results import AccuracyRow, PartitionRow, Results, RoundRow, RunKey, RunRow

LEVELS = (4, 8, 16)
NUM_EXAMPLES = 1000


def key(arm: str = "raflora", seed: int = 0, *, stage: str = "same", rate: float = 0.005) -> RunKey:
    return RunKey(stage, arm, rate, "linear", seed)


def run_row(of: RunKey, *, method: str = "", status: str = "finished", rounds: int = 3, rank: int = 0) -> RunRow:
    return RunRow(
        key=of,
        method=method or of.arm,
        status=status,
        rounds=rounds,
        smallest_rank=rank or LEVELS[0],
        global_rank=rank or LEVELS[-1],
        download_bytes=1000 * rounds,
        upload_bytes=900 * rounds,
        forecast_factor=0.25,
        initial_energy_ratio=0.6,
        seconds=2.0,
    )


def accuracy_row(
    of: RunKey, accuracy: float, *, round: int = 3, rank: int = LEVELS[-1], split: str = "test"
) -> AccuracyRow:
    return AccuracyRow(of, round, split, rank, accuracy, 1.0 - accuracy, NUM_EXAMPLES)


def a_run(
    of: RunKey,
    accuracy: float,
    *,
    factor: float = 1.0,
    method: str = "",
    status: str = "finished",
    rounds: int = 3,
    levels: Sequence[int] = LEVELS,
    rank_gain: float = 0.02,
) -> Results:
    """A run whose energy above the smallest rank is 0.4 in round 1 and multiplied by `factor` in each later one."""
    rank = levels[0] if len(levels) == 1 else 0
    rows, partitions, accuracies = [], [], []
    for number in range(1, rounds + 1):
        above = 0.4 * factor ** (number - 1) if len(levels) > 1 else 0.0
        rows.append(
            RoundRow(
                key=of,
                round=number,
                learning_rate_now=of.learning_rate,
                train_loss=2.0 / number,
                contributors=4,
                rho=1 - above,
                effective_rank=4 + 20 * above,
                rank_99=8,
                energy=float(number),
                norm=math.sqrt(number),
                energy_lost=0.0,
                download_bytes=1000,
                upload_bytes=900,
            )
        )
        shares = [1 - above, *(above / (len(levels) - 1) for _ in levels[1:])]
        partitions += [
            PartitionRow(of, number, low, high, share, 2, 1.5)
            for low, high, share in zip((0, *levels), levels, shares, strict=False)
        ]
        now = accuracy * (1 - 0.5 / number)
        accuracies.append(accuracy_row(of, accuracy if number == rounds else now, round=number, rank=levels[-1]))
    accuracies += [
        accuracy_row(of, accuracy - rank_gain * (len(levels) - 1 - index), round=rounds, rank=level)
        for index, level in enumerate(levels[:-1])
    ]
    return Results(
        (run_row(of, method=method, status=status, rounds=rounds, rank=rank),),
        tuple(rows),
        tuple(partitions),
        tuple(accuracies),
    )


def an_experiment(*, rounds: int = 20, stage: str = "same") -> Results:
    """Three seeds of raFLoRA, FlexLoRA, a stacking rival and both references; the numbers are invented."""
    found = Results()
    for seed in range(3):
        wobble = 0.004 * (seed - 1)
        found += a_run(key("raflora", seed, stage=stage), 0.868 + wobble, rounds=rounds)
        found += a_run(key("flexlora", seed, stage=stage), 0.785 - wobble, factor=0.75, rounds=rounds, rank_gain=0.0)
        found += a_run(key("flora", seed, stage=stage), 0.873 + wobble, factor=0.99, rounds=rounds)
        found += a_run(key("all-rank-4", seed, stage=stage), 0.78, method="flexlora", levels=(4,), rounds=rounds)
        found += a_run(key("all-rank-16", seed, stage=stage), 0.908, method="flexlora", levels=(16,), rounds=rounds)
    return found
