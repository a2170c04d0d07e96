"""`raflora probe`: measures what training takes on this machine and proposes a rank. Reads no record of the site."""

import json
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from cli.errors import ExitCode, Failed
from cli.output import Format, print_screen
from cli.probe_federation import asked_by_coordinator, asked_in
from cli.probe_screen import ProbeScreen, Report, as_json, screen_of
from common.errors import BaseModelMismatch, ConfigError
from common.logs import set_up_logs
from common.settings import load_settings
from worker import forms, policy
from worker.config import WorkerConfig
from worker.identity import holding
from worker.measurement import FILE_NAME, Attempt, Probe, Quantization, write_probe
from worker.messages import Welcome
from worker.policy_file import with_policy_file
from worker.proposal import MAX_LEVELS, Answer, CannotMeasure, Question, default_levels, propose
from worker.supervisor import TaskFailed, TrainerDied, TrainerProcess
from worker.trainer_protocol import DryRun, DryRunDone, ModelOrder

MIN_STEPS = 3  # two of them are warm-up
DEFAULT_MEMORY_SHARE = 0.9  # if a coordinator does not tell its own
_QUANTIZATIONS: tuple[Quantization, ...] = ("none", "8bit", "4bit")

Choice = TypeVar("Choice")


@Parameter(name="*")
@dataclass(frozen=True)
class Measuring:
    """What is measured, and against which bound."""

    levels: str = ""
    """Ranks to choose from, as in 8,16,32,64; unset: the operator's levels, or powers of two up to the global rank."""
    batch_size: PositiveInt | None = None
    """Examples an optimizer step; unset: the federation's."""
    memory_share: PositiveFloat | None = None
    """Of the device's memory that a step may take; unset: the operator's ranks.memory_share."""
    steps: int = 5
    """Training steps a measurement; the first two are warm-up."""


async def probe(
    *,
    config: Annotated[Path | None, Parameter(help="The worker's settings file.")] = None,
    federation: Annotated[Path | None, Parameter(help="The operator's federation.toml, instead of asking.")] = None,
    coordinator: Annotated[str | None, Parameter(help="HOST:PORT to ask; unset: as the settings say.")] = None,
    measuring: Measuring = Measuring(),
    timeout_seconds: Annotated[PositiveFloat, Parameter(name="--timeout", help="For the coordinator.")] = 30.0,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")] = (),
    format: Format = "table",
) -> int:
    """Measures training steps on this machine with made-up examples; proposes rank, micro-batch and quantization.

    Writes probe.json into the worker's state_dir: a worker with rank = 0 takes its rank from there, and the
    coordinator learns what was measured when the worker joins. Stop the worker first. Exit code 1 if no rank fits.
    """
    address = () if coordinator is None else (f"coordinator.address={coordinator}",)
    settings = load_settings(WorkerConfig, config, overrides=(*set_, *address))
    _check(settings, measuring)
    set_up_logs("text", "warning")
    settings = with_policy_file(settings)
    with holding(settings.state_dir):
        welcome = asked_in(federation) if federation else await asked_by_coordinator(settings, timeout_seconds)
        forms.check_welcome(welcome)
        policy.check_welcome(settings.policy, welcome)
        question = _question(settings, welcome, measuring)
        with ProbeScreen() as screen:
            trainer = TrainerProcess(settings.policy.max_task_seconds)
            answer = await measured(Bench(settings, welcome, measuring.steps, trainer), question, screen)
        found = Report(settings, question, answer, _kept(settings, welcome, question, answer))
    if format == "json":
        print(json.dumps(as_json(found), indent=2))
    else:
        print_screen(screen_of(found))
    return ExitCode.OK if answer.proposal is not None else ExitCode.FAILED


def _check(settings: WorkerConfig, measuring: Measuring) -> None:
    """Raises ConfigError or Failed for what cannot be measured."""
    if measuring.steps < MIN_STEPS:
        raise ConfigError(f"--steps {measuring.steps}: at least {MIN_STEPS}, as two are warm-up")
    if measuring.memory_share is not None and measuring.memory_share > 1:
        raise ConfigError(f"--memory-share {measuring.memory_share:g}: a share of the memory, so at most 1")
    if settings.evaluator:
        raise ConfigError("evaluator = true: an evaluator trains nothing, so there is no rank to propose")
    if settings.launch.shard_base:
        raise ConfigError(
            "launch.shard_base: the probe measures one process with the whole base, which is not what will train; "
            "set rank and batch_size in worker.toml by hand, small ones first"
        )
    if find_spec("torch") is None or find_spec("peft") is None:
        raise Failed('`raflora probe` needs torch and peft; install them with: pip install "raflora[worker]"')


def _question(settings: WorkerConfig, welcome: Welcome, measuring: Measuring) -> Question:
    batch_size = measuring.batch_size or welcome.batch_size
    if not batch_size:
        raise ConfigError("the coordinator is of a version that does not tell its batch size; give --batch-size N")
    return Question(
        levels=_levels(settings, welcome, measuring.levels),
        batch_size=_share_of_one_process(batch_size, settings.launch.processes),
        memory_batch=settings.batch_size,
        quantizations=_open(settings, "quantization", _QUANTIZATIONS, settings.model.quantization),
        checkpointings=_open(settings, "gradient_checkpointing", (False, True), settings.model.gradient_checkpointing),
        memory_share=measuring.memory_share or welcome.memory_share or DEFAULT_MEMORY_SHARE,
    )


def _share_of_one_process(batch_size: int, processes: int) -> int:
    """The processes of a group share every batch evenly, each on a GPU of its own; one of them is measured."""
    return batch_size // processes if batch_size % processes == 0 else batch_size


def _open(settings: WorkerConfig, key: str, choices: tuple[Choice, ...], chosen: Choice) -> tuple[Choice, ...]:
    """All choices, unless the site has made its own."""
    return (chosen,) if key in settings.model.model_fields_set else choices


def _levels(settings: WorkerConfig, welcome: Welcome, wanted: str) -> tuple[int, ...]:
    """The ranks to choose from, ascending, within what the federation and the site allow. Raises ConfigError."""
    most = min(welcome.model.global_rank, settings.policy.max_rank)
    if not wanted:
        levels = welcome.rank_levels or default_levels(most)
    else:
        try:
            levels = tuple(sorted({int(level) for level in wanted.split(",")}))
        except ValueError:
            raise ConfigError(
                f"--levels {wanted}: ranks with commas between them are expected, as in 8,16,32"
            ) from None
    allowed = tuple(level for level in levels if 1 <= level <= most)
    if not allowed:
        raise ConfigError(
            f"levels {list(levels)}: none is from 1 to {most} (the federation's global rank is "
            f"{welcome.model.global_rank}, this site's policy.max_rank {settings.policy.max_rank})"
        )
    if len(allowed) > MAX_LEVELS:
        raise ConfigError(f"levels: {len(allowed)} of them; at most {MAX_LEVELS} are measured; choose with --levels")
    return allowed


@dataclass(frozen=True)
class Bench:
    """What is measured with."""

    settings: WorkerConfig
    welcome: Welcome
    steps: int
    trainer: TrainerProcess


async def measured(bench: Bench, question: Question, screen: ProbeScreen) -> Answer:
    """The answer, measured in trainer processes: what does not fit ends one of them and not the probe.

    Raises TaskFailed if nothing can be measured at all, BaseModelMismatch, PolicyRefused or ConfigError.
    """
    settings, model = bench.settings, bench.welcome.model
    order = ModelOrder(
        model.task, model.labels, model.target_modules, model.modules_to_save, question.levels[0], model.seed
    )

    async def measure(attempt: Attempt) -> DryRunDone:
        chosen = {"quantization": attempt.quantization, "gradient_checkpointing": attempt.gradient_checkpointing}
        tried = settings.model_copy(update={"model": settings.model.model_copy(update=chosen), "log_level": "warning"})
        request = DryRun(
            tried.model_dump_json(),
            order,
            attempt.lora_rank,
            attempt.micro_batch,
            bench.steps,
            bench.welcome.lora_dropout,
        )
        screen.begun(attempt)
        try:
            done = await bench.trainer.dry_run(request, screen.moved)
        except TaskFailed as error:
            screen.failed(attempt, str(error))
            raise CannotMeasure(error.word, str(error)) from None
        except TrainerDied as error:
            screen.failed(attempt, str(error))
            raise CannotMeasure(error.reason, str(error)) from None
        screen.measured(attempt, done)
        _check_base_model(settings, bench.welcome, done.base_model_digest)
        return done

    try:
        return await propose(question, measure)
    except CannotMeasure as error:
        raise TaskFailed(error.word, str(error)) from None
    finally:
        await bench.trainer.stop()


def _check_base_model(settings: WorkerConfig, welcome: Welcome, digest: str) -> None:
    """Raises BaseModelMismatch or PolicyRefused before anything else is measured on the wrong weights."""
    wanted = welcome.model.base_model_digest
    if wanted and digest != wanted:
        raise BaseModelMismatch(
            f"model.path {settings.model.path} holds the base model {digest[:12]}, but the federation "
            f"{welcome.federation} trains {wanted[:12]} ({welcome.model.base_model})"
        )
    policy.check_base_model(settings.policy, digest, "model.path")


def _kept(settings: WorkerConfig, welcome: Welcome, question: Question, answer: Answer) -> Probe | None:
    """The file, written; None if nothing could be measured, and then no file of an earlier probe stays either."""
    if answer.machine is None:
        with suppress(FileNotFoundError):
            (settings.state_dir / FILE_NAME).unlink()
        return None
    found = Probe(
        base_model_digest=answer.machine.base_model_digest,
        task=welcome.model.task,
        target_modules=welcome.model.target_modules,
        modules_to_save=welcome.model.modules_to_save,
        lora_dropout=welcome.lora_dropout,
        batch_size=question.batch_size,
        max_length=settings.data.max_length,
        dtype=settings.model.dtype,
        memory_batch=settings.batch_size,
        device=answer.machine.device,
        memory_bytes=answer.machine.memory_bytes,
        memory_share=question.memory_share,
        measurements=answer.measurements,
        failures=answer.failures,
        proposal=answer.proposal,
    )
    write_probe(settings.state_dir, found)
    return found
