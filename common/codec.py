"""Adapters as safetensors bytes: strict, canonical, bounded.

Names, shapes and dtype of an adapter follow from the spec, the rank and the wire dtype. So its header, and
with it its exact length, is known before the first byte arrives, and a file is accepted only if its header is
that very header: no other names, no duplicates, no padding, no second way to write the same adapter.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, AdapterSpec, Array, Factors
from common.errors import AdapterMismatch, NotFinite, OutOfBounds, WrongSize

MAX_HEADER_BYTES = 8 << 20
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_QUOTE_CHARS = 200
MAX_MAGNITUDE = 1e4  # far above any trained factor; products of such factors stay finite in float32
_CHECKED_BLOCK = 1 << 20  # numbers looked at in one go: bounds the memory of a check


class WireDtype(StrEnum):
    """How numbers travel. bf16 halves the bytes and costs about 1e-3 in the product."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def number_bytes(self) -> int:
        """Of one number."""
        return _NUMPY[self].itemsize


_NUMPY: Mapping[WireDtype, np.dtype[Any]] = {
    WireDtype.FLOAT32: np.dtype("<f4"),
    WireDtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    WireDtype.FLOAT16: np.dtype("<f2"),
}
_SAFETENSORS = {WireDtype.FLOAT32: "F32", WireDtype.BFLOAT16: "BF16", WireDtype.FLOAT16: "F16"}


@dataclass(frozen=True)
class Layout:
    """Where every number of an adapter of this spec, rank and dtype stands in its file."""

    spec: AdapterSpec
    rank: int
    dtype: WireDtype = WireDtype.FLOAT32

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor shapes by wire name, in file order."""
        shapes: dict[str, tuple[int, ...]] = {t.name: t.shape for t in self.spec.tensors}
        for module in self.spec.modules:
            shapes[name_of_lora_A(module.name)] = (self.rank, module.in_features)
            shapes[name_of_lora_B(module.name)] = (module.out_features, self.rank)
        return dict(sorted(shapes.items()))

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """First byte of every tensor, from the start of the file."""
        offset, offsets = len(self.header), {}
        for name, shape in self.shapes.items():
            offsets[name] = offset
            offset += self._size_of(shape)
        return offsets

    @cached_property
    def header(self) -> bytes:
        """The first bytes: length, JSON, spaces up to a multiple of eight; as the safetensors library writes them."""
        entries, offset = {}, 0
        for name, shape in self.shapes.items():
            end = offset + self._size_of(shape)
            entries[name] = {
                "dtype": _SAFETENSORS[self.dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return _LENGTH.pack(len(text)) + text

    @cached_property
    def size_bytes(self) -> int:
        """The exact length of the file."""
        return len(self.header) + sum(self._size_of(shape) for shape in self.shapes.values())

    def _size_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * _NUMPY[self.dtype].itemsize


def name_of_lora_A(module: str) -> str:
    """The wire name of a module's lora_A."""
    return f"{module}.lora_A"


def name_of_lora_B(module: str) -> str:
    """The wire name of a module's lora_B."""
    return f"{module}.lora_B"


def encode(adapter: Adapter, dtype: WireDtype = WireDtype.FLOAT32) -> bytes:
    """The canonical bytes of an adapter. Raises NotFinite, also for a number that the dtype cannot hold."""
    layout = Layout(adapter.spec, adapter.rank, dtype)
    arrays = _by_wire_name(adapter)
    return b"".join([layout.header, *(_to_wire(arrays[name], dtype, name) for name in layout.shapes)])


def decode(content: bytes | memoryview, layout: Layout, whose: str) -> Adapter:
    """The adapter in these bytes.

    Raises WrongSize, AdapterMismatch or NotFinite; `whose` names the bytes' owner in the message.
    """
    view = memoryview(content)
    check_header(bytes(view[: _start_bytes(layout)]), view.nbytes, layout, whose)
    modules = {module.name: _factors(view, layout, module.name, whose) for module in layout.spec.modules}
    tensors = {tensor.name: _array(view, layout, tensor.name, whose) for tensor in layout.spec.tensors}
    return Adapter(modules, tensors)


def check_file(path: Path, layout: Layout, whose: str) -> None:
    """What the coordinator demands of an update: all that decode checks, and no absurd number; in bounded memory.

    Raises the same errors as decode, and OutOfBounds for a number beyond MAX_MAGNITUDE.
    """
    with path.open("rb") as file:
        check_header(file.read(_start_bytes(layout)), os.fstat(file.fileno()).st_size, layout, whose)
        for name in layout.shapes:
            for start, block in blocks_of(file, layout, name):
                _check_values(block, name, whose, start)
                _check_magnitude(block, name, whose, start)


def blocks_of(file: BinaryIO, layout: Layout, name: str) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[Any]]]]:
    """One tensor's numbers in their wire dtype, some at a time, each time with the index of the first.

    Read and not mapped: a file may be larger than the memory that its reader is allowed.
    Raises WrongSize if the file ends too soon.
    """
    count, dtype = math.prod(layout.shapes[name]), _NUMPY[layout.dtype]
    for start in range(0, count, _CHECKED_BLOCK):
        length = min(_CHECKED_BLOCK, count - start) * dtype.itemsize
        raw = os.pread(file.fileno(), length, layout.offsets[name] + start * dtype.itemsize)
        if len(raw) != length:
            raise WrongSize(f"{name}: the file ends within it")
        yield start, np.frombuffer(raw, dtype=dtype)


def read_part(
    file: BinaryIO, layout: Layout, name: str, *, rows: tuple[int, int], columns: tuple[int, int]
) -> NDArray[np.float64]:
    """A part of a matrix of a checked file, from row and column (inclusive) to row and column (exclusive).

    Raises WrongSize if the file ends too soon.
    """
    dtype, width = _NUMPY[layout.dtype], layout.shapes[name][1]
    if columns == (0, width):  # then the rows lie side by side
        rows, columns, width, shape = (0, 1), (rows[0] * width, rows[1] * width), 0, (rows[1] - rows[0], width)
    else:
        shape = (rows[1] - rows[0], columns[1] - columns[0])
    length = (columns[1] - columns[0]) * dtype.itemsize
    starts = (layout.offsets[name] + (row * width + columns[0]) * dtype.itemsize for row in range(*rows))
    raw = b"".join(os.pread(file.fileno(), length, start) for start in starts)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise WrongSize(f"{name}: the file ends within it")
    return np.frombuffer(raw, dtype=dtype).astype(np.float64).reshape(shape)


def check_numbers(content: bytes | memoryview, layout: Layout, whose: str) -> None:
    """The second half of check_file, for bytes whose header is known to be this layout's.

    Raises NotFinite, and OutOfBounds for a number beyond MAX_MAGNITUDE.
    """
    for name in layout.shapes:
        raw = _raw(content, layout, name)
        _check_values(raw, name, whose)
        _check_magnitude(raw, name, whose)


def read_module(path: Path, layout: Layout, module: str, whose: str = "") -> Factors:
    """One module of a file that was checked when it was stored; the rest of the file is not read."""
    names = name_of_lora_A(module), name_of_lora_B(module)
    return Factors(*(_read(path, layout, name, whose or path.name) for name in names))


def read_into(path: Path, layout: Layout, name: str, target: Array) -> None:
    """Fill a contiguous float32 array with one tensor of a checked file; its numbers are not looked at.

    Read and not mapped, so that the memory is the target's alone. Raises WrongSize if the file ends within the tensor.
    """
    with path.open("rb", buffering=0) as file:
        if layout.dtype is WireDtype.FLOAT32:
            _fill(file, target, layout.offsets[name], name)
            return
        numbers = target.reshape(-1)
        for start, block in blocks_of(file, layout, name):
            numbers[start : start + len(block)] = block


def read_tensor(path: Path, layout: Layout, name: str) -> Array:
    """One tensor outside LoRA of a checked file."""
    return _read(path, layout, name, whose=path.name)


def digest_of(content: bytes | memoryview) -> str:
    """The name of these bytes: SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_header(start: bytes, size_bytes: int, layout: Layout, whose: str) -> None:
    """Raises AdapterMismatch or WrongSize unless a file that starts so and is so long has exactly this layout."""
    if start[: len(layout.header)] != layout.header:
        raise AdapterMismatch(f"{whose}: {_difference(start, layout)}")
    if size_bytes != layout.size_bytes:
        raise WrongSize(
            f"{whose}: {size_bytes} bytes, but rank {layout.rank} in {layout.dtype} has {layout.size_bytes}"
        )


def _start_bytes(layout: Layout) -> int:
    # Room for a header that differs, so that the message can say how; still bounded.
    return 2 * len(layout.header) + 4096


def _fill(file: BinaryIO, target: Array, offset: int, name: str) -> None:
    view = memoryview(target.data).cast("B")
    while view:
        length = os.preadv(file.fileno(), [view], offset)
        if length == 0:
            raise WrongSize(f"{name}: the file ends within it")
        view, offset = view[length:], offset + length


def _read(path: Path, layout: Layout, name: str, whose: str) -> Array:
    array = np.empty(layout.shapes[name], np.float32)
    read_into(path, layout, name, array)
    _check_values(array.reshape(-1), name, whose)
    return array


def _to_wire(array: Array, dtype: WireDtype, name: str) -> memoryview:
    with np.errstate(over="ignore"):
        raw = np.ascontiguousarray(array.astype(_NUMPY[dtype], order="C", copy=False)).reshape(-1)
    _check_values(raw, name, whose=f"adapter to be sent in {dtype}")
    return raw.view(np.uint8).data


def _by_wire_name(adapter: Adapter) -> dict[str, Array]:
    arrays = dict(adapter.tensors)
    for name, factors in adapter.modules.items():
        arrays[name_of_lora_A(name)] = factors.lora_A
        arrays[name_of_lora_B(name)] = factors.lora_B
    return arrays


def _factors(content: memoryview, layout: Layout, module: str, whose: str) -> Factors:
    return Factors(
        lora_A=_array(content, layout, name_of_lora_A(module), whose),
        lora_B=_array(content, layout, name_of_lora_B(module), whose),
    )


def _array(content: memoryview, layout: Layout, name: str, whose: str) -> Array:
    raw = _raw(content, layout, name)
    _check_values(raw, name, whose)
    return raw.astype(np.float32).reshape(layout.shapes[name])


def _raw(content: bytes | memoryview, layout: Layout, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    count = math.prod(layout.shapes[name])
    return np.frombuffer(content, dtype=_NUMPY[layout.dtype], count=count, offset=layout.offsets[name])


def _check_values(raw: np.ndarray[Any, np.dtype[Any]], name: str, whose: str, first: int = 0) -> None:
    for start in range(0, raw.size, _CHECKED_BLOCK):
        with np.errstate(invalid="ignore"):  # a signalling NaN is one more NaN, and no warning
            finite = np.isfinite(raw[start : start + _CHECKED_BLOCK])
        if not finite.all():
            index = start + int(np.argmin(finite))
            raise NotFinite(
                f"{whose}: {name} holds {raw[index]} at index {first + index}; only finite numbers are accepted"
            )


def _check_magnitude(raw: np.ndarray[Any, np.dtype[Any]], name: str, whose: str, first: int = 0) -> None:
    for start in range(0, raw.size, _CHECKED_BLOCK):
        block = np.abs(raw[start : start + _CHECKED_BLOCK].astype(np.float32))
        if block.max(initial=0.0) > MAX_MAGNITUDE:
            index = start + int(block.argmax())
            raise OutOfBounds(
                f"{whose}: {name} holds {raw[index]} at index {first + index}; at most {MAX_MAGNITUDE:g} is accepted"
            )


def _difference(start: bytes, layout: Layout) -> str:
    """A sentence on how a header that is not the expected one differs from it."""
    try:
        return _compared(_parse_header(start), layout)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return f"not a safetensors header of {len(layout.shapes)} tensors; the file is truncated or damaged"


def _compared(found: Mapping[str, tuple[str, list[int]]], layout: Layout) -> str:
    missing, extra = sorted(layout.shapes.keys() - found.keys()), sorted(found.keys() - layout.shapes.keys())
    if missing or extra:
        return f"tensor names differ: missing {_brief(missing)}, unexpected {_brief(extra)}"
    for name, shape in layout.shapes.items():
        expected = (_SAFETENSORS[layout.dtype], list(shape))
        if found[name] != expected:
            return f"{name} is {_brief(found[name])}, expected {_brief(expected)}"
    return "the header is not in canonical form (names sorted, no gaps, no metadata)"


def _brief(found: object) -> str:
    # What a peer wrote is quoted, and cut: it may be megabytes, or no text at all.
    text = repr(found[:3]) if isinstance(found, list) else repr(found)
    return text if len(text) <= _QUOTE_CHARS else f"{text[:_QUOTE_CHARS]}..."


def _parse_header(start: bytes) -> dict[str, tuple[str, list[int]]]:
    (length,) = _LENGTH.unpack(start[: _LENGTH.size])
    if length > min(MAX_HEADER_BYTES, len(start) - _LENGTH.size):
        raise ValueError("header too long")
    text = start[_LENGTH.size : _LENGTH.size + length]
    entries = json.loads(text)
    return {name: (str(e["dtype"]), list(e["shape"])) for name, e in entries.items() if name != "__metadata__"}
