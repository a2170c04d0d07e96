"""What `raflora probe` shows: a bar while it measures, a table of ranks, and what to do next.

The bar is on standard error, so that standard output is the answer alone.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.output import LiveScreen, stderr_console
from cli.tables import open_table
from cli.words import NOTHING, counted, percent, plain
from common.sizes import human_bytes
from worker.config import WorkerConfig
from worker.measurement import FILE_NAME, Attempt, Measurement, Probe, Proposal, setting_of
from worker.proposal import Answer, Question
from worker.trainer_protocol import DryRunDone, ProgressMade


@dataclass(frozen=True)
class Report:
    """What was asked and found."""

    settings: WorkerConfig
    question: Question
    answer: Answer
    probe: Probe | None


@dataclass(frozen=True)
class Level:
    """One line of the table."""

    rank: int
    peak_bytes: int
    is_measured: bool  # otherwise by the line
    examples_per_second: float  # 0: not measured
    fits: bool


class ProbeScreen(LiveScreen):
    """A bar for the measurement that runs, on a terminal; a line for each that is done. Use as a context."""

    def __init__(self) -> None:
        console = stderr_console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        super().__init__(console, self._progress)
        self._task: TaskID | None = None

    def begun(self, attempt: Attempt) -> None:
        """A bar that moves to and fro until the first step: the model may have to be loaded."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(f"measuring {name_of(attempt)}", total=None)

    def moved(self, progress: ProgressMade) -> None:
        """One step further."""
        if self._task is not None:
            self._progress.update(self._task, completed=progress.step, total=progress.total_steps)

    def measured(self, attempt: Attempt, done: DryRunDone) -> None:
        """A line that stays."""
        speed = attempt.micro_batch / done.seconds_per_step
        self._say(f"{name_of(attempt)}: {human_bytes(done.peak_bytes)}, {speed:.3g} examples/s")

    def failed(self, attempt: Attempt, why: str) -> None:
        """Likewise."""
        self._say(f"{name_of(attempt)}: not measured: {plain(why)}")

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def name_of(attempt: Attempt) -> str:
    """An attempt in words."""
    more: list[str] = [] if attempt.quantization == "none" else [attempt.quantization]
    if attempt.gradient_checkpointing:
        more.append("gradient checkpointing")
    return ", ".join([f"rank {attempt.lora_rank}", f"micro-batch {attempt.micro_batch}", *more])


def levels_of(found: Report) -> list[Level]:
    """Every level at the proposed setting, measured or by the line; without a proposal what was measured first."""
    answer, proposal = found.answer, found.answer.proposal
    if found.probe is None or not answer.measurements:
        return []
    limit_bytes = found.probe.limit_bytes
    setting = setting_of(proposal or answer.measurements[0])
    measured = {m.lora_rank: m for m in answer.measurements if setting_of(m) == setting}
    levels = []
    for rank in answer.levels:
        known = measured.get(rank)
        if known is not None:
            levels.append(
                Level(rank, known.peak_bytes, True, known.examples_per_second, known.peak_bytes <= limit_bytes)
            )
        elif proposal is not None:
            levels.append(Level(rank, peak := proposal.line.peak_bytes(rank), False, 0.0, peak <= limit_bytes))
    return levels


def as_json(found: Report) -> dict[str, object]:
    """For machines: the file's content, and the table."""
    content = found.probe.model_dump(mode="json") if found.probe is not None else {"proposal": None}
    return {
        **content,
        "failures": [failure.model_dump(mode="json") for failure in found.answer.failures],
        "levels": [asdict(level) for level in levels_of(found)],
        "file": str(found.settings.state_dir / FILE_NAME) if found.probe is not None else "",
        "advice": list(_advice(found)),
    }


def screen_of(found: Report) -> RenderableType:
    """For people."""
    parts: list[RenderableType] = []
    if found.probe is not None:
        probe = found.probe
        parts.append(
            Text(
                f"{probe.task}, base model {probe.base_model_digest[:12]}, on {plain(probe.device)} with "
                f"{human_bytes(probe.memory_bytes)}, of which a step may take {percent(probe.memory_share)}"
            )
        )
        parts.append(_table(found, probe))
    for failure in found.answer.failures:
        parts.append(Text(f"not measured: {name_of(failure)}: {plain(failure.message)}", style="yellow"))
    parts += [Text(line, style="bold") for line in _advice(found)]
    return Group(*parts)


def _table(found: Report, probe: Probe) -> Table:
    table = open_table()
    for name in ("rank", "peak", "of memory", "examples/s"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for level in levels_of(found):
        about = "" if level.is_measured else "about "
        table.add_row(
            str(level.rank),
            f"{about}{human_bytes(level.peak_bytes)}",
            percent(level.peak_bytes / probe.memory_bytes),
            f"{level.examples_per_second:.3g}" if level.examples_per_second else NOTHING,
            Text("yes", style="green") if level.fits else Text("no", style="red"),
        )
    return table


def _advice(found: Report) -> Iterator[str]:
    """What was found, and what to do next, a sentence a line."""
    proposal = found.answer.proposal
    if proposal is None:
        yield from _when_nothing_fits(found)
        return
    deviation = f", between them off by at most {percent(proposal.line.deviation)}" if proposal.line.deviation else ""
    if _is_noise(found, proposal):
        more = ", and what one more rank takes is below what this measurement can tell"
    else:
        more = f" and {human_bytes(proposal.line.bytes_per_rank)} more for every rank{deviation}"
    yield f"proposal: {name_of(proposal)}; {human_bytes(proposal.line.base_bytes)}{more}"
    if found.settings.launch.is_group:
        yield "measured: one process of the group on one GPU; what FSDP or DeepSpeed saves by sharding is not counted"
    for setting in _to_set(found.settings, proposal):
        yield f"set in worker.toml: {setting}"
    yield (
        f"written to {found.settings.state_dir / FILE_NAME}; a worker with rank = 0 takes rank {proposal.lora_rank} "
        "from it at its next start"
    )


def _is_noise(found: Report, proposal: Proposal) -> bool:
    """Whether memory grew over all measured ranks by no more than the line is off between them."""
    line = proposal.line
    ranks = [m.lora_rank for m in found.answer.measurements if setting_of(m) == setting_of(proposal)]
    grown = line.bytes_per_rank * (max(ranks) - min(ranks)) if ranks else 0
    return grown <= line.deviation * line.peak_bytes(max(ranks, default=0))


def _to_set(settings: WorkerConfig, proposal: Proposal) -> Iterator[str]:
    if proposal.quantization != settings.model.quantization:
        yield f'model.quantization = "{proposal.quantization}"'
    if proposal.gradient_checkpointing != settings.model.gradient_checkpointing:
        yield f"model.gradient_checkpointing = {str(proposal.gradient_checkpointing).lower()}"
    if settings.rank and settings.rank != proposal.lora_rank:
        yield f"rank = 0 (or {proposal.lora_rank}); it is {settings.rank} now"


def _when_nothing_fits(found: Report) -> Iterator[str]:
    question, answer = found.question, found.answer
    smallest: Measurement | None = min(answer.measurements, key=lambda m: m.peak_bytes, default=None)
    tried = f"{counted(len(answer.measurements) + len(answer.failures), 'setting')} tried"
    if smallest is None or found.probe is None:
        yield f"nothing fits this machine: {tried}, and none could be measured"
    else:
        yield (
            f"nothing fits this machine: {tried}; the smallest ({name_of(smallest)}) takes "
            f"{human_bytes(smallest.peak_bytes)}, and a step may take {human_bytes(found.probe.limit_bytes)}"
        )
    if found.probe is None or found.probe.task != "image-classification":
        yield f"try a smaller data.max_length (now {found.settings.data.max_length})"
    if "4bit" not in question.quantizations:
        yield f'let quantization be tried: leave model.quantization (now "{question.quantizations[0]}") out'
    elif any(f.quantization != "none" and f.reason == "model_error" for f in answer.failures):
        yield 'make quantization possible: pip install "raflora[quantized]"'
    if True not in question.checkpointings:
        yield "let gradient checkpointing be tried: leave model.gradient_checkpointing out"
    if question.levels[0] > 1:
        yield f"try smaller ranks: --levels 1,2,4 (the smallest was {question.levels[0]})"
    yield "ask the operator for fewer target_modules, or for a smaller base model"
