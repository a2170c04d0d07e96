"""A whole federated round with five workers of unequal rank on one device: what of it is not training.

    python -m benchmarks.worker_round                                   a small model on the CPU, about a minute
    python -m benchmarks.worker_round --shape llama-3.2-3b --device cuda --dtype bfloat16 --steps 60 --tokens 512

Real processes over loopback: a coordinator, and five workers as `raflora worker` runs them. A round lasts from its
opening to the published adapter. Not training is what is left of it when the training seconds of its slowest worker
are taken away: slices made, sent and checked, factors read and sent, made durable, inspected and merged. The first
round is left out of the mean: in it every trainer does for the first time what later rounds repeat.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from raflora.v1 import status_pb2
from rich.console import Console

from benchmarks.worker_models import SHAPES, save_model
from benchmarks.worker_step import machine
from cli.local_federation import Files, run_federation
from cli.local_screen import LocalScreen
from cli.tables import open_table
from worker.trainer.quiet import silence_libraries

RANKS = (8, 16, 32, 48, 64)
EXAMPLES = 64  # of each site


@dataclass(frozen=True)
class Row:
    """One round."""

    round: int
    seconds: float
    training_seconds: float  # of the slowest worker
    aggregation_seconds: float
    sent_bytes: int
    received_bytes: int

    @property
    def share_not_training(self) -> float:
        """Of the round's time."""
        return 1.0 - self.training_seconds / self.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the federation and prints its rounds; with --out also writes JSON."""
    given = _parser().parse_args(arguments)
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        files = prepared(Path(folder), given)
        with LocalScreen(Console(stderr=True, markup=False, highlight=False)) as screen:
            story = asyncio.run(run_federation("raflora", files, screen))
    rows = [row_of(summary) for summary in story.rounds]
    _print(rows)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        rounds = [{**asdict(row), "share_not_training": row.share_not_training} for row in rows]
        content = {"setting": {**vars(given), "out": None}, "machine": machine(given.device), "rounds": rounds}
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def row_of(summary: status_pb2.RoundSummary) -> Row:
    """What a finished round says of itself."""
    return Row(
        round=summary.round,
        seconds=summary.training_seconds + summary.aggregation_seconds,
        training_seconds=max(contribution.training_seconds for contribution in summary.contributions),
        aggregation_seconds=summary.aggregation_seconds,
        sent_bytes=summary.bytes_sent,
        received_bytes=summary.bytes_received,
    )


def prepared(folder: Path, given: argparse.Namespace) -> Files:
    """Model, data and settings files of every process."""
    model = save_model(folder / "model", given.shape, given.device, getattr(torch, given.dtype))
    if given.device.startswith("cuda"):
        torch.cuda.empty_cache()
    words = Random(0)  # noqa: S311 - any text does
    lines = [json.dumps({"text": "".join(words.choices("abcdefgh ", k=given.tokens))}) for _ in range(EXAMPLES)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "federation.toml").write_text(_federation(folder, given), encoding="utf-8")
    workers = {f"rank-{rank}": folder / f"rank-{rank}.toml" for rank in RANKS}
    for rank in RANKS:
        workers[f"rank-{rank}"].write_text(_worker(folder, given, model, rank), encoding="utf-8")
    return Files(folder, folder / "federation.toml", workers)


def _federation(folder: Path, given: argparse.Namespace) -> str:
    targets = json.dumps(["all-linear"] if given.all_linear else ["q_proj", "v_proj"])
    return f"""\
name = "benchmark"
state_dir = "{folder}/coordinator-state"
log_format = "json"
server = {{ listen = "127.0.0.1:0" }}
model = {{ base_model = "{given.shape}", task = "causal-lm" }}
adapter = {{ target_modules = {targets}, global_rank = {max(RANKS)}, wire_dtype = "{given.dtype}" }}
training = {{ learning_rate = 1e-4, local_steps = {given.steps}, batch_size = {given.batch} }}

[rounds]
num_rounds = {given.rounds}
min_clients = {len(RANKS)}
evaluate_every = 0
round_deadline_seconds = 7200
"""


def _worker(folder: Path, given: argparse.Namespace, model: Path, rank: int) -> str:
    return f"""\
name = "rank-{rank}"
rank = {rank}
state_dir = "{folder}/rank-{rank}-state"
threads = 1
model = {{ path = "{model}", dtype = "{given.dtype}", device = "{given.device}", offline = true }}
data = {{ train = "{folder}/train.jsonl", format = "text", max_length = {given.tokens} }}
"""


def _print(rows: Sequence[Row]) -> None:
    table = open_table()
    for name in ("round", "seconds", "training", "not training", "merging", "down MB", "up MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.round),
            f"{row.seconds:.2f}",
            f"{row.training_seconds:.2f}",
            f"{row.share_not_training:.1%}",
            f"{row.aggregation_seconds:.2f}",
            f"{row.sent_bytes / 1e6:.1f}",
            f"{row.received_bytes / 1e6:.1f}",
        )
    console = Console()
    console.print(table)
    later = [row.seconds - row.training_seconds for row in rows[1:]]
    if later:
        mean = statistics.mean(later)
        console.print(
            f"not training: {mean:.2f} s a round without the first; of a one-minute task {mean / (60 + mean):.1%}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--all-linear", action="store_true", help="LoRA on every linear layer, not on q and v alone")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
