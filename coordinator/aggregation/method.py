"""What an aggregation method is: a pure function of one module's factors, and what it asks of its surroundings.

The methods themselves are one small file each in methods/; `make_method` there finds them by name. Nothing here
knows files, clients' names or the round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from common.adapter import Factors
from coordinator.aggregation.certificate import NOTHING_DECOMPOSED, Certificate
from coordinator.aggregation.low_rank import Matrix

Shrinkage: TypeAlias = Literal["weight-floor", "sqrt-share", "share", "effective-owners"]


@dataclass(frozen=True)
class Merged:
    """One module after a round."""

    factors: Factors  # the next global factors, of the previous ones' rank: what rank slices are cut from
    singular_values: Matrix  # of lora_B lora_A, descending, [global_rank]
    energy_lost: float  # sum of the squared singular values that a truncation cut off
    # An effective product of any rank that every client adds to its frozen weight, for methods that change the base.
    base_change: Factors | None = None
    certificate: Certificate = NOTHING_DECOMPOSED  # what vouches for the decomposition, where there was one


@dataclass(frozen=True)
class MethodOptions:
    """The name of a method and its settings; a setting that is not the method's must keep its default."""

    name: str
    shrinkage: Shrinkage = "weight-floor"  # raflora: how far an index moves towards its owners' mean
    weight_floor: float = 0.0  # raflora with "weight-floor": tau, the least share that moves an index at full weight
    kappa: float = 1.0  # raflora with "effective-owners": n_eff / (n_eff + kappa)
    energy_threshold: float = 0.99  # florist: the share of the energy that the shared rank keeps
    prune_share: float = 0.0  # hetlora: gamma, the share of its rank that a client may shrink to; 0: no pruning
    prune_penalty: float = 0.0  # hetlora: weight of the loss term on the directions that pruning would cut off


# The previous global factors, the clients' effective factors (scaling folded in) and their num_examples.
Merge: TypeAlias = Callable[[Factors, Sequence[Factors], Sequence[int]], Merged]


@dataclass(frozen=True)
class Method:
    """A method with its settings."""

    name: str
    merge: Merge
    freezes_lora_A: bool = False  # clients train lora_B alone
    service_refusal: str = ""  # why a coordinator cannot run it, as a sentence for its operator; empty: it can


@dataclass(frozen=True)
class MethodFactory:
    """How a method is made, and which fields of MethodOptions beside the name are its own."""

    name: str
    make: Callable[[MethodOptions], Method]
    settings: tuple[str, ...] = ()
