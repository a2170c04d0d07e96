"""A module's updates as they lie in the store: read where and when an aggregation needs them, one client at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from common.adapter import Adapter, Array, Factors, effective
from common.codec import Layout, name_of_lora_A, name_of_lora_B, read_into, read_module
from common.errors import NotFinite
from coordinator.aggregation.updates import Part, Updates


@dataclass(frozen=True)
class StoredPart:
    """One client's factors of one module, in a file that was checked against its layout when it arrived."""

    client_id: str
    path: Path
    layout: Layout
    module: str
    scaling: float

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.layout.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer."""
        shapes = self.layout.shapes
        return shapes[name_of_lora_B(self.module)][0], shapes[name_of_lora_A(self.module)][1]

    def read_lora_A(self, target: Array) -> None:
        """Straight from the file."""
        read_into(self.path, self.layout, name_of_lora_A(self.module), target)

    def read_lora_B(self, scratch: Array) -> Array:
        """Likewise; multiplied by the scaling as `effective` does it, to the bit."""
        lora_B = scratch[: self.shape[0] * self.rank].reshape(self.shape[0], self.rank)
        read_into(self.path, self.layout, name_of_lora_B(self.module), lora_B)
        if self.scaling != 1.0:
            with np.errstate(over="ignore", invalid="ignore"):
                lora_B *= np.float32(self.scaling)
        return lora_B

    def factors(self) -> Factors:
        """Both, effective and checked once more. Raises NotFinite."""
        read = read_module(self.path, self.layout, self.module, whose=self.client_id)
        if self.scaling == 1.0:
            return read
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = effective(Adapter({self.module: read}, {}), scaling=self.scaling).modules[self.module]
        if not np.isfinite(scaled.lora_B).all():
            raise NotFinite(
                f"{self.client_id}: {self.module}.lora_B times its scaling {self.scaling} is beyond float32"
            )
        return scaled


class StoredUpdates(Updates):
    """All clients' factors of one module."""

    def __init__(self, parts: Sequence[StoredPart]) -> None:
        self._parts = tuple(parts)

    @property
    def parts(self) -> Sequence[Part]:
        """One a client, in the clients' order."""
        return self._parts

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Factors: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Factors]: ...

    def __getitem__(self, index: int | slice) -> Factors | Sequence[Factors]:
        if isinstance(index, slice):
            return StoredUpdates(self._parts[index])
        return self._parts[index].factors()
