"""`raflora evaluate`: standard benchmarks of an exported adapter, through lm-eval. Speaks to no coordinator."""

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt, UInt32
from rich.table import Table

from cli.errors import Failed
from cli.export_card import is_hub_id
from cli.export_origin import RECORD_FILE, Origin, read_origin
from cli.output import Format, print_screen
from cli.words import NOTHING, plain
from common.errors import ConfigError
from common.transfer import write_durably
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from worker.trainer.benchmarks import Benchmark, Score

_NEEDED = ("torch", "peft", "lm_eval")
_MODEL_CONFIG = "config.json"
_LANGUAGE_MODEL = "causal-lm"


@Parameter(name="*")
@dataclass(frozen=True)
class Base:
    """The base model under the adapter, and how it is loaded."""

    model: str | None = None
    """A local folder or a hub id: the very model that was trained on; unset: the one that raflora.json names."""
    revision: str | None = None
    """A hub commit of it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in memory; auto: as their files have it."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; auto takes a GPU if there is one."""
    offline: bool = False
    """Touch no network: model and data sets must be on this machine."""


@Parameter(name="*")
@dataclass(frozen=True)
class Asking:
    """How the tasks are asked."""

    include_path: Path | None = None
    """A folder with task descriptions of your own, whose Python functions are run."""
    num_fewshot: UInt32 | None = None
    """Solved examples before each question; unset: what each task says."""
    limit: PositiveInt | None = None
    """So many examples of each task: for a try, not for a figure to quote."""
    batch_size: PositiveInt = 8
    """Examples at one time."""
    chat: bool = False
    """Put each question through the tokenizer's chat template."""


def evaluate(
    folder: Annotated[Path, Parameter(help="An adapter or a merged model that `raflora export` wrote.")],
    /,
    *,
    tasks: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, help="lm-eval's names, also of groups, with commas or spaces between them."),
    ],
    base: Base = Base(),
    asking: Asking = Asking(),
    out: Annotated[Path | None, Parameter(help="A file that gets the scores as JSON, too.")] = None,
    format: Annotated[Format, Parameter(help="What is printed.")] = "table",
) -> None:
    """Evaluates what `raflora export` wrote into FOLDER on benchmarks of lm-eval.

    The base model must have the weights that the folder's raflora.json names: their digest is compared. A merged
    model needs none.
    """
    if any(find_spec(name) is None for name in _NEEDED):
        raise Failed('`raflora evaluate` needs lm-eval; install it with: pip install "raflora[evaluation]"')
    if asking.include_path is not None and not asking.include_path.is_dir():
        raise ConfigError(f"--include-path {asking.include_path}: is no folder")
    names = _names_in(tasks)
    origin = _origin_of(folder)
    base_model = _base_of(folder, origin, base)
    from worker.trainer.benchmarks import Benchmark, BenchmarkFailed, run_benchmark  # noqa: PLC0415 - needs torch

    benchmark = Benchmark(
        folder=folder,
        base_model=base_model,
        base_model_digest=origin.base_model_digest if origin is not None and base_model else "",
        tasks=names,
        include_path=asking.include_path,
        revision=base.revision,
        dtype=base.dtype,
        device=base.device,
        batch_size=asking.batch_size,
        num_fewshot=asking.num_fewshot,
        limit=asking.limit,
        applies_chat_template=asking.chat,
        offline=base.offline,
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


def _origin_of(folder: Path) -> Origin | None:
    """What the folder says of itself; None for a PEFT folder of somebody else. Raises ConfigError."""
    if not (folder / RECORD_FILE).is_file():
        return None
    origin = read_origin(folder)
    if origin.task != _LANGUAGE_MODEL:
        raise ConfigError(
            f"{folder}: its task is {origin.task!r}, and lm-eval evaluates language models ({_LANGUAGE_MODEL!r}) only"
        )
    return origin


def _base_of(folder: Path, origin: Origin | None, base: Base) -> str:
    """A folder or a hub id, empty for a merged model. Raises ConfigError if it cannot be told."""
    if _is_merged(folder):
        if base.model or base.revision:
            raise ConfigError(f"{folder}: is a whole model with the adapter in it; leave --model and --revision out")
        return ""
    if origin is None:
        if not base.model:
            raise ConfigError(f"{folder}: has no {RECORD_FILE} that names the base model; give --model BASE")
        print(
            f"warning: {plain(str(folder))} has no {RECORD_FILE}, so nobody can tell whether it was trained on "
            f"{plain(base.model)}",
            file=sys.stderr,
        )
        return base.model
    named = base.model or origin.base_model
    if not base.model and not is_hub_id(named) and not Path(named).is_dir():
        raise ConfigError(
            f"{folder}: was trained on {plain(named)!r}, which is neither a folder here nor a hub id; give --model BASE"
        )
    return named


def _is_merged(folder: Path) -> bool:
    """Whether it is a model of its own. Raises ConfigError if it is no adapter either."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if len(missing) == 2 and (folder / _MODEL_CONFIG).is_file():
        return True
    if missing:
        raise ConfigError(
            f"{folder}: neither an adapter ({' and '.join(missing)} missing) nor a merged model (with "
            f"{_MODEL_CONFIG}); `raflora export FOLDER` writes either"
        )
    return False


def report_of(benchmark: "Benchmark", scores: "list[Score]") -> dict[str, Any]:
    """The scores for machines, with what was asked; a value that is no finite number is null."""
    return {
        "folder": str(benchmark.folder),
        "base_model": benchmark.base_model or None,
        "base_model_digest": benchmark.base_model_digest or None,
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
    on = f" on {plain(benchmark.base_model)}" if benchmark.base_model else ", merged"
    table = Table(title=f"{plain(str(benchmark.folder))}{on}{limited}")
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
