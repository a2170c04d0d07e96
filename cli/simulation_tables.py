"""What a simulation came to, as rich tables and as JSON. Pure: rows in, renderables and plain values out."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from cli.tables import GAP, open_table
from cli.words import plain
from common.sizes import human_bytes
from simulation.experiment import ExperimentConfig
from simulation.report.findings import findings_of
from simulation.report.stages import Group as ArmGroup
from simulation.report.stages import cpu_variant, stages_of
from simulation.report.summary import ArmSummary, differences
from simulation.report.tables import decimals, points, runs_text, share, signed_points, spread_text
from simulation.runner import Outcome, missing_runs, name_of
from simulation.schedule import BEST

_MOST_FINDINGS = 12  # lines on a screen; the page has them all
# What goes first where a terminal is narrow; the arm, its accuracies and its runs stay.
_FIRST_TO_GO = ("effective rank", "rho", "down", "above r1", "own over", "over")


def outcome_screen(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> Group:
    """One table a stage and setting."""
    parts: list[RenderableType] = []
    for stage in stages_of(outcome.results, experiment, baseline):
        parts += [Text(), Text(stage.title, style="bold")]
        for group in stage.groups:
            if len(stage.groups) > 1:
                parts.append(Text(f"\n{plain(group.title)}"))
            parts.append(ArmsTable(group))
    if not parts:
        parts.append(Text("\nOnly tuning runs are finished: there is nothing to compare yet.", style="yellow"))
    return Group(*parts)


def findings_screen(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> Group:
    """What speaks against raFLoRA and what for it, of the last stage; a dozen lines at most."""
    stages = stages_of(outcome.results, experiment, baseline)
    if not stages:
        return Group()
    found = findings_of(stages[-1].summaries, outcome.choices if stages[-1].name == BEST else ())
    shown = [each for each in found if not each.is_detail][:_MOST_FINDINGS]
    lines = [
        Text(f"{'!' if each.is_against else ' '} {plain(each.sentence)}", style="yellow" if each.is_against else "")
        for each in shown
    ]
    if len(shown) < len(found):
        lines.append(Text(f"  and {len(found) - len(shown)} more on the page of `raflora compare`", style="dim"))
    return Group(Text(), Text("What these rows show, the unflattering first", style="bold"), *lines)


@dataclass(frozen=True)
class ArmsTable:
    """One row an arm, everything over seeds; as many columns as there is room for, and a line that names the rest."""

    group: ArmGroup

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        columns = _columns(self.group)
        left_out = []
        for name in _FIRST_TO_GO:
            if sum(each.width + GAP for each in columns) - GAP <= options.max_width:
                break
            left_out += [each.heading for each in columns if each.name == name]
            columns = [each for each in columns if each.name != name]
        table = open_table()
        for each in columns:
            is_arm = each.name == "arm"
            table.add_column(
                Text(each.heading), justify="left" if is_arm else "right", no_wrap=is_arm, width=each.width
            )
        for cells in zip(*(each.cells for each in columns), strict=True):
            table.add_row(*cells)
        yield table
        if left_out:
            yield Text(f"no room for: {', '.join(left_out)}", style="dim")


@dataclass(frozen=True)
class _Column:
    name: str
    heading: str
    cells: Sequence[Text]

    @property
    def width(self) -> int:
        """Unwrapped cells; a heading may wrap between its words."""
        words = self.heading.split() if self.name != "arm" else [self.heading]
        return max(map(cell_len, (*words, *(cell.plain for cell in self.cells))))


def _columns(group: ArmGroup) -> list[_Column]:
    arms = group.summaries
    gaps = {each.arm: each for each in differences(arms, group.baseline)}
    over = [gaps.get(each.arm) for each in arms]
    columns = [
        _Column("arm", "arm", [Text(plain(each.arm), style="dim" if each.is_reference else "bold") for each in arms]),
        _Column("accuracy", "accuracy %", [Text(spread_text(each.accuracy, points)) for each in arms]),
        _Column(
            "over",
            f"over {plain(group.baseline)}",
            [Text(spread_text(gap.difference, signed_points) if gap else "") for gap in over],
        ),
        _Column("own rank", "own rank %", [Text(spread_text(each.own_ranks, points)) for each in arms]),
        _Column(
            "own over",
            f"own rank over {plain(group.baseline)}",
            [Text(spread_text(gap.at_own_ranks, signed_points) if gap else "") for gap in over],
        ),
        _Column("rho", "rho", [Text("" if each.is_reference else decimals(each.rho.mean, 3)) for each in arms]),
        _Column("effective rank", "effective rank", [Text(decimals(each.effective_rank.mean, 1)) for each in arms]),
        _Column("above r1", "above r1", [Text(_above(each)) for each in arms]),
        _Column("down", "down", [Text(_bytes(each.download_bytes)) for each in arms]),
        _Column("runs", "runs", [Text(runs_text(each), style="yellow" if each.lost else "") for each in arms]),
    ]
    return columns


def _above(summary: ArmSummary) -> str:
    last = 0 if summary.is_reference else max(summary.energy_above, default=0)
    return share(summary.energy_above[last].mean) if last else ""


def _bytes(size: float) -> str:
    return human_bytes(int(size)) if math.isfinite(size) else ""


def outcome_json(experiment: ExperimentConfig, outcome: Outcome, baseline: str = "") -> dict[str, Any]:
    """The same numbers, and whatever the table leaves out; what was not measured is null."""
    stages = []
    for stage in stages_of(outcome.results, experiment, baseline):
        found = findings_of(stage.summaries, outcome.choices if stage.name == BEST else ())
        groups = [
            {
                "setting": group.setting,
                "baseline": group.baseline,
                "differences": [
                    asdict(each) | {"is_clear": each.is_clear, "is_clear_at_own_ranks": each.at_own_ranks.is_clear}
                    for each in differences(group.summaries, group.baseline)
                ],
            }
            for group in stage.groups
        ]
        stages.append(
            {
                "stage": stage.name,
                "title": stage.title,
                "arms": [asdict(each) for each in stage.summaries],
                "groups": groups,
                "findings": [asdict(each) for each in found],
            }
        )
    content = {
        "experiment": experiment.name,
        "cpu_variant": cpu_variant(experiment),
        "stages": stages,
        "choices": [asdict(choice) for choice in outcome.choices],
        "failures": [{"run": name_of(plan), "why": sentence} for plan, sentence in outcome.failures],
        "missing": [name_of(plan) for plan in missing_runs(experiment, outcome)],
    }
    cleaned: dict[str, Any] = _finite(content)
    return cleaned


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
