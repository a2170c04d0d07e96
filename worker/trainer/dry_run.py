"""What a training step takes at a rank: memory and time of real steps on made-up examples of the model's true shape.

The steps go through worker.trainer.training like any round's. No record of this site is read, and nothing that is
trained here is kept.
"""

import ctypes
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.adapter import initial_adapter
from common.errors import InvalidRequest
from worker.config import WorkerConfig
from worker.trainer.data import Example
from worker.trainer.fitting import free_memory
from worker.trainer.model import AdaptedModel, load_model, write_adapter
from worker.trainer.task import Collator, longest_input, tokenizer_in
from worker.trainer.training import Report, train
from worker.trainer_protocol import DryRun, ModelOrder, Plan

WARM_UP_STEPS = 2  # the first allocates, the second may still choose kernels
_SEED = 0
_KIBI = 1024
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of the kernel's proc(5): the peak of the resident memory becomes what is resident now


@dataclass(frozen=True)
class Bench:
    """A base model with LoRA on it, and one example as long as any that it will see."""

    model: AdaptedModel
    collator: Collator
    example: Example


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes."""

    peak_bytes: int
    seconds: float


def load_bench(config: WorkerConfig, order: ModelOrder) -> Bench:
    """Loads the base model as training would, and no data. Raises ModelError."""
    model = load_model(config.model, order)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config.data)
    bench = Bench(model, preparation.collator, longest_example(model, config.data.max_length))
    # What only the first step of a process does (imports, kernels) is no part of any measurement.
    _train(bench, DryRun("", order, lora_rank=model.rank, micro_batch=1, steps=1), _ignore)
    return bench


def measure(bench: Bench, run: DryRun, report: Report) -> Step:
    """Trains `run.steps` batches of `run.micro_batch` at `run.lora_rank`; the median of the time after warm-up.

    Raises InvalidRequest for fewer steps than WARM_UP_STEPS + 1, and whatever training raises (out of memory).
    """
    if run.steps <= WARM_UP_STEPS:
        raise InvalidRequest(f"dry run: {run.steps} steps; more than the {WARM_UP_STEPS} of warm-up are needed")
    write_adapter(bench.model, initial_adapter(bench.model.spec, run.lora_rank, _SEED), scaling=1.0)
    ends: list[float] = []

    def note(step: int, total_steps: int, train_loss: float) -> None:
        if step > len(ends):
            ends.append(time.perf_counter())
        report(step, total_steps, train_loss)

    memory = _PeakMemory(bench.model.device)
    _train(bench, run, note)
    seconds = statistics.median(np.diff(ends[WARM_UP_STEPS - 1 :]).tolist())
    return Step(memory.peak_bytes(), seconds)


def _train(bench: Bench, run: DryRun, report: Report) -> None:
    train(
        bench.model,
        [bench.example] * (run.steps * run.micro_batch),
        _plan(run),
        collator=bench.collator,
        memory_batch=run.micro_batch,
        report=report,
    )


def _ignore(step: int, total_steps: int, train_loss: float) -> None:
    """Nobody waits for the first step."""


def longest_example(model: AdaptedModel, max_length: int) -> Example:
    """One example of the largest shape that this model takes under these settings; its content is random."""
    base, config = model.base, model.base.config
    generator = np.random.default_rng(_SEED)
    match base.main_input_name:
        case "input_ids":
            words, length = config.get_text_config().vocab_size, _most_tokens(model, max_length)
            tokens = generator.integers(0, words, length).tolist()
            labels = list(tokens) if model.task.name == "causal-lm" else 0
            return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
        case "pixel_values":
            height, width = _pair(config.image_size)
            pixels = generator.standard_normal((config.num_channels, height, width), dtype=np.float32)
            return {"pixel_values": torch.from_numpy(pixels), "labels": 0}
        case "features":
            shape = (max_length, config.hidden_size) if config.num_hidden_layers else (config.hidden_size,)
            return {"features": generator.standard_normal(shape, dtype=np.float32), "labels": 0}
        case other:
            raise InvalidRequest(f"dry run: {type(base).__name__} takes {other!r}, of which no example can be made up")


class _PeakMemory:
    """The most memory that is taken from now on: of a GPU what torch reserves, else what the process has resident.

    What the driver itself keeps on a GPU (some hundred megabytes) is in neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free_memory()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _give_back_freed_memory()
            _forget_peak()

    def peak_bytes(self) -> int:
        """So far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._device))
        return _resident_peak_bytes()


def _give_back_freed_memory() -> None:
    """Otherwise what a larger measurement before freed would still count as resident."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _forget_peak() -> None:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        # Some sandboxes forbid it. The peak is then that of the process's whole life: never too small, perhaps too
        # large, as loading the model counts too.
        print("dry run: this system does not forget a peak; memory may be measured too large", file=sys.stderr)


def _resident_peak_bytes() -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        raise InvalidRequest("dry run: without a GPU memory is measured through /proc, which is not here") from None
    return int(kibibytes) * _KIBI


def _plan(run: DryRun) -> Plan:
    # At a learning rate of 0 the optimizer does all of its work, and no number runs away.
    return Plan(
        learning_rate=0.0,
        local_steps=run.steps,
        local_epochs=0.0,
        batch_size=run.micro_batch,
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=0,
        seed=_SEED,
        lora_dropout=run.lora_dropout,
    )


def _most_tokens(model: AdaptedModel, max_length: int) -> int:
    """As many as a text is cut to: by the settings, by the tokenizer, by the model's positions."""
    return int(min(max_length, longest_input(model.base), tokenizer_in(model.folder).model_max_length))


def _pair(size: Any) -> tuple[int, int]:
    """An image's height and width, however the configuration spells them."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
