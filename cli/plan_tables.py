"""A plan as people read it, and as JSON: every figure beside the word that says how sure it is.

Pure: a plan in, renderables and plain values out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.tables import open_table
from cli.words import NOTHING, counted, human_seconds, percent, plain, rank_range
from common.sizes import human_bytes
from coordinator.footprint import FRAMEWORK_BYTES
from coordinator.planning import FederationPlan, LevelPlan, Partition, Question, Site

EXACT, ESTIMATED, MEASURED, GIVEN = "exact", "estimated", "measured", "given"
_LEVELS_A_TABLE = 5  # columns of a screen of 80
_ENDLESS = "never"


@dataclass(frozen=True)
class Assumed:
    """What a plan was made of, to be told with it."""

    question: Question
    named: tuple[Site, ...] = ()  # of its sites, those that have a name of their own
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Row:
    name: str
    cell: Callable[[LevelPlan], str]
    basis: str


def plan_screen(plan: FederationPlan, assumed: Assumed) -> Group:
    """Everything on one page."""
    parts: list[RenderableType] = [_header(plan, assumed)]
    parts += [Text(f"! {plain(warning)}", style="yellow") for warning in plan.warnings]
    if assumed.named:
        parts += [Text(), _sites_table(assumed.named)]
    for start in range(0, len(plan.levels), _LEVELS_A_TABLE):
        parts += [Text(), _levels_table(plan.levels[start : start + _LEVELS_A_TABLE], assumed)]
    parts += [Text(), _totals_table(plan, assumed.question.config.rounds.num_rounds)]
    parts += [Text(), _collapse_table(plan.partitions), Text(f"Forecast: {plain(plan.forecast.sentence)}", "cyan")]
    parts += [Text(), *(Text(plain(note), "dim") for note in _notes(plan, assumed))]
    return Group(*parts)


def plan_json(plan: FederationPlan, assumed: Assumed) -> dict[str, Any]:
    """The same numbers, in bytes and seconds, grouped by how sure they are; what is not known is null."""
    question = assumed.question
    rounds, traffic = question.config.rounds, plan.traffic
    return {
        "federation": question.config.name,
        "assumed": {
            "micro_batch": question.setting.micro_batch,
            "tokens": question.base.tokens or question.setting.tokens,
            "dtype": question.setting.dtype,
            "quantization": question.setting.quantization,
            "gradient_checkpointing": question.setting.checkpoints_gradients,
            "site_mbit": question.links.site_mbit,
            "coordinator_mbit": question.links.coordinator_mbit,
            "notes": list(assumed.notes),
        },
        "sites": [
            {
                "name": site.name,
                "lora_rank": site.rank,
                "rank_reason": site.reason,
                "num_examples": site.profile.num_examples if site.knows_examples else None,
            }
            for site in question.sites
        ],
        "levels": [_level_json(level) for level in plan.levels],
        "totals": {
            "rounds": rounds.num_rounds,
            "cohort": plan.cohort,
            EXACT if traffic.is_exact else ESTIMATED: {
                "down_bytes_round": traffic.down_round,
                "up_bytes_round": traffic.up_round,
                "down_bytes": traffic.down_total,
                "up_bytes": traffic.up_total,
            },
            "time": {
                "basis": ESTIMATED,
                "aggregation_seconds_round": plan.aggregation_seconds,
                "seconds_round": plan.round_seconds or None,
                "seconds": plan.round_seconds * rounds.num_rounds or None,
            },
        },
        "partitions": [
            {
                "low": partition.low,
                "high": partition.high,
                "sites": partition.sites,
                "share": partition.share,
                "average_factor": partition.average_factor,
                "average_half_life_rounds": _finite(partition.half_life_rounds),
                "raflora_factor": 1.0,
            }
            for partition in plan.partitions
        ],
        "forecast": plan.forecast.sentence,
        "warnings": list(plan.warnings),
    }


def _level_json(level: LevelPlan) -> dict[str, Any]:
    footprint = level.footprint
    exact: dict[str, int | None] = {
        "lora_parameters": level.lora_parameters,
        "trained_parameters": level.trained_parameters,
        "slice_bytes": level.slice_bytes,
        "update_bytes": level.update_bytes,
        "factors_bytes": footprint.factors_bytes,
        "gradient_bytes": footprint.gradient_bytes,
        "adam_bytes": footprint.adam_bytes,
    }
    estimated: dict[str, Any] = {
        "activation_bytes": footprint.activation_bytes or None,
        "framework_bytes": FRAMEWORK_BYTES,
        "memory_bytes": footprint.total_bytes or None,
        "transfer_seconds": level.transfer_seconds,
    }
    (exact if footprint.is_base_exact else estimated)["base_bytes"] = footprint.base_bytes or None
    return {
        "lora_rank": level.rank,
        "sites": list(level.sites),
        EXACT: exact,
        ESTIMATED: estimated,
        MEASURED: {
            "memory_bytes": level.measured_bytes or None,
            "device_memory_bytes": level.memory_bytes or None,
            "training_seconds": level.training_seconds or None,
        },
    }


def _header(plan: FederationPlan, assumed: Assumed) -> Text:
    config = assumed.question.config
    about = [plain(config.name), plain(config.model.base_model), config.aggregation.method]
    about.append(f"global rank {config.adapter.global_rank}")
    number = len(assumed.question.sites)
    header = Text(" · ".join(about), style="bold")
    every = "all of them" if plan.cohort == number else f"{plan.cohort} of them"
    rounds = counted(config.rounds.num_rounds, "round")
    header.append(f"\n{counted(number, 'site')}, {every} in each of {rounds}", "not bold")
    return header


def _sites_table(sites: Sequence[Site]) -> Table:
    """Who would be granted which rank, and why."""
    table = open_table()
    table.add_column("site")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("why")
    for site in sites:
        table.add_row(plain(site.name), str(site.rank), plain(site.reason))
    return table


def _levels_table(levels: Sequence[LevelPlan], assumed: Assumed) -> Table:
    """Quantities down, ranks across, and how sure each row is."""
    table = open_table()
    table.add_column("rank")
    for level in levels:
        table.add_column(str(level.rank), justify="right", no_wrap=True)
    table.add_column("basis", no_wrap=True)
    for row in _rows(assumed):
        cells = [row.cell(level) for level in levels]
        if any(cell != NOTHING for cell in cells):
            table.add_row(row.name, *cells, Text(row.basis, _STYLES[row.basis]))
    return table


def _rows(assumed: Assumed) -> tuple[_Row, ...]:
    question = assumed.question
    base_basis = EXACT if question.setting.quantization == "none" else ESTIMATED
    return (
        _Row("sites", lambda level: str(len(level.sites)), GIVEN),
        _Row("LoRA parameters", lambda level: _millions(level.lora_parameters), EXACT),
        _Row("trained beside LoRA", _beside, EXACT),
        _Row("download a round", lambda level: _size(level.slice_bytes), EXACT),
        _Row("upload a round", lambda level: _size(level.update_bytes), EXACT),
        _Row("factors, gradients, Adam", lambda level: _size(level.footprint.trained_bytes), EXACT),
        _Row("base weights", lambda level: _size(level.footprint.base_bytes), base_basis),
        _Row("activations", lambda level: _size(level.footprint.activation_bytes), ESTIMATED),
        _Row("memory of a worker", lambda level: _size(level.footprint.total_bytes), ESTIMATED),
        _Row("memory as probed", lambda level: _size(level.measured_bytes), MEASURED),
        _Row("of the device's", lambda level: _size(level.memory_bytes), MEASURED),
        _Row("training a round", lambda level: _time(level.training_seconds), MEASURED),
        _Row("transfers a round", lambda level: _time(level.transfer_seconds), ESTIMATED),
    )


def _totals_table(plan: FederationPlan, num_rounds: int) -> Table:
    table = open_table()
    table.add_column("through the coordinator")
    for heading in ("a round", f"all {num_rounds}" if num_rounds > 1 else "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("basis", no_wrap=True)
    traffic = plan.traffic
    bytes_are = EXACT if traffic.is_exact else ESTIMATED
    seconds = plan.round_seconds
    rows = (
        ("down to the sites", _size(traffic.down_round), _size(traffic.down_total), bytes_are),
        ("up from the sites", _size(traffic.up_round), _size(traffic.up_total), bytes_are),
        ("aggregation", _time(plan.aggregation_seconds), _time(plan.aggregation_seconds * num_rounds), ESTIMATED),
        ("round time", _time(seconds), _time(seconds * num_rounds), ESTIMATED),
    )
    for name, a_round, all_rounds, basis in rows:
        table.add_row(name, a_round, all_rounds, Text(basis, _STYLES[basis]))
    return table


def _collapse_table(partitions: Sequence[Partition]) -> Table:
    """What is left of a partition's energy after a round without news, by method."""
    table = open_table()
    for heading in ("ranks", "sites", "of examples", "FlexLoRA keeps", "halves every", "raFLoRA keeps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for partition in partitions:
        table.add_row(
            rank_range(partition.low, partition.high),
            Text(str(partition.sites), "yellow" if partition.sites < 2 else ""),
            percent(partition.share),
            percent(partition.average_factor),
            _half_life(partition.half_life_rounds),
            percent(1.0),
        )
    return table


def _notes(plan: FederationPlan, assumed: Assumed) -> list[str]:
    question, setting = assumed.question, assumed.question.setting
    checkpointing = ", gradient checkpointing" if setting.checkpoints_gradients else ""
    quantized = f", {setting.quantization} linear layers" if setting.quantization != "none" else ""
    notes = [
        *assumed.notes,
        f"Memory is that of a step of {setting.micro_batch} x {question.base.tokens or setting.tokens} tokens, base in "
        f"{setting.dtype}{quantized}{checkpointing}, with {_size(FRAMEWORK_BYTES)} for CUDA and the libraries. "
        "Activations may be off by a factor of two; `raflora probe` measures them.",
        f"Transfers: {question.links.site_mbit:g} Mbit/s at every site, {question.links.coordinator_mbit:g} at the "
        "coordinator, shared by the cohort. The round time leaves out evaluation and loading the model.",
    ]
    if not question.base.parameters:
        notes.append(
            "The base model's size is not known: write adapter.spec anew with `raflora spec`, or give --model."
        )
    guessed = sum(not site.profile.examples_per_second for site in question.sites)
    if plan.round_seconds and guessed:
        notes.append(f"{counted(guessed, 'site')} not probed: taken to be as fast as the slowest of the same rank.")
    slow = [str(level.rank) for level in plan.levels if not level.training_seconds]
    if slow:
        notes.append(
            f"How long training takes at rank {', '.join(slow)} is not known, so the round time is not: give --probe "
            "with what `raflora probe` wrote there, and --examples unless training.local_steps is set."
        )
    return notes


_STYLES = {EXACT: "green", MEASURED: "green", ESTIMATED: "yellow", GIVEN: "dim"}


def _beside(level: LevelPlan) -> str:
    beside = level.footprint.factors_bytes // 4 - level.lora_parameters
    return _millions(beside) if beside else NOTHING


def _size(size_bytes: int) -> str:
    return human_bytes(size_bytes) if size_bytes else NOTHING


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def _time(seconds: float) -> str:
    return human_seconds(seconds) if seconds else NOTHING


def _half_life(rounds: float) -> str:
    if math.isinf(rounds):
        return _ENDLESS
    return f"{rounds:,.1f} rounds" if rounds else NOTHING


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
