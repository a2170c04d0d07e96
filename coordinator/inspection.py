"""Looks at one uploaded file after another; run as a program, in a process of its own (see inspectors.py).

A line of JSON on its input says what file it is and what it must be; a line on its output says how that went. Here
alone are bytes from outside parsed before they are accepted, so nothing here may need more memory for a larger file.
"""

import json
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.adapter import AdapterSpec, ModuleShape, TensorShape
from common.codec import Layout, WireDtype, blocks_of, check_file, name_of_lora_A, name_of_lora_B, read_part
from common.errors import AdapterMismatch

_BLOCK_NUMBERS = 1 << 18  # of a matrix in one go: bounds the memory of a norm
_NO_LIMIT = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Inspection:
    """A file to look at, and what it must be."""

    path: Path
    layout: Layout
    whose: str  # for messages
    handed_out: Path | None = None  # the slice whose lora_A the update must keep
    bounds: tuple[int, ...] = ()  # upper ends of the rank partitions whose norms are wanted, ascending
    scaling: float = 1.0  # before lora_B lora_A


Look: TypeAlias = Callable[[Inspection], tuple[float, ...]]
Matrix: TypeAlias = NDArray[np.float64]
Partitions: TypeAlias = tuple[tuple[int, int], ...]  # of rank indices: low (inclusive) to high (exclusive)


def inspect_file(inspection: Inspection) -> tuple[float, ...]:
    """The norm of every partition that was asked for.

    Raises AdapterMismatch, WrongSize, NotFinite or OutOfBounds if the file is not what it must be.
    """
    check_file(inspection.path, inspection.layout, inspection.whose)
    if inspection.handed_out is not None:
        check_lora_A_is_kept(inspection.path, inspection.handed_out, inspection.layout, inspection.whose)
    return partition_norms(inspection)


def check_lora_A_is_kept(update: Path, handed_out: Path, layout: Layout, whose: str) -> None:
    """Raises AdapterMismatch unless every lora_A of an update is that of the slice it was trained from.

    A worker that does not know the plan's `freezes_lora_a` would train it, and the method would average nonsense.
    """
    with update.open("rb") as found, handed_out.open("rb") as kept:
        for module in layout.spec.modules:
            name = name_of_lora_A(module.name)
            pairs = zip(blocks_of(kept, layout, name), blocks_of(found, layout, name), strict=True)
            if not all(np.array_equal(before, after) for (_, before), (_, after) in pairs):
                raise AdapterMismatch(
                    f"{whose}: {name} was trained, but this federation's method keeps lora_A as it is; "
                    "is the worker older than the coordinator?"
                )


def partition_norms(inspection: Inspection) -> tuple[float, ...]:
    """Frobenius norms over all modules of scaling * lora_B[:, low:high] lora_A[low:high], one for each partition.

    The squared norm of a product is the sum of the elementwise product of the factors' Gram matrices, so that no
    out x in matrix is made. In float64.
    """
    bounds = inspection.bounds
    partitions = tuple(zip((0, *bounds), bounds, strict=False))
    squares: list[list[float]] = [[] for _ in partitions]
    with inspection.path.open("rb") as file:
        for module in inspection.layout.spec.modules if partitions else ():
            of_A = _grams_of_lora_A(file, inspection.layout, module, partitions)
            of_B = _grams_of_lora_B(file, inspection.layout, module, partitions)
            for terms, gram_A, gram_B in zip(squares, of_A, of_B, strict=True):
                terms.append(float(np.sum(gram_A * gram_B)))
    return tuple(abs(inspection.scaling) * math.sqrt(max(0.0, math.fsum(terms))) for terms in squares)


def serve(look: Look = inspect_file) -> None:
    """What the process does: answers line after line until its input ends. `look` is another one in tests only."""
    for line in sys.stdin.buffer:
        fields = json.loads(line)
        _limit(fields["seconds"], fields["memory_bytes"])
        try:
            answer: dict[str, Any] = {"norms": look(_inspection_of(fields))}
        except AdapterMismatch as error:
            answer = {"reason": error.reason, "message": str(error)}
        except MemoryError:
            answer = {"failed": ""}
        except Exception as error:  # whatever it is: it is told, and this process is replaced
            answer = {"failed": f"failed with {type(error).__name__}: {str(error)[:200]}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def line_of(inspection: Inspection, *, seconds: float, memory_bytes: int) -> bytes:
    """The line that asks for an inspection, within these limits."""
    layout = inspection.layout
    fields = {
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "path": str(inspection.path.absolute()),
        "whose": inspection.whose,
        "spec": _text_of(layout.spec),
        "rank": layout.rank,
        "dtype": layout.dtype.value,
        "handed_out": "" if inspection.handed_out is None else str(inspection.handed_out.absolute()),
        "bounds": inspection.bounds,
        "scaling": inspection.scaling,
    }
    return json.dumps(fields).encode() + b"\n"


@lru_cache(maxsize=4)
def _text_of(spec: AdapterSpec) -> str:
    modules = [[m.name, m.out_features, m.in_features] for m in spec.modules]
    return json.dumps([modules, [[t.name, t.shape] for t in spec.tensors]])


@lru_cache(maxsize=4)
def _spec_in(text: str) -> AdapterSpec:
    modules, tensors = json.loads(text)
    return AdapterSpec(
        tuple(ModuleShape(name, out, into) for name, out, into in modules),
        tuple(TensorShape(name, tuple(shape)) for name, shape in tensors),
    )


def _inspection_of(fields: dict[str, Any]) -> Inspection:
    return Inspection(
        path=Path(fields["path"]),
        layout=Layout(_spec_in(fields["spec"]), fields["rank"], WireDtype(fields["dtype"])),
        whose=fields["whose"],
        handed_out=Path(fields["handed_out"]) if fields["handed_out"] else None,
        bounds=tuple(fields["bounds"]),
        scaling=fields["scaling"],
    )


def _limit(seconds: float, memory_bytes: int) -> None:
    """The kernel's own limits, from now on: they hold even when nobody is there any more to watch the clock."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, _NO_LIMIT))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, _NO_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _grams_of_lora_A(file: BinaryIO, layout: Layout, module: ModuleShape, partitions: Partitions) -> list[Matrix]:
    grams = []
    for low, high in partitions:
        gram, step = np.zeros((high - low, high - low)), max(1, _BLOCK_NUMBERS // (high - low))
        for start in range(0, module.in_features, step):
            columns = (start, min(start + step, module.in_features))
            part = read_part(file, layout, name_of_lora_A(module.name), rows=(low, high), columns=columns)
            gram += part @ part.T
        grams.append(gram)
    return grams


def _grams_of_lora_B(file: BinaryIO, layout: Layout, module: ModuleShape, partitions: Partitions) -> list[Matrix]:
    grams = [np.zeros((high - low, high - low)) for low, high in partitions]
    step = max(1, _BLOCK_NUMBERS // layout.rank)
    for start in range(0, module.out_features, step):
        rows = (start, min(start + step, module.out_features))
        part = read_part(file, layout, name_of_lora_B(module.name), rows=rows, columns=(0, layout.rank))
        for index, (low, high) in enumerate(partitions):
            grams[index] += part[:, low:high].T @ part[:, low:high]
    return grams


if __name__ == "__main__":
    serve()
