"""A module's raw factors as one operator W = sum_k lora_B_k diag(v_k) lora_A_k, applied block by block.

Nothing is multiplied out and nothing is weighted in place: the weights touch the [R, l] intermediate alone, so the
stored numbers are read as they came. Blocks are made of whole clients in their order, up to BLOCK_ROWS directions,
and are the same whether they are kept between passes or read again: the bits cannot depend on that. Data and products
are float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.adapter import Array
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.updates import Part

BLOCK_ROWS = 256  # directions that are multiplied at once: enough for BLAS, 6.3 MB of a 3072 x 3072 layer
KEPT_BYTES = 8 << 20  # of blocks from files that stay in memory between passes; the rest is read anew in each


@dataclass(frozen=True)
class Weighted:
    """A part of the stack and the weight of each of its directions."""

    part: Part
    weights: Matrix  # [rank]


@dataclass(frozen=True)
class _Block:
    """The factors of some clients, side by side."""

    lora_A: Array  # [rows, in_features]
    lora_B: Array  # [out_features, rows]
    weights: Array  # [rows, 1]


class Stack:
    """The operator. Not safe to share between threads: blocks that are not kept use one buffer in turn."""

    def __init__(self, entries: Sequence[Weighted], global_rank: int, *, kept_bytes: int) -> None:
        self.shape = entries[0].part.shape
        self.directions = sum(entry.part.rank for entry in entries)
        self._groups = _grouped(entries)
        widest = max(sum(entry.part.rank for entry in group) for group in self._groups)
        self._scratch = np.empty(self.shape[0] * max(entry.part.rank for entry in entries), np.float32)
        self._spare: _Block | None = None
        self._widest = widest
        self._kept: dict[int, _Block] = {}
        self._room = kept_bytes
        self.mean_rows = np.zeros((global_rank, self.shape[1]), np.float32)
        self._terms: list[float] = []
        for index in range(len(self._groups)):
            self._load(index, first=True)

    @property
    def noise(self) -> float:
        """How large a singular value float32 makes out of rounding alone; not finite if an update is not.

        Every client's term errs on its own, relative to the sum of its directions' norms (they may all be one and the
        same direction): updates that cancel leave noise, and noise is not a direction. Weights differ by index, so each
        direction counts with its own: the greatest for all of them would bury what a lone owner has.
        """
        return _NOISE * float(np.finfo(np.float32).eps) * float(np.linalg.norm(self._terms))

    def forward(self, columns: Array) -> Array:
        """W @ columns, [out_features, l]."""
        total = np.zeros((self.shape[0], columns.shape[1]), np.float32)
        product = np.empty_like(total)
        for block in self._blocks():
            inner = block.lora_A @ columns
            inner *= block.weights
            total += np.matmul(block.lora_B, inner, out=product)
        return total

    def backward(self, columns: Array) -> Array:
        """W^T @ columns, [in_features, l]."""
        total = np.zeros((self.shape[1], columns.shape[1]), np.float32)
        product = np.empty_like(total)
        for block in self._blocks():
            inner = block.lora_B.T @ columns
            inner *= block.weights
            total += np.matmul(block.lora_A.T, inner, out=product)
        return total

    def dense(self) -> Matrix:
        """W itself in float64, for layers and spectra where nothing else will do."""
        total = np.zeros(self.shape)
        for block in self._blocks():
            total += (block.lora_B * block.weights[:, 0].astype(np.float64)) @ block.lora_A.astype(np.float64)
        return total

    def _blocks(self) -> Iterator[_Block]:
        for index in range(len(self._groups)):
            yield self._kept.get(index) or self._load(index)

    def _load(self, index: int, *, first: bool = False) -> _Block:
        group = self._groups[index]
        rows = sum(entry.part.rank for entry in group)
        block = self._room_for(index, rows, first=first)
        start = 0
        for entry in group:
            end = start + entry.part.rank
            entry.part.read_lora_A(block.lora_A[start:end])
            lora_B = entry.part.read_lora_B(self._scratch)
            block.lora_B[:, start:end] = lora_B
            block.weights[start:end, 0] = entry.weights
            if first:
                self._note(entry, block.lora_A[start:end], block.weights[start:end], lora_B)
            start = end
        return block

    def _note(self, entry: Weighted, lora_A: Array, weights: Array, lora_B: Array) -> None:
        """What is told by the first reading: the terms' norms, and the mean of the lora_A by the weights."""
        with np.errstate(over="ignore", invalid="ignore"):
            rows = np.einsum("ij,ij->i", lora_A, lora_A).astype(np.float64)
            columns = np.einsum("ij,ij->j", lora_B, lora_B).astype(np.float64)
            self._terms.append(float(np.sqrt(rows * columns) @ np.abs(entry.weights)))
            self.mean_rows[: entry.part.rank] += lora_A * weights

    def _room_for(self, index: int, rows: int, *, first: bool) -> _Block:
        size_bytes = rows * sum(self.shape) * 4
        if first and size_bytes <= self._room:
            self._room -= size_bytes
            self._kept[index] = _empty_block(self.shape, rows)
            return self._kept[index]
        if first:
            self._room = 0  # the kept ones are the first ones
        if self._spare is None:
            self._spare = _empty_block(self.shape, self._widest)
        spare = self._spare
        # A narrower block takes the first part of the buffer, so that its rows are as far apart as if it were kept.
        lora_B = spare.lora_B.reshape(-1)[: self.shape[0] * rows].reshape(self.shape[0], rows)
        return _Block(spare.lora_A[:rows], lora_B, spare.weights[:rows])


_NOISE = 4.0  # updates that cancel leave less than this many roundings (tests/unit/test_aggregation_iterated.py)


def _grouped(entries: Sequence[Weighted]) -> list[list[Weighted]]:
    groups: list[list[Weighted]] = [[]]
    rows = 0
    for entry in entries:
        if groups[-1] and rows + entry.part.rank > BLOCK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(entry)
        rows += entry.part.rank
    return groups


def _empty_block(shape: tuple[int, int], rows: int) -> _Block:
    out_features, in_features = shape
    return _Block(
        lora_A=np.empty((rows, in_features), np.float32),
        lora_B=np.empty((out_features, rows), np.float32),
        weights=np.empty((rows, 1), np.float32),
    )
