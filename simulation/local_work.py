"""What a simulated federation asks of whoever trains and evaluates for all of its clients, one after the other.

The state machine, the slices and the aggregation do not know what stands behind it: torch_work.py is the real one.
Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, AdapterSpec
from common.errors import RafloraError
from coordinator.aggregation.method import MethodOptions
from coordinator.manifest import RoundPlan
from simulation.partition import Indices
from simulation.population import SimulatedClient

BaseChange = Mapping[str, NDArray[np.float64]]  # by module: what is added to the frozen weight, [out, in]


class WorkDiverged(RafloraError):
    """Training or evaluating came to a number that is not finite; a smaller learning rate may help."""

    reason = "diverged"


@dataclass(frozen=True)
class LocalTask:
    """One client's part of a round."""

    client: SimulatedClient
    adapter: Adapter  # the slice that it was handed
    scaling: float
    plan: RoundPlan
    method: MethodOptions  # for what a method asks of the training itself


@dataclass(frozen=True)
class Trained:
    """What a client sends back."""

    adapter: Adapter
    train_loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class EvaluationSet:
    """Examples that nobody trains on."""

    split: Literal["validation", "test"]
    indices: Indices | None = None  # of the training data (validation); None: the whole test set


@dataclass(frozen=True)
class Evaluated:
    """How an adapter does on an evaluation set."""

    accuracy: float
    loss: float
    num_examples: int


class LocalWork(Protocol):
    """One frozen base model that trains any client's adapter. Not to be used from two threads."""

    @property
    def spec(self) -> AdapterSpec:
        """What is adapted."""
        ...

    @property
    def base_model_digest(self) -> str:
        """Which weights."""
        ...

    def train(self, task: LocalTask) -> Trained:
        """Trains the client's slice on its examples; the same task gives the same bytes. Raises WorkDiverged."""
        ...

    def evaluate(self, adapter: Adapter, examples: EvaluationSet, *, scaling: float) -> Evaluated:
        """Evaluates an adapter. Raises WorkDiverged."""
        ...

    def put_base(self, change: BaseChange) -> None:
        """Makes the frozen weights the original ones plus this; without any change exactly the original ones."""
        ...
