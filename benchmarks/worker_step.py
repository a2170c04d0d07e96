"""What a worker's training step costs beside a bare PEFT loop of the same model, and what each rank takes.

    python -m benchmarks.worker_step                                   a small model on the CPU, about a minute
    python -m benchmarks.worker_step --shape llama-3.2-3b --device cuda --dtype bfloat16 --batch 8 --tokens 512 \
        --ranks 8 16 32 48 64 --quantization none 4bit                 on a GPU

Both sides train the same LoRA factors (q_proj, v_proj) in float32 on the same tokens with AdamW, clipped gradients and
the same autocast, in one process and in turn; a step is the median of its run after the warm-up, a ratio the median of
the turns' ratios. The bare loop is the plainest that is right: forward with labels, backward, clip, step. Peak memory
is of the worker's own steps (a GPU: what torch reserves; a CPU: what the process has resident, with both models in it).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from benchmarks.worker_models import SHAPES, save_model
from cli.tables import open_table
from common.adapter import initial_adapter
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer.dry_run import WARM_UP_STEPS, Bench, load_bench, measure
from worker.trainer.model import write_adapter
from worker.trainer.quiet import silence_libraries
from worker.trainer_protocol import DryRun, ModelOrder

TARGETS = ("q_proj", "v_proj")
MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1e-4
SWAPS = 10
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark."""

    shape: str
    device: str
    dtype: str
    quantization: str
    batch: int
    tokens: int
    steps: int  # of one measurement, after the warm-up
    turns: int


@dataclass(frozen=True)
class Row:
    """What was measured at one rank."""

    quantization: str
    lora_rank: int
    step_seconds: float
    tokens_per_second: float
    bare_step_seconds: float
    ratio: float  # ours over the bare loop
    ratio_low: float
    ratio_high: float
    peak_bytes: int
    swap_seconds: float  # from another rank to this one


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; with --out also writes JSON."""
    given = _parser().parse_args(arguments)
    silence_libraries()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=CONSOLE, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(given.shape, total=len(given.quantization) * len(given.ranks))
        model = save_model(Path(folder) / "model", given.shape, given.device, getattr(torch, given.dtype))
        for quantization in given.quantization:
            setting = Setting(
                given.shape,
                given.device,
                given.dtype,
                quantization,
                given.batch,
                given.tokens,
                given.steps,
                given.turns,
            )
            for row in measured(setting, model, given.ranks):
                rows.append(row)
                bar.advance(task)
    _print(rows)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "setting": {**vars(given), "out": None},
            "machine": machine(given.device),
            "rows": list(map(asdict, rows)),
        }
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def machine(device: str) -> dict[str, str]:
    """Where and when."""
    name = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "python": platform.python_version(),
        **packages,
    }


def measured(setting: Setting, folder: Path, ranks: Sequence[int]) -> list[Row]:
    """A row for each rank."""
    config = WorkerConfig(
        rank=max(ranks),
        model=ModelConfig(
            path=str(folder),
            dtype=setting.dtype,  # type: ignore[arg-type] # argparse has checked the words
            device=setting.device,
            quantization=setting.quantization,  # type: ignore[arg-type]
            offline=True,
        ),
        data=DataConfig(train="none", max_length=setting.tokens),
    )
    bench = load_bench(config, _order(max(ranks)))
    return [_row(setting, bench, folder, rank) for rank in ranks]


def _order(rank: int) -> ModelOrder:
    return ModelOrder("causal-lm", (), TARGETS, (), rank, 0)


def _row(setting: Setting, bench: Bench, folder: Path, rank: int) -> Row:
    run = DryRun("", _order(rank), lora_rank=rank, micro_batch=setting.batch, steps=setting.steps + WARM_UP_STEPS)
    swap_seconds = _swap_seconds(bench, rank)
    bare = bare_loop(setting, folder, rank, bench)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(setting.turns):
        ours.append(measure(bench, run, lambda *_: None).seconds)
        theirs.append(bare(setting.steps + WARM_UP_STEPS))
    del bare
    alone = measure(bench, run, lambda *_: None)
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    step = statistics.median(ours)
    return Row(
        quantization=setting.quantization,
        lora_rank=rank,
        step_seconds=step,
        tokens_per_second=setting.batch * setting.tokens / step,
        bare_step_seconds=statistics.median(theirs),
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        peak_bytes=alone.peak_bytes,
        swap_seconds=swap_seconds,
    )


def bare_loop(setting: Setting, folder: Path, rank: int, bench: Bench) -> Callable[[int], float]:
    """A PEFT model of its own; the returned function trains so many steps and tells the median of one."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - after worker.trainer, which quietens what it imports

    model = get_peft_model(_base(setting, folder), LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    example = torch.tensor([bench.example["input_ids"]] * setting.batch, device=setting.device)
    is_half = setting.dtype != "float32"

    def train(steps: int) -> float:
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        model.train()
        seconds: list[float] = []
        for _ in range(steps):
            started = time.perf_counter()
            with torch.autocast(setting.device.partition(":")[0], dtype=getattr(torch, setting.dtype), enabled=is_half):
                loss = model(input_ids=example, labels=example).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # as every training loop reads its loss; waits for the device
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[WARM_UP_STEPS:])

    return train


def _base(setting: Setting, folder: Path) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, setting.dtype), "local_files_only": True}
    if setting.quantization == "none":
        return AutoModelForCausalLM.from_pretrained(folder, **options).to(setting.device)
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 - an extra

    is_four = setting.quantization == "4bit"
    quantization = BitsAndBytesConfig(
        load_in_4bit=is_four,
        load_in_8bit=not is_four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, setting.dtype),
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": setting.device}, **options
    )


def _swap_seconds(bench: Bench, rank: int) -> float:
    """The median time to make the live adapter one of this rank, coming from another."""
    adapter, other = (initial_adapter(bench.model.spec, r, 0) for r in (rank, max(1, rank // 2)))
    seconds: list[float] = []
    for _ in range(SWAPS):
        write_adapter(bench.model, other, scaling=1.0)
        started = time.perf_counter()
        write_adapter(bench.model, adapter, scaling=1.0)
        if bench.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _print(rows: Sequence[Row]) -> None:
    table = open_table()
    for name in ("base", "rank", "step ms", "tokens/s", "bare ms", "ours / bare", "peak MiB", "swap ms"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.quantization,
            str(row.lora_rank),
            f"{1e3 * row.step_seconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{1e3 * row.bare_step_seconds:.1f}",
            f"{row.ratio:.3f} ({row.ratio_low:.3f}-{row.ratio_high:.3f})",
            f"{row.peak_bytes / 2**20:,.0f}",
            f"{1e3 * row.swap_seconds:.1f}",
        )
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", nargs="+", choices=["none", "8bit", "4bit"], default=["none"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
