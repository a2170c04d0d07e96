"""What is measured in which order, on machines that are a formula."""

from dataclasses import dataclass, field

import pytest

from common.errors import ConfigError
from worker.measurement import Attempt, Line
from worker.proposal import CannotMeasure, Question, default_levels, micro_batches, propose
from worker.trainer_protocol import DryRunDone

WEIGHTS = {"none": 1000, "8bit": 500, "4bit": 250}


@dataclass
class Machine:
    """Weights, 10 bytes for a rank, and 100 for an example or, with checkpointing, 20."""

    memory_bytes: int
    largest_rank: int = 64
    dies_above: int = 1 << 60  # bytes
    lacks: str = ""  # a quantization whose library is missing
    bends_at: int = 0  # a rank that takes 5 bytes more than the line says
    asked: list[tuple[int, int, str, bool]] = field(default_factory=list)

    async def measure(self, attempt: Attempt) -> DryRunDone:
        self.asked.append(
            (attempt.lora_rank, attempt.micro_batch, attempt.quantization, attempt.gradient_checkpointing)
        )
        if attempt.quantization == self.lacks:
            raise CannotMeasure("model_error", f"{self.lacks}: no such library")
        example_bytes = 20 if attempt.gradient_checkpointing else 100
        peak = WEIGHTS[attempt.quantization] + 10 * attempt.lora_rank + example_bytes * attempt.micro_batch
        peak += 5 * (attempt.lora_rank == self.bends_at)
        if peak > self.dies_above:
            raise CannotMeasure("trainer_died", "signal SIGKILL")
        return DryRunDone(peak, 0.5, "digest", self.largest_rank, "cuda:0", self.memory_bytes)


def question(**changes: object) -> Question:
    settings: dict[str, object] = {
        "levels": (8, 16, 32, 64),
        "batch_size": 8,
        "memory_batch": None,
        "quantizations": ("none", "8bit", "4bit"),
        "checkpointings": (False, True),
        "memory_share": 1.0,
        **changes,
    }
    return Question(**settings)  # type: ignore[arg-type]


async def test_where_there_is_room_the_largest_rank_and_the_whole_batch_are_proposed() -> None:
    machine = Machine(10_000)
    answer = await propose(question(), machine.measure)
    assert answer.proposal is not None
    assert (answer.proposal.lora_rank, answer.proposal.micro_batch) == (64, 8)
    assert (answer.proposal.quantization, answer.proposal.gradient_checkpointing) == ("none", False)
    assert answer.proposal.line == Line(base_bytes=1800, bytes_per_rank=10, deviation=0.0)
    assert answer.proposal.examples_per_second == 16.0
    # Every level at the proposed micro-batch, and nothing twice or at another setting.
    assert machine.asked == [
        *((8, 1, "none", False), (64, 1, "none", False)),
        *((64, size, "none", False) for size in (2, 4, 8)),
        *((rank, 8, "none", False) for rank in (8, 16, 32)),
    ]


async def test_a_rank_between_tells_how_straight_the_line_is() -> None:
    answer = await propose(question(), Machine(10_000, bends_at=16).measure)
    assert answer.proposal is not None
    assert answer.proposal.line.deviation == pytest.approx(5 / (1800 + 160 + 5))


async def test_the_share_of_the_memory_is_kept_to_the_byte() -> None:
    # At one example: 1100 + 10 r; rank 64 takes 1740.
    for memory_bytes, rank in ((1740, 64), (1739, 32)):
        answer = await propose(question(checkpointings=(False,)), Machine(memory_bytes).measure)
        assert answer.proposal is not None
        assert answer.proposal.lora_rank == rank
    for memory_bytes, rank in ((2 * 1740, 64), (2 * 1739, 32)):
        asked = question(checkpointings=(False,), memory_share=0.5)
        answer = await propose(asked, Machine(memory_bytes).measure)
        assert answer.proposal is not None
        assert answer.proposal.lora_rank == rank


async def test_a_micro_batch_that_two_smaller_ones_say_is_too_large_is_not_tried() -> None:
    # At rank 64: 1640 + 100 m, so 2040 for four.
    machine = Machine(1900)
    answer = await propose(question(checkpointings=(False,)), machine.measure)
    assert answer.proposal is not None
    assert answer.proposal.micro_batch == 2
    assert [size for _, size, *_ in machine.asked] == [1, 1, 2, 2, 2, 2]


async def test_levels_that_the_line_says_are_too_large_are_not_tried() -> None:
    machine = Machine(1300)
    answer = await propose(question(checkpointings=(False,)), machine.measure)
    assert answer.proposal is not None
    assert answer.proposal.lora_rank == 16
    assert [rank for rank, *_ in machine.asked] == [8, 64, 16, 16]  # not 32; the last at two examples
    assert answer.proposal.micro_batch == 1


async def test_a_measurement_that_kills_its_trainer_costs_that_measurement_alone() -> None:
    answer = await propose(question(checkpointings=(False,)), Machine(10_000, dies_above=1500).measure)
    assert answer.proposal is not None
    assert (answer.proposal.lora_rank, answer.proposal.micro_batch) == (32, 1)
    assert [(f.lora_rank, f.micro_batch, f.reason) for f in answer.failures] == [
        (64, 1, "trainer_died"),
        (32, 2, "trainer_died"),
    ]


async def test_checkpointing_is_proposed_if_it_makes_room_for_a_larger_rank() -> None:
    answer = await propose(question(), Machine(1700).measure)
    assert answer.proposal is not None
    assert (answer.proposal.lora_rank, answer.proposal.gradient_checkpointing) == (64, True)
    assert answer.proposal.micro_batch == 2


async def test_a_quantised_base_is_proposed_only_if_nothing_fits_without() -> None:
    barely = await propose(question(), Machine(1200).measure)
    assert barely.proposal is not None
    assert (barely.proposal.lora_rank, barely.proposal.quantization) == (16, "none")
    machine = Machine(1000)
    smaller = await propose(question(), machine.measure)
    assert smaller.proposal is not None
    assert (smaller.proposal.lora_rank, smaller.proposal.quantization) == (32, "8bit")
    assert {quantization for _, _, quantization, _ in machine.asked} == {"none", "8bit"}


async def test_a_quantization_without_its_library_is_told_and_passed_over() -> None:
    answer = await propose(question(), Machine(1000, lacks="8bit").measure)
    assert answer.proposal is not None
    assert answer.proposal.quantization == "4bit"
    assert {failure.message for failure in answer.failures} == {"8bit: no such library"}


async def test_where_nothing_fits_there_is_no_proposal_but_all_that_was_tried() -> None:
    answer = await propose(question(), Machine(200).measure)
    assert answer.proposal is None
    assert [(m.quantization, m.gradient_checkpointing) for m in answer.measurements] == [
        (quantization, checkpointed) for quantization in ("none", "8bit", "4bit") for checkpointed in (False, True)
    ]


async def test_where_not_even_one_measurement_survives_the_machine_stays_unknown() -> None:
    answer = await propose(question(), Machine(10_000, dies_above=1).measure)
    assert (answer.machine, answer.proposal, len(answer.failures)) == (None, None, 6)


async def test_what_is_wrong_with_the_settings_ends_the_probe_at_once() -> None:
    machine = Machine(10_000, lacks="none")
    with pytest.raises(CannotMeasure, match="no such library"):
        await propose(question(), machine.measure)
    assert len(machine.asked) == 1


async def test_levels_wider_than_the_layers_are_left_out() -> None:
    answer = await propose(question(), Machine(10_000, largest_rank=20).measure)
    assert answer.levels == (8, 16)
    assert answer.proposal is not None
    assert answer.proposal.lora_rank == 16
    with pytest.raises(ConfigError, match="at most rank 4"):
        await propose(question(), Machine(10_000, largest_rank=4).measure)


async def test_a_single_level_gets_its_line_from_half_the_rank() -> None:
    machine = Machine(10_000)
    answer = await propose(question(levels=(8,), batch_size=1), machine.measure)
    assert [rank for rank, *_ in machine.asked] == [8, 4]
    assert answer.proposal is not None
    assert answer.proposal.line == Line(base_bytes=1100, bytes_per_rank=10, deviation=0.0)


async def test_rank_1_alone_has_a_flat_line() -> None:
    answer = await propose(question(levels=(1,), batch_size=1), Machine(10_000, largest_rank=1).measure)
    assert answer.proposal is not None
    assert answer.proposal.line == Line(base_bytes=1110, bytes_per_rank=0, deviation=0.0)


def test_micro_batches_are_powers_of_two_that_divide_the_batch() -> None:
    assert micro_batches(16, None) == (1, 2, 4, 8, 16)
    assert micro_batches(12, None) == (1, 2, 4)
    assert micro_batches(16, 6) == (1, 2, 4)
    assert micro_batches(7, None) == (1,)


def test_levels_by_default_are_the_largest_powers_of_two_and_the_global_rank() -> None:
    assert default_levels(64) == (4, 8, 16, 32, 64)
    assert default_levels(48) == (4, 8, 16, 32, 48)
    assert default_levels(3) == (1, 2, 3)
    assert default_levels(1) == (1,)
