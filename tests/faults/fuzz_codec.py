"""Mutants of uploaded files against the check that every update passes: `make fuzz`.

Mutant k of a seed is always the same file, so that each can be looked at again. Three judges see it: the product's
own check, a small strict check that shares no line with it, and the safetensors library. The product must accept
exactly what the strict check accepts, nothing that the library refuses, and say no with typed errors only.
"""

import argparse
import json
import math
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from faults.fuzz_mutations import MUTATIONS, Parts, parts_of
from faults.fuzz_report import Flatness, Progress, print_outcomes, resident_bytes
from safetensors import SafetensorError, deserialize

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import MAX_MAGNITUDE, Layout, WireDtype, check_file, encode
from common.errors import AdapterMismatch

BATCH = 2_500  # mutants that a process takes at once
NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
WORDS = {WireDtype.FLOAT32: "F32", WireDtype.FLOAT16: "F16", WireDtype.BFLOAT16: "BF16"}
SPECS = (
    AdapterSpec((ModuleShape("a", 2, 3),)),
    AdapterSpec(
        (ModuleShape("encoder.0.query", 6, 4), ModuleShape("encoder.1.query", 6, 4)),
        (TensorShape("classifier.bias", (3,)), TensorShape("temperature", ())),
    ),
    AdapterSpec((ModuleShape('ü"\\', 5, 5), ModuleShape("ü", 5, 5)), (TensorShape("cube", (2, 1, 3)),)),
)
Check = Callable[[Path, Layout, str], None]


@dataclass(frozen=True)
class Base:
    """A good file, from which mutants are made."""

    layout: Layout
    content: bytes


@dataclass(frozen=True)
class Mutant:
    """One file, and how it came to be."""

    number: int
    base: Base
    mutations: tuple[str, ...]
    content: bytes


@dataclass
class Tally:
    """What became of some mutants."""

    mutants: int = 0
    accepted: int = 0
    accepted_by_library: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (mutation, reason)
    breaches: list[str] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)  # mutants seen by the process, its bytes

    def add(self, other: "Tally") -> None:
        """Takes another tally in."""
        self.mutants += other.mutants
        self.accepted += other.accepted
        self.accepted_by_library += other.accepted_by_library
        self.outcomes.update(other.outcomes)
        self.breaches += other.breaches


def bases() -> list[Base]:
    """Several layouts in all dtypes."""
    made = []
    for index, spec in enumerate(SPECS):
        for dtype in WireDtype:
            rank = 1 + (index + len(made)) % 3
            made.append(Base(Layout(spec, rank, dtype), encode(_adapter(spec, rank), dtype)))
    return made


def mutant_of(seed: int, number: int, good: Sequence[Base]) -> Mutant:
    """Always the same for the same seed and number."""
    random = Random(f"{seed}/{number}")  # noqa: S311 - tests, not secrets
    base = random.choice(good)
    parts: Parts = parts_of(base.content, NUMPY[WORDS[base.layout.dtype]])
    # More than one at a time: the second may hide the first.
    names = tuple(random.choice(tuple(MUTATIONS)) for _ in range(random.choice((1, 1, 1, 2, 3))))
    for name in names:
        MUTATIONS[name](random, parts)
    content = parts.content()
    if parts.splices_with_another:
        other = random.choice(good).content
        content = content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other)) :]
    return Mutant(number, base, names, content)


def hunt(check: Check, seed: int, numbers: Iterable[int], folder: Path) -> Tally:
    """Shows the check these mutants; breaches are sentences that begin with the mutant's number."""
    tally, good, path = Tally(), bases(), folder / "mutant"
    for number in numbers:
        mutant = mutant_of(seed, number, good)
        path.write_bytes(mutant.content)
        outcome, breach = _judge(check, path, mutant)
        is_read = reads(mutant.content)
        tally.mutants += 1
        tally.accepted += outcome == "accepted"
        tally.accepted_by_library += is_read
        tally.outcomes.update((name, outcome) for name in mutant.mutations)
        if not breach and outcome == "accepted" and not is_read:
            breach = "accepted, but the safetensors library refuses it"
        if breach:
            tally.breaches.append(f"mutant {number} ({', '.join(mutant.mutations)}): {breach}")
    return tally


def reads(content: bytes) -> bool:
    """Whether the safetensors library reads these bytes."""
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def is_canonical(content: bytes, layout: Layout) -> bool:
    """The second judge: what these bytes say, written anew in the one right way, is these bytes; and all is in bounds.

    Works from the spec, the rank and the format's description alone.
    """
    word, shapes = WORDS[layout.dtype], dict[str, tuple[int, ...]]()
    for tensor in layout.spec.tensors:
        shapes[tensor.name] = tensor.shape
    for module in layout.spec.modules:
        shapes[f"{module.name}.lora_A"] = (layout.rank, module.in_features)
        shapes[f"{module.name}.lora_B"] = (module.out_features, layout.rank)
    try:
        (length,) = struct.unpack_from("<Q", content)
        said = json.loads(content[8 : 8 + length])
        payload = content[8 + length :]
    except (struct.error, ValueError, RecursionError, OverflowError):
        return False
    if not isinstance(said, dict) or said.keys() != shapes.keys():
        return False
    entries, end = [], 0
    for name in sorted(shapes):
        begin, end = end, end + NUMPY[word].itemsize * math.prod(shapes[name])
        sizes = ",".join(map(str, shapes[name]))
        quoted = json.dumps(name, ensure_ascii=False)
        entries.append(f'{quoted}:{{"dtype":"{word}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}')
    text = ("{" + ",".join(entries) + "}").encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    if content[8 : 8 + length] != text or len(text) != length or len(payload) != end:
        return False
    with np.errstate(invalid="ignore"):
        values = np.frombuffer(payload, NUMPY[word]).astype(np.float64)
        return bool(np.all(np.abs(values) <= MAX_MAGNITUDE))  # NaN is not


def _judge(check: Check, path: Path, mutant: Mutant) -> tuple[str, str]:
    """What the check said, and what is wrong with that; an empty sentence if nothing is."""
    should_pass = is_canonical(mutant.content, mutant.base.layout)
    try:
        check(path, mutant.base.layout, "ada")
    except AdapterMismatch as error:
        if not str(error).isprintable() or len(str(error)) > 2000:
            return error.reason, f"a message for no terminal: {str(error)[:200]!r}"
        return error.reason, "refused, but it is canonical" if should_pass else ""
    except Exception as error:
        return type(error).__name__, f"not a typed error: {type(error).__name__}: {str(error)[:200]}"
    return "accepted", "" if should_pass else "accepted, but it is not canonical, finite and in bounds"


def _adapter(spec: AdapterSpec, rank: int) -> Adapter:
    numbers = np.random.default_rng(rank)

    def drawn(*shape: int) -> Any:
        return np.asarray(numbers.normal(size=shape), dtype=np.float32)

    return Adapter(
        {m.name: Factors(drawn(rank, m.in_features), drawn(m.out_features, rank)) for m in spec.modules},
        {t.name: drawn(*t.shape) for t in spec.tensors},
    )


_seen = 0  # by this process


def _batch(seed: int, begin: int, end: int) -> Tally:
    global _seen  # noqa: PLW0603 - one process, one count
    with tempfile.TemporaryDirectory() as folder:
        tally = hunt(check_file, seed, range(begin, end), Path(folder))
    _seen += end - begin
    tally.resident.append((_seen, resident_bytes()))
    return tally


def hunt_in_processes(seed: int, mutants: int, processes: int, progress: Progress) -> tuple[Tally, list[Flatness]]:
    """The product's own check, and how each process' memory went."""
    total, flat = Tally(), dict[int, Flatness]()
    limits = [(begin, min(begin + BATCH, mutants)) for begin in range(0, mutants, BATCH)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_batch_of_process, seed, *limit) for limit in limits]):
            pid, tally = done.result()
            total.add(tally)
            for seen, size in tally.resident:
                flat.setdefault(pid, Flatness()).note(seen, size)
            progress.show(total.mutants, len(total.breaches))
    return total, list(flat.values())


def _batch_of_process(seed: int, begin: int, end: int) -> tuple[int, Tally]:
    import os  # noqa: PLC0415 - for this line alone

    return os.getpid(), _batch(seed, begin, end)


def _replay(seed: int, number: int) -> int:
    mutant = mutant_of(seed, number, bases())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant"
        path.write_bytes(mutant.content)
        outcome, breach = _judge(check_file, path, mutant)
    layout = mutant.base.layout
    print(f"mutant {number} of seed {seed}: {', '.join(mutant.mutations)}; rank {layout.rank}, {layout.dtype}")
    print(f"the library {'reads' if reads(mutant.content) else 'refuses'} it; the check says: {outcome}; {breach}")
    print(mutant.content[:2000])
    return 1 if breach else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing is wrong, 1 if something is."""
    parser = argparse.ArgumentParser(description="Mutants of uploads against the check that every upload passes.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--replay", type=int, help="show one mutant by its number")
    given = parser.parse_args(arguments)
    if given.replay is not None:
        return _replay(given.seed, given.replay)
    started = time.monotonic()
    progress = Progress("mutants", given.mutants)
    tally, flat = hunt_in_processes(given.seed, given.mutants, given.processes, progress)
    seconds = time.monotonic() - started
    print_outcomes("mutation", tally.outcomes)
    print(
        f"\n{tally.mutants} mutants of seed {given.seed} in {seconds:.0f} s ({tally.mutants / seconds:.0f} a second); "
        f"{tally.accepted} accepted ({tally.accepted / tally.mutants:.2%}), "
        f"the library reads {tally.accepted_by_library / tally.mutants:.2%}"
    )
    leaks = [process.sentence for process in flat if not process.is_flat]
    for process in flat:
        print(f"memory of a process: {process.sentence}")
    for breach in (*tally.breaches[:20], *leaks):
        print(f"WRONG: {breach}")
    print(f"verdict: {'FAILED' if tally.breaches or leaks else 'passed'}")
    return 1 if tally.breaches or leaks else 0


if __name__ == "__main__":
    sys.exit(main())
