"""What counts as out of memory; the rest of the trainer is met as a process in test_trainer_process.py."""

import pytest
import torch

from worker.trainer import is_out_of_memory

pytestmark = pytest.mark.torch


def test_torchs_own_complaint_about_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_errors_of_memory_are_known_by_their_type(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 must have the same dtype"), ValueError("memory")])
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
