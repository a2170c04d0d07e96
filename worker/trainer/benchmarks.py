"""Benchmarks of a finished adapter through lm-eval, on this machine: a base model with a PEFT folder on it, or merged.

Weights come from safetensors files only and no model's code is run. A task may load its data set from the hub;
nothing is sent anywhere, and nothing here knows a federation.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.errors import ConfigError, RafloraError
from worker.config import ModelConfig
from worker.trainer.quiet import silence_libraries

_SHOWN = 5  # names in an error message
_LONGEST_QUOTE = 300
_STDERR = "_stderr"


class BenchmarkFailed(RafloraError):
    """lm-eval could not do it; the message says what was wanted and what to do."""

    code = "FAILED_PRECONDITION"
    reason = "benchmark_failed"


@dataclass(frozen=True)
class Benchmark:
    """What to evaluate, on what, and how."""

    folder: Path  # of an adapter, as PEFT has it, or of a whole model
    base_model: str  # a local folder or a hub id; empty: `folder` is a whole model
    tasks: tuple[str, ...]  # lm-eval's names, also of groups
    include_path: Path | None = None  # a folder with tasks of one's own
    base_model_digest: str = ""  # that its weights must have; empty: not known
    revision: str | None = None  # of the base model
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 8
    num_fewshot: int | None = None  # None: what each task says
    limit: int | None = None  # examples of each task; None: all
    applies_chat_template: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    filter: str  # how the answer was taken out of the text ("strict-match"); "none": as it is
    value: float
    stderr: float | None
    num_fewshot: int
    num_examples: int


def run_benchmark(benchmark: Benchmark) -> list[Score]:
    """All scores, in the tasks' order; seeds are lm-eval's own. Raises ConfigError or BenchmarkFailed."""
    _set_up_libraries(offline=benchmark.offline)
    import lm_eval.evaluator  # noqa: PLC0415 # seconds, and only after the network is closed

    # It asks git which commit the working folder is at, which says nothing here, and git may complain aloud.
    lm_eval.evaluator.get_git_commit_hash = lambda: None

    device = _device_of(benchmark)
    manager = _manager_of(benchmark)
    base = _base_folder(benchmark)
    try:
        results = lm_eval.simple_evaluate(
            model=_model_of(benchmark, base, device),
            tasks=list(benchmark.tasks),
            task_manager=manager,
            num_fewshot=benchmark.num_fewshot,
            limit=benchmark.limit,
            apply_chat_template=benchmark.applies_chat_template,
            log_samples=False,
        )
    except Exception as error:
        # lm-eval, transformers and peft raise whatever they meet; to the caller all mean the same.
        raise BenchmarkFailed(
            f"lm-eval could not evaluate {benchmark.folder} on {benchmark.base_model or 'its own'}: {_quote(error)}"
        ) from error
    return _scores_of(results)


def _base_folder(benchmark: Benchmark) -> Path:
    """Where the weights below the adapter lie, or the whole model's. Raises ConfigError if they are other weights."""
    from worker.trainer.base_model import digest_of_weights, resolve_folder  # noqa: PLC0415
    from worker.trainer.task import ModelError  # noqa: PLC0415

    if not benchmark.base_model:
        return benchmark.folder
    config = ModelConfig(path=benchmark.base_model, revision=benchmark.revision, offline=benchmark.offline)
    try:
        folder = resolve_folder(config)
        found = digest_of_weights(folder) if benchmark.base_model_digest else ""
    except ModelError as error:
        raise ConfigError(f"--model {error}") from None
    if found != benchmark.base_model_digest:
        raise ConfigError(
            f"--model {benchmark.base_model}: its weights have the digest {found}, but the adapter in "
            f"{benchmark.folder} was trained on {benchmark.base_model_digest}; name that very model (--revision pins "
            "a commit of the hub)"
        )
    return folder


def _set_up_libraries(*, offline: bool) -> None:
    import datasets  # noqa: PLC0415
    from huggingface_hub import constants  # noqa: PLC0415

    if offline:
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    silence_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task leaves alone


def _manager_of(benchmark: Benchmark) -> Any:
    """Knows the tasks, and has read their data once: who mistypes a name need not wait for the model."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    own = None if benchmark.include_path is None else str(benchmark.include_path)
    manager = TaskManager(include_path=own, include_defaults=False) if own else None
    if manager is None or not _knows(manager, benchmark.tasks):
        manager = TaskManager(include_path=own)  # reads 15,000 descriptions
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    for task in benchmark.tasks:
        if task not in known:
            close = ", ".join(get_close_matches(task, known, n=_SHOWN)) or "`lm_eval ls tasks` lists them"
            raise ConfigError(f"--tasks {task}: lm-eval knows no such task; close to it: {close}")
        try:
            manager.load([task])
        except Exception as error:
            # datasets and the hub raise their own errors, the network's and plain ones.
            advice = (
                "with --offline its data set must be on this machine: run once without it, or name a task of your own "
                "with --include-path"
                if benchmark.offline
                else "its data set could not be had, or its description is wrong"
            )
            raise BenchmarkFailed(f"--tasks {task}: {advice}: {_quote(error)}") from error
    return manager


def _model_of(benchmark: Benchmark, folder: Path, device: str) -> Any:
    """The model in `folder`, with the adapter on it unless it is merged, as lm-eval takes it.

    Not by lm-eval's own `peft=`: that cuts the vocabulary to the tokenizer's size, which changes every likelihood.
    """
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    fixed: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=benchmark.dtype, use_safetensors=True, **fixed)
    if benchmark.base_model:
        model = PeftModel.from_pretrained(model, str(benchmark.folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, **fixed)
    return HFLM(pretrained=model.to(device), tokenizer=tokenizer, batch_size=benchmark.batch_size)


def _knows(manager: Any, tasks: Sequence[str]) -> bool:
    return {*manager.all_tasks, *manager.all_groups, *manager.all_tags}.issuperset(tasks)


def _device_of(benchmark: Benchmark) -> str:
    """lm-eval takes another device without a word if it does not know the one it is given."""
    import torch  # noqa: PLC0415

    if benchmark.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", "cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if benchmark.device not in known or (benchmark.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {benchmark.device}: torch sees {torch.cuda.device_count()} GPU(s) here")
    return benchmark.device


def _scores_of(results: Any) -> list[Score]:
    scores = []
    for task, measured in {**results["results"], **results.get("groups", {})}.items():
        for key, value in measured.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith(_STDERR) or not isinstance(value, int | float):
                continue
            stderr = measured.get(f"{metric}{_STDERR},{chosen}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=chosen,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    num_fewshot=int(results.get("n-shot", {}).get(task) or 0),
                    num_examples=int(results.get("n-samples", {}).get(task, {}).get("effective") or 0),
                )
            )
    return scores


def _quote(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_QUOTE]}"
