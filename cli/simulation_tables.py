"""What a simulation came to, as rich tables and as JSON. Pure: rows in, renderables and plain values out."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.words import human_bytes, plain
from simulation.experiment import ExperimentConfig
from simulation.report.findings import findings_of
from simulation.report.summary import ArmSummary, default_baseline, differences, summarise
from simulation.report.tables import decimals, points, share, signed_points, spread_text
from simulation.runner import Outcome, missing_runs, name_of
from simulation.schedule import BEST, SAME

_TITLES = {SAME: "At the experiment's own learning rate", BEST: "Every arm at its own best learning rate"}


def outcome_screen(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> Group:
    """One table a stage."""
    parts: list[RenderableType] = []
    for stage, of_stage, base in stages_of(experiment, outcome, baseline):
        parts += [Text(), Text(_TITLES[stage], style="bold"), arms_table(of_stage, base)]
    return Group(*parts)


def findings_screen(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> Group:
    """What speaks against raFLoRA and what for it, of the last stage."""
    *_, (stage, of_stage, _) = stages_of(experiment, outcome, baseline)
    found = findings_of(of_stage, outcome.choices if stage == BEST else ())
    lines = [
        Text(f"{'!' if each.is_against else ' '} {plain(each.sentence)}", style="yellow" if each.is_against else "")
        for each in found
    ]
    return Group(Text(), Text("What these rows show, the unflattering first", style="bold"), *lines)


def stages_of(
    experiment: ExperimentConfig, outcome: Outcome, baseline: str
) -> list[tuple[str, tuple[ArmSummary, ...], str]]:
    """Stage, its summaries, and the arm that others are compared with."""
    summaries = summarise(outcome.results, [arm.name for arm in experiment.arms])
    found = []
    for stage in (SAME, BEST):
        of_stage = tuple(each for each in summaries if each.stage == stage)
        if of_stage:
            known = [each.arm for each in of_stage]
            found.append((stage, of_stage, baseline if baseline in known else default_baseline(of_stage)))
    return found


def arms_table(summaries: Sequence[ArmSummary], baseline: str) -> Table:
    """One row an arm; everything over seeds."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("arm")
    headings = ("accuracy %", f"over {baseline}", "rho", "effective rank", "above r1", "down", "runs")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "runs")
    gaps = {each.arm: each.difference for each in differences(summaries, baseline)}
    for each in summaries:
        last = max(each.energy_above, default=0)
        table.add_row(
            Text(plain(each.arm), style="dim" if each.is_reference else "bold"),
            spread_text(each.accuracy, points),
            spread_text(gaps[each.arm], signed_points) if each.arm in gaps else "",
            decimals(each.rho.mean, 3),
            decimals(each.effective_rank.mean, 1),
            share(each.energy_above[last].mean) if last else "",
            human_bytes(int(each.download_bytes)) if math.isfinite(each.download_bytes) else "",
            _runs(each),
        )
    return table


def outcome_json(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> dict[str, Any]:
    """The same numbers, and whatever the table leaves out; what was not measured is null."""
    stages = []
    for stage, of_stage, base in stages_of(experiment, outcome, baseline):
        found = findings_of(of_stage, outcome.choices if stage == BEST else ())
        stages.append(
            {
                "stage": stage,
                "baseline": base,
                "arms": [asdict(each) for each in of_stage],
                "differences": [asdict(each) for each in differences(of_stage, base)],
                "findings": [asdict(each) for each in found],
            }
        )
    content = {
        "experiment": experiment.name,
        "stages": stages,
        "choices": [asdict(choice) for choice in outcome.choices],
        "failures": [{"run": name_of(plan), "why": sentence} for plan, sentence in outcome.failures],
        "missing": [name_of(plan) for plan in missing_runs(experiment, outcome)],
    }
    cleaned: dict[str, Any] = _finite(content)
    return cleaned


def _runs(summary: ArmSummary) -> Text:
    if not summary.diverged:
        return Text(str(summary.finished))
    return Text(f"{summary.finished}, {len(summary.diverged)} diverged", style="yellow")


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
