"""A module's updates as an aggregation method sees them: factors in memory, or parts of files, read when needed.

A method may take them as a sequence of Factors and know nothing else. The stack (stack.py) reads them part by part
into blocks of its own, so that a round's memory does not grow with the number of clients.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.adapter import Array, Factors


class Part(Protocol):
    """One client's effective factors, to be read as often as there are passes over them."""

    @property
    def rank(self) -> int:
        """The number of directions."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer: (out_features, in_features)."""

    def read_lora_A(self, target: Array) -> None:
        """Fill a contiguous [rank, in_features]."""

    def read_lora_B(self, scratch: Array) -> Array:
        """A contiguous [out_features, rank], the client's scaling folded in; may lie in `scratch`, a flat buffer."""


class Updates(Sequence[Factors]):
    """Updates that can be read part by part; as a sequence every element is read anew, and checked."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """The same, in the same order."""


@dataclass(frozen=True)
class HeldPart:
    """Factors in memory."""

    factors: Factors

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.factors.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer."""
        return self.factors.lora_B.shape[0], self.factors.lora_A.shape[1]

    def read_lora_A(self, target: Array) -> None:
        """Copies."""
        target[:] = self.factors.lora_A

    def read_lora_B(self, scratch: Array) -> Array:  # noqa: ARG002 (what is in memory needs no scratch)
        """The array itself."""
        return self.factors.lora_B


def parts_of(updates: Sequence[Factors]) -> Sequence[Part]:
    """The updates part by part, wherever they lie."""
    return updates.parts if isinstance(updates, Updates) else [HeldPart(update) for update in updates]
