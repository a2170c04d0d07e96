"""Which rank, micro-batch, quantization and checkpointing a machine should train with: what is measured, and when.

How a measurement is made is an argument; nothing here knows a device, a process or a file.

What only costs time is given for rank: a smaller micro-batch first (it is accumulated to the same batch), then
gradient checkpointing. A quantised base model is another function, so it is tried only if nothing fits without.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from common.errors import ConfigError, RafloraError
from worker.measurement import Attempt, Failure, Line, Measurement, Proposal, Quantization, line_through, setting_of
from worker.trainer_protocol import DryRunDone

MAX_LEVELS = 16
_DEFAULT_LEVELS = 5
# What says that it was too much for this machine; anything else says that it cannot be done at all.
_SHORT_OF_MEMORY = frozenset({"out_of_memory", "trainer_died"})


class CannotMeasure(RafloraError):
    """A dry run failed; `word` says why in one word."""

    reason = "cannot_measure"

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


Measure = Callable[[Attempt], Awaitable[DryRunDone]]  # raises CannotMeasure


@dataclass(frozen=True)
class Question:
    """What is to be found out."""

    levels: tuple[int, ...]  # ranks, ascending
    batch_size: int  # of an optimizer step, as the federation has it
    memory_batch: int | None  # the site's own limit to the micro-batch
    quantizations: tuple[Quantization, ...]  # in the order in which they are tried
    checkpointings: tuple[bool, ...]  # likewise
    memory_share: float


@dataclass(frozen=True)
class Answer:
    """What was found."""

    machine: DryRunDone | None  # the first measurement's device, memory and base model; None: there was none
    levels: tuple[int, ...]  # that the adapted layers are wide enough for
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]
    proposal: Proposal | None  # None: nothing fits


async def propose(question: Question, measure: Measure) -> Answer:
    """Measures until the question is answered.

    Raises CannotMeasure if the very first measurement fails for another reason than memory, and ConfigError if the
    adapted layers are too narrow for every level.
    """
    bench = _Bench(question, measure)
    best, rank = None, 0
    for quantization in question.quantizations:
        for is_checkpointed in question.checkpointings:
            setting = _Setting(quantization, is_checkpointed)
            found = await bench.largest_rank(setting)
            if found > rank:
                best, rank = setting, found
            if rank == bench.levels[-1]:
                break
        if rank:
            break
    proposal = None
    if best is not None:
        micro_batch = await bench.largest_micro_batch(best, rank)
        proposal = await bench.proposal(best, rank, micro_batch)
    return Answer(bench.first, bench.levels, tuple(bench.measurements), tuple(bench.failures), proposal)


def default_levels(global_rank: int) -> tuple[int, ...]:
    """The largest few of the powers of two up to the global rank, and that rank itself."""
    powers = {1 << power for power in range(global_rank.bit_length())}
    return tuple(sorted(powers | {global_rank})[-_DEFAULT_LEVELS:])


def micro_batches(batch_size: int, memory_batch: int | None) -> tuple[int, ...]:
    """The powers of two that divide a batch and are not above the site's limit, ascending."""
    most = min(batch_size, memory_batch or batch_size)
    return tuple(size for power in range(most.bit_length()) if batch_size % (size := 1 << power) == 0 and size <= most)


@dataclass(frozen=True)
class _Setting:
    quantization: Quantization
    gradient_checkpointing: bool

    def at(self, lora_rank: int, micro_batch: int) -> Attempt:
        return Attempt(
            lora_rank=lora_rank,
            micro_batch=micro_batch,
            quantization=self.quantization,
            gradient_checkpointing=self.gradient_checkpointing,
        )


@dataclass
class _Bench:
    """Measures nothing twice, and nothing that cannot fit by what was measured."""

    question: Question
    measure: Measure
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    first: DryRunDone | None = None

    @property
    def levels(self) -> tuple[int, ...]:
        """Raises ConfigError if the adapted layers are too narrow for all of them."""
        levels = self.question.levels
        if self.first is None:
            return levels
        wide_enough = tuple(level for level in levels if level <= self.first.largest_rank)
        if not wide_enough:
            raise ConfigError(f"levels {list(levels)}: the adapted layers take at most rank {self.first.largest_rank}")
        return wide_enough

    async def largest_rank(self, setting: _Setting) -> int:
        """The largest level that fits one example at a time; 0 if none does."""
        if not self.fits(await self.taken(setting.at(self.levels[0], 1))):
            return 0
        line: Line | None = None
        for level in reversed(self.levels[1:]):
            if line is not None and line.peak_bytes(level) > self.limit_bytes:
                continue
            taken = await self.taken(setting.at(level, 1))
            if self.fits(taken):
                return level
            if taken is not None:
                line = line_through(self.alike(setting.at(level, 1)))
        return self.levels[0]

    async def largest_micro_batch(self, setting: _Setting, rank: int) -> int:
        """The largest part of the batch that fits at this rank."""
        before: list[Measurement] = []
        for size in micro_batches(self.question.batch_size, self.question.memory_batch):
            if len(before) > 1:
                # Activations grow in proportion to the examples.
                smaller, small = before[-2:]
                slope = (small.peak_bytes - smaller.peak_bytes) / (small.micro_batch - smaller.micro_batch)
                if small.peak_bytes + slope * (size - small.micro_batch) > self.limit_bytes:
                    break
            taken = await self.taken(setting.at(rank, size))
            if taken is None or not self.fits(taken):
                break
            before.append(taken)
        return before[-1].micro_batch if before else 1

    async def proposal(self, setting: _Setting, rank: int, micro_batch: int) -> Proposal | None:
        """With the line through every level up to this rank, or through one smaller rank if it is the only level."""
        for level in self.levels:
            if level < rank:
                await self.taken(setting.at(level, micro_batch))
        taken = await self.taken(setting.at(rank, micro_batch))
        if taken is None:
            return None
        if len(self.alike(taken)) < 2 and rank > 1:
            await self.taken(setting.at(rank // 2, micro_batch))
        alike = self.alike(taken)
        # One rank alone, the only one that these layers are wide enough for, has no slope.
        flat = Line(base_bytes=taken.peak_bytes, bytes_per_rank=0, deviation=0.0)
        line = line_through(alike) if len(alike) > 1 else flat
        return Proposal(
            **setting.at(rank, micro_batch).model_dump(), examples_per_second=taken.examples_per_second, line=line
        )

    async def taken(self, attempt: Attempt) -> Measurement | None:
        """What an attempt takes; None if it cannot be done."""
        for known in self.measurements:
            if (known.lora_rank, *setting_of(known)) == (attempt.lora_rank, *setting_of(attempt)):
                return known
        if any((f.lora_rank, *setting_of(f)) == (attempt.lora_rank, *setting_of(attempt)) for f in self.failures):
            return None
        is_first = not self.measurements and not self.failures
        try:
            done = await self.measure(attempt)
        except CannotMeasure as error:
            if is_first and error.word not in _SHORT_OF_MEMORY:
                raise
            self.failures.append(Failure(**attempt.model_dump(), reason=error.word, message=str(error)))
            return None
        self.first = self.first or done
        taken = Measurement(**attempt.model_dump(), peak_bytes=done.peak_bytes, seconds_per_step=done.seconds_per_step)
        self.measurements.append(taken)
        return taken

    def alike(self, attempt: Attempt) -> list[Measurement]:
        """What was measured with everything but the rank the same."""
        return [m for m in self.measurements if setting_of(m) == setting_of(attempt)]

    def fits(self, taken: Measurement | None) -> bool:
        """Whether it leaves the device its share."""
        return taken is not None and taken.peak_bytes <= self.limit_bytes

    @property
    def limit_bytes(self) -> int:
        """The most that a step may take; 0 before the first measurement."""
        return int(self.first.memory_bytes * self.question.memory_share) if self.first is not None else 0
