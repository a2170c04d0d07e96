"""`raflora evaluate`: standard benchmarks of an exported adapter, through lm-eval. Speaks to no coordinator."""

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt, UInt32
from rich.table import Table

from cli.errors import Failed
from cli.output import Format, print_screen
from cli.words import NOTHING, plain
from common.errors import ConfigError
from common.transfer import write_durably

if TYPE_CHECKING:
    from worker.trainer.benchmarks import Benchmark, Score

_NEEDED = ("torch", "peft", "lm_eval")


def evaluate(
    folder: Path,
    /,
    *,
    model: str,
    tasks: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    include_path: Path | None = None,
    num_fewshot: UInt32 | None = None,
    limit: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    revision: str = "main",
    chat: bool = False,
    offline: bool = False,
    out: Path | None = None,
    format: Format = "table",
) -> None:
    """Evaluates the adapter in FOLDER, which `raflora export` wrote, on benchmarks of lm-eval.

    --model is the base model: a local folder or a hub id (--revision pins it). --tasks are lm-eval's names, with
    commas or spaces between them; --include-path names a folder with task descriptions of your own, whose Python
    functions are run. --limit takes so many examples of each task: for a try, not for a figure to quote. --chat
    puts each question through the tokenizer's chat template. --offline touches no network: model and data sets must
    be on this machine. --out writes the scores as JSON too.
    """
    if any(find_spec(name) is None for name in _NEEDED):
        raise Failed('`raflora evaluate` needs lm-eval; install it with: pip install "raflora[evaluation]"')
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: is no folder")
    from worker.trainer.benchmarks import Benchmark, BenchmarkFailed, run_benchmark  # noqa: PLC0415 - needs torch

    benchmark = Benchmark(
        adapter=folder,
        base_model=model,
        tasks=_names_in(tasks),
        include_path=include_path,
        revision=revision,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        applies_chat_template=chat,
        offline=offline,
    )
    try:
        with redirect_stdout(sys.stderr):  # what libraries print is not the result
            scores = run_benchmark(benchmark)
    except BenchmarkFailed as error:
        raise Failed(str(error)) from None
    text = json.dumps(report_of(benchmark, scores), indent=2, allow_nan=False)
    if out is not None:
        write_durably(out.absolute(), (text + "\n").encode())
    if format == "json":
        print(text)
    else:
        print_screen(screen_of(benchmark, scores))


def _names_in(tasks: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for given in tasks for name in given.split(",") if name)
    if not names:
        raise ConfigError("--tasks: name at least one task of lm-eval, such as gsm8k")
    return names


def report_of(benchmark: "Benchmark", scores: "list[Score]") -> dict[str, Any]:
    """The scores for machines, with what was asked; a value that is no finite number is null."""
    return {
        "adapter": str(benchmark.adapter),
        "base_model": benchmark.base_model,
        "lm_eval": version("lm-eval"),
        "limit": benchmark.limit,
        "scores": [
            {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row}
            for row in (asdict(score).items() for score in scores)
        ],
    }


def screen_of(benchmark: "Benchmark", scores: "list[Score]") -> Table:
    """The scores for people."""
    limited = f", at most {benchmark.limit} examples of each task" if benchmark.limit else ""
    table = Table(title=f"{plain(str(benchmark.adapter))} on {plain(benchmark.base_model)}{limited}")
    for name in ("task", "metric", "filter"):
        table.add_column(name)
    for name in ("value", "± stderr", "few-shot", "examples"):
        table.add_column(name, justify="right")
    for score in scores:
        table.add_row(
            plain(score.task),
            plain(score.metric),
            plain(score.filter),
            f"{score.value:.4f}" if math.isfinite(score.value) else NOTHING,
            f"{score.stderr:.4f}" if score.stderr is not None and math.isfinite(score.stderr) else NOTHING,
            str(score.num_fewshot),
            str(score.num_examples),
        )
    return table
