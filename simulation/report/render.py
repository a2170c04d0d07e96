"""The report of an experiment as one HTML file: no script, nothing fetched, opens anywhere, prints.

Pure: rows in, text out. Everything that came from a settings file or a run is escaped. The page follows the reader's
light or dark setting; the pictures follow the page.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from simulation.experiment import ExperimentConfig
from simulation.report.figures import draw_all
from simulation.report.findings import best_and_worst, findings_of
from simulation.report.page import STYLE
from simulation.report.plotting import inline_svg
from simulation.report.summary import ArmSummary, Spread, default_baseline, differences, summarise
from simulation.report.tables import decimals, mega, points, share, signed_points, spread_text
from simulation.results import Results
from simulation.schedule import BEST, SAME, TUNING, Choice

_STAGE_TITLES = {
    SAME: "Everybody at the experiment's own learning rate",
    BEST: "Everybody at the rate that was best for it",
}


@dataclass(frozen=True)
class Report:
    """What a report is made of."""

    experiment: ExperimentConfig
    results: Results
    choices: tuple[Choice, ...] = ()
    baseline: str = ""  # the arm that others are compared with; empty: FlexLoRA's average, or the first arm
    made_with: str = ""  # versions and date, for the last line
    missing: tuple[str, ...] = ()  # runs that have not been carried out, in words


@dataclass(frozen=True)
class _Stage:
    name: str
    summaries: tuple[ArmSummary, ...]
    baseline: str

    @property
    def title(self) -> str:
        return _STAGE_TITLES[self.name]


def render(report: Report) -> str:
    """The whole file. Raises ConfigError without matplotlib."""
    arms = [arm.name for arm in report.experiment.arms]
    stages = _stages(report, arms)
    sections = [_findings_section(report, stages)]
    sections += [_stage_section(report, stage, arms) for stage in stages]
    if report.choices:
        sections.append(_tuning_section(report))
    sections.append(_settings_section(report))
    contents = " ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in _contents(report, stages))
    name = escape(report.experiment.name)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: raflora experiment</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(report, stages)}\n<nav>{contents}</nav>\n{''.join(sections)}"
        f"<footer>{escape(report.made_with)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _stages(report: Report, arms: Sequence[str]) -> tuple[_Stage, ...]:
    summaries = summarise(report.results, arms)
    found = []
    for name in (SAME, BEST):
        of_stage = tuple(each for each in summaries if each.stage == name)
        if of_stage:
            known = [each.arm for each in of_stage]
            baseline = report.baseline if report.baseline in known else default_baseline(of_stage)
            found.append(_Stage(name, of_stage, baseline))
    return tuple(found)


def _contents(report: Report, stages: Sequence[_Stage]) -> Iterable[tuple[str, str]]:
    yield "findings", "When not to use it"
    for stage in stages:
        yield stage.name, stage.title
    if report.choices:
        yield "tuning", "Tuning"
    yield "settings", "Settings"


def _header(report: Report, stages: Sequence[_Stage]) -> str:
    experiment = report.experiment
    clients = experiment.clients
    ranks = ", ".join(map(str, clients.ranks))
    finished = sum(each.finished for stage in stages for each in stage.summaries)
    diverged = sum(len(each.diverged) for stage in stages for each in stage.summaries)
    facts = [
        f"{clients.count} clients of ranks {ranks}",
        f"{clients.per_round} in a round",
        f"{experiment.rounds.num_rounds} rounds",
        f"{len(experiment.arms)} arms",
        f"seeds {', '.join(map(str, experiment.seeds))}",
        f"{finished} finished runs" + (f", {diverged} that did not" if diverged else ""),
    ]
    lines = [f"<h1>{escape(experiment.name)}</h1>", f'<p class="facts">{escape(" · ".join(facts))}</p>']
    if experiment.description:
        lines.insert(1, "".join(f'<p class="lead">{_prose(part)}</p>' for part in experiment.description.split("\n\n")))
    if report.missing:
        missing = "; ".join(report.missing)
        lines.append(f'<p class="warning">Not everything has been run: {escape(missing)}.</p>')
    lines += [_leaders(stage) for stage in stages]
    return "\n".join(lines)


def _prose(text: str) -> str:
    """Words in `backticks` are code; line breaks of a settings file mean nothing."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(text.split())))


def _leaders(stage: _Stage) -> str:
    found = best_and_worst(stage.summaries)
    if not found:
        return ""
    words = {"accuracy": "most accurate", "effective rank": "highest effective rank", "download": "least download"}
    cards = "".join(
        f"<div><dt>{words[kind]}</dt><dd>{escape(best)}</dd><dd class='worst'>last: {escape(worst)}</dd></div>"
        for kind, (best, worst) in found.items()
    )
    return f'<p class="facts">{escape(stage.title)}, among arms of mixed ranks:</p><dl class="leaders">{cards}</dl>'


def _findings_section(report: Report, stages: Sequence[_Stage]) -> str:
    parts = [
        '<section id="findings"><h2>When not to use it: what this run shows against raFLoRA, and for it</h2>',
        "<p>Computed from this run's rows. “Not told apart” means within two standard errors over the seeds; "
        "the test sample's own error comes on top.</p>",
    ]
    for stage in stages:
        choices = report.choices if stage.name == BEST else ()
        found = findings_of(stage.summaries, choices)
        if len(stages) > 1:
            parts.append(f"<h3>{escape(stage.title)}</h3>")
        against = [each.sentence for each in found if each.is_against]
        others = [each.sentence for each in found if not each.is_against]
        parts.append(_list(against, "against") if against else "<p>Nothing in these rows speaks against it.</p>")
        parts.append(_list(others, "for"))
    return "\n".join(parts) + "</section>\n"


def _list(sentences: Sequence[str], kind: str) -> str:
    if not sentences:
        return ""
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _stage_section(report: Report, stage: _Stage, arms: Sequence[str]) -> str:
    parts = [f'<section id="{stage.name}"><h2>{escape(stage.title)}</h2>']
    parts += [_accuracy_table(stage), _energy_table(stage), _rank_table(stage)]
    for picture in draw_all(report.results.of_stage(stage.name), arms):
        drawn = inline_svg(picture, f"{stage.name}-{picture.name}")
        caption = f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption>"
        parts.append(f'<figure id="{stage.name}-{picture.name}">{drawn}{caption}</figure>')
    return "\n".join(parts) + "</section>\n"


def _accuracy_table(stage: _Stage) -> str:
    gaps = {each.arm: each for each in differences(stage.summaries, stage.baseline)}
    rivals = [each for each in stage.summaries if not each.is_reference and each.accuracy.n]
    ordered = sorted(rivals, key=lambda each: each.accuracy.mean)
    marks = {ordered[0].arm: "worst", ordered[-1].arm: "best"} if len(ordered) > 1 else {}
    rows: list[list[str | _Cell]] = []
    for each in stage.summaries:
        gap = gaps.get(each.arm)
        won = f"{gap.wins} of {gap.difference.n}" if gap and gap.difference.n else ""
        rows.append(
            [
                _arm(each),
                f"{each.learning_rate:g} {each.decay}",
                _Cell(spread_text(each.accuracy, points), marks.get(each.arm, "")),
                spread_text(gap.difference, signed_points) if gap else "baseline",
                won,
                mega(each.download_bytes),
                mega(each.upload_bytes),
                decimals(each.seconds, 1),
                _status(each),
            ]
        )
    head = [
        "arm",
        "rate",
        "accuracy, %",
        f"points over {stage.baseline}",
        "seeds above",
        "down, MB",
        "up, MB",
        "s a run",
    ]
    caption = "Test accuracy at the arm's full rank after the last round: mean ± standard deviation over (n) seeds. "
    caption += "Differences are paired by seed. Traffic is of all clients over all rounds."
    return _table(caption, [*head, "finished"], rows)


def _energy_table(stage: _Stage) -> str:
    rounds = sorted({number for each in stage.summaries for number in each.energy_above})
    rows = [
        [
            _arm(each),
            spread_text(each.rho, lambda value: decimals(value, 3)),
            spread_text(each.effective_rank, lambda value: decimals(value, 1)),
            *(spread_text(each.energy_above[n], share) if n in each.energy_above else "" for n in rounds),
            spread_text(each.norm, lambda value: decimals(value, 2)),
        ]
        for each in stage.summaries
    ]
    head = ["arm", "rho", "effective rank", *(f"above, round {number}" for number in rounds), "norm"]
    caption = "Where the global update's energy lies. rho: its share within the smallest rank after the last round; "
    caption += "above: its share above the smallest rank. An arm of one rank has nothing above it."
    return _table(caption, head, rows)


def _rank_table(stage: _Stage) -> str:
    ranks = sorted({rank for each in stage.summaries for rank in each.accuracy_at_rank})
    if len(ranks) < 2:
        return ""
    best: dict[int, float] = {}
    for each in stage.summaries:
        for rank, spread in each.accuracy_at_rank.items():
            if not each.is_reference and spread.n:
                best[rank] = max(best.get(rank, 0.0), spread.mean)
    rows: list[list[str | _Cell]] = [
        [_arm(each), *(_at_rank(each.accuracy_at_rank.get(rank), best.get(rank)) for rank in ranks)]
        for each in stage.summaries
    ]
    caption = "Test accuracy, %, of the slice that a client of each rank receives after the last round."
    return _table(caption, ["arm", *(f"rank {rank}" for rank in ranks)], rows)


def _at_rank(spread: Spread | None, best: float | None) -> "_Cell":
    if spread is None:
        return _Cell("")
    return _Cell(spread_text(spread, points), "best" if spread.n and spread.mean == best else "")


def _tuning_section(report: Report) -> str:
    rows = [
        [
            each.arm,
            f"{each.learning_rate:g}",
            each.decay,
            points(each.validation_accuracy),
            "at the edge of the grid" if each.at_the_edge else "",
        ]
        for each in report.choices
    ]
    tuning = report.experiment.tuning
    grid = f"rates {', '.join(f'{rate:g}' for rate in tuning.learning_rates)}; {', '.join(tuning.decays)}"
    caption = (
        f"The same grid for every arm ({grid}), seeds {', '.join(map(str, tuning.seeds))}, judged on the clients' "
    )
    caption += "validation parts alone; the test split was looked at after the choice."
    chosen = _table(caption, ["arm", "chosen rate", "schedule", "validation, %", ""], rows)
    return f'<section id="tuning"><h2>Tuning</h2>{chosen}{_grid_table(report)}</section>\n'


def _grid_table(report: Report) -> str:
    """Validation accuracy everywhere on the grid."""
    tuning = report.experiment.tuning
    runs = {run.key: run for run in report.results.runs if run.key.stage == TUNING}
    found: dict[tuple[str, float, str], dict[int, float]] = {}
    for row in sorted(report.results.accuracy, key=lambda row: row.round):
        run = runs.get(row.key)
        if run and row.split == "validation" and row.rank == run.global_rank:
            at = (row.key.arm, row.key.learning_rate, row.key.decay)
            found.setdefault(at, {})[row.key.seed] = row.accuracy
    lost = {(key.arm, key.learning_rate, key.decay) for key, run in runs.items() if run.status != "finished"}
    grid = [(rate, decay) for decay in tuning.decays for rate in tuning.learning_rates]

    def cell(arm: str, rate: float, decay: str) -> str:
        at = (arm, rate, decay)
        reached = points(fmean(found[at].values())) if at in found else ""
        return f"diverged {reached}".strip() if at in lost else reached

    rows = [[arm.name, *(cell(arm.name, *at) for at in grid)] for arm in report.experiment.arms]
    return _table("Validation accuracy, %, over the whole grid.", ["arm", *(f"{r:g} {d}" for r, d in grid)], rows)


def _settings_section(report: Report) -> str:
    # Where the data lies is of nobody's concern but this machine's; a report is for others.
    dumped = report.experiment.model_dump(mode="json", exclude_defaults=True, exclude={"data": {"folder"}})
    settings = json.dumps(dumped, indent=2)
    return (
        '<section id="settings"><h2>Settings</h2>'
        "<p>The numbers behind every table and picture: runs.csv, rounds.csv, partitions.csv and accuracy.csv, "
        "beside this file.</p>"
        f"<details><summary>Everything that differs from the defaults</summary><pre>{escape(settings)}</pre></details>"
        "</section>\n"
    )


@dataclass(frozen=True)
class _Cell:
    text: str
    mark: str = ""


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence["str | _Cell"]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{_row(row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _row(cells: Sequence["str | _Cell"]) -> str:
    first, *others = (cell if isinstance(cell, _Cell) else _Cell(cell) for cell in cells)
    return f'<th scope="row">{escape(first.text)}</th>' + "".join(_data(cell) for cell in others)


def _data(cell: _Cell) -> str:
    if not cell.mark:
        return f"<td>{escape(cell.text)}</td>"
    return f'<td class="{cell.mark}">{escape(cell.text)} <small>{cell.mark}</small></td>'


def _arm(summary: ArmSummary) -> str:
    return f"{summary.arm} (reference)" if summary.is_reference else summary.arm


def _status(summary: ArmSummary) -> str:
    if not summary.diverged:
        return f"{summary.finished}"
    return f"{summary.finished}, {len(summary.diverged)} diverged"
