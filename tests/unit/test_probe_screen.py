"""What `raflora probe` says of what it measured."""

from pathlib import Path

import pytest

from cli.probe_screen import Report, as_json
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.measurement import Measurement, Probe, Proposal, line_through
from worker.proposal import Answer, Question

MIB = 1 << 20


def proposed(folder: Path, peaks: dict[int, int]) -> str:
    """The sentence about the proposal, from peak memory in MiB at each rank."""
    measured = tuple(
        Measurement(lora_rank=rank, micro_batch=2, peak_bytes=peak * MIB, seconds_per_step=0.5)
        for rank, peak in peaks.items()
    )
    line, rank = line_through(measured), max(peaks)
    proposal = Proposal(lora_rank=rank, micro_batch=2, examples_per_second=4.0, line=line)
    settings = WorkerConfig(state_dir=folder, model=ModelConfig(path="x"), data=DataConfig(train="x.csv"))
    question = Question(tuple(peaks), 2, None, ("none",), (False,), 0.9)
    probe = Probe(
        base_model_digest="ab" * 32,
        task="causal-lm",
        target_modules=("q_proj",),
        modules_to_save=(),
        lora_dropout=0.0,
        batch_size=2,
        max_length=32,
        dtype="auto",
        memory_batch=None,
        device="cpu",
        memory_bytes=8192 * MIB,
        memory_share=0.9,
        measurements=measured,
        proposal=proposal,
    )
    advice = as_json(Report(settings, question, Answer(None, tuple(peaks), measured, (), proposal), probe))["advice"]
    assert isinstance(advice, list)
    return str(advice[0])


@pytest.mark.parametrize(
    "peaks",
    [
        {8: 300, 64: 300},  # nothing
        {8: 305, 64: 300},  # less than nothing
        {8: 300, 32: 310, 64: 304},  # 4 MiB in all, and off by more between
    ],
)
def test_a_slope_out_of_noise_is_not_told_as_a_figure(tmp_path: Path, peaks: dict[int, int]) -> None:
    said = proposed(tmp_path, peaks)
    assert said.endswith("MiB, and what one more rank takes is below what this measurement can tell")
    assert "0 B" not in said


def test_a_slope_that_was_measured_is_told(tmp_path: Path) -> None:
    assert proposed(tmp_path, {8: 300, 64: 356}).endswith("; 292.0 MiB and 1.0 MiB more for every rank")
    said = proposed(tmp_path, {8: 300, 32: 327, 64: 356})
    assert said.endswith("; 292.0 MiB and 1.0 MiB more for every rank, between them off by at most 0.9 %")
