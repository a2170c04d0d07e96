"""The results of simulated runs as tidy rows: one observation a row, one kind of row a file.

Every row begins with the run it belongs to. Nothing here trains or draws.
"""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class RunKey:
    """One federation of an experiment."""

    stage: str  # "same": the experiment's own rate; "tuning": the grid; "best": the arm's own best rate
    arm: str
    learning_rate: float
    decay: str
    seed: int


@dataclass(frozen=True)
class RunRow:
    """How a run ended."""

    key: RunKey
    method: str
    status: str  # "finished"; "diverged: ..." and the reason if no further round could be published
    rounds: int  # published
    smallest_rank: int
    global_rank: int
    download_bytes: int  # to all clients, over all rounds
    upload_bytes: int
    forecast_factor: float  # of the energy above the smallest rank, per round, under a rank-agnostic average
    initial_energy_ratio: float  # the theorem's C, of the first round with energy: (1 - rho) / rho
    seconds: float


@dataclass(frozen=True)
class RoundRow:
    """One published round."""

    key: RunKey
    round: int
    learning_rate_now: float
    train_loss: float  # mean over the round's clients, weighted by num_examples
    contributors: int
    rho: float
    effective_rank: float
    rank_99: int
    energy: float
    norm: float
    energy_lost: float
    download_bytes: int
    upload_bytes: int


@dataclass(frozen=True)
class PartitionRow:
    """One rank partition after one round."""

    key: RunKey
    round: int
    low: int
    high: int
    energy_share: float
    contributors: int
    effective_contributors: float


@dataclass(frozen=True)
class AccuracyRow:
    """One evaluation of the global adapter, cut to a rank."""

    key: RunKey
    round: int
    split: str  # "validation": the clients' held-out parts together; "test"
    rank: int
    accuracy: float
    loss: float
    num_examples: int
