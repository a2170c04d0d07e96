"""The report of an experiment as one HTML file: no script, nothing fetched, opens anywhere, prints.

Pure: rows in, text out. Everything that came from a settings file or a run is escaped. The page follows the reader's
light or dark setting; the pictures follow the page.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from simulation.experiment import ExperimentConfig
from simulation.population import rank_counts
from simulation.report.figures import draw_all
from simulation.report.findings import Finding, best_and_worst, findings_of
from simulation.report.page import STYLE
from simulation.report.plotting import inline_svg
from simulation.report.stages import Group, Stage, cpu_variant, stages_of
from simulation.report.summary import ArmSummary, Spread, differences, rivals_of
from simulation.report.tables import decimals, mebi, points, runs_text, share, signed_points, spread_text
from simulation.results import Results
from simulation.schedule import BEST, FINISHED, TUNING, Choice

_NAMED_MISSING = 5  # runs; the others are counted

_GLOSSARY = (
    "<p>Arm: one thing that is compared, a method with its settings. Reference: an arm all of whose clients have one "
    "rank. Slice: the part of the global adapter that a client of a smaller rank receives. Own ranks: the mean over "
    "all clients of the accuracy of the slice that each receives. Energy: the squared singular values of the global "
    "update; rho is its share within the smallest rank, and the effective rank the number of equal directions that "
    "would be as spread out. Down, up: what all clients together receive and send in a run.</p>"
)


@dataclass(frozen=True)
class Report:
    """What a report is made of."""

    experiment: ExperimentConfig
    results: Results
    choices: tuple[Choice, ...] = ()
    baseline: str = ""  # the arm that others are compared with; empty: FlexLoRA's average, or the first arm
    made_with: str = ""  # versions and date, for the last line
    missing: tuple[str, ...] = ()  # runs that have not been carried out, in words


def render(report: Report) -> str:
    """The whole file. Raises ConfigError without matplotlib."""
    arms = [arm.name for arm in report.experiment.arms]
    stages = stages_of(report.results, report.experiment, report.baseline)
    # Numbers before sentences about them: the fairest stage first, which is each arm's own best where there is one.
    first, others = stages[-1:], stages[:-1]
    sections = [_stage_section(report, stage, arms) for stage in first]
    sections.append(_findings_section(report, stages))
    sections += [_stage_section(report, stage, arms) for stage in others]
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


def _contents(report: Report, stages: Sequence[Stage]) -> Iterable[tuple[str, str]]:
    for stage in stages[-1:]:
        yield stage.name, stage.title
    yield "findings", "When not to use it"
    for stage in stages[:-1]:
        yield stage.name, stage.title
    if report.choices:
        yield "tuning", "Tuning"
    yield "settings", "Settings"


def _header(report: Report, stages: Sequence[Stage]) -> str:
    experiment = report.experiment
    clients = experiment.clients
    counts = rank_counts(clients.ranks, clients.rank_weights, clients.count)
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in zip(clients.ranks, counts, strict=True))
    finished = sum(each.finished for stage in stages for each in stage.summaries)
    lost = sum(len(each.lost) for stage in stages for each in stage.summaries)
    facts = [
        f"{clients.count} clients: {ranks}",
        f"{clients.per_round} in a round",
        f"{experiment.rounds.num_rounds} rounds",
        f"{len(experiment.arms)} arms",
        f"seeds {', '.join(map(str, experiment.seeds))}",
        f"{finished} finished runs" + (f", {lost} that did not" if lost else ""),
    ]
    lines = [f"<h1>{escape(experiment.name)}</h1>", f'<p class="facts">{escape(" · ".join(facts))}</p>']
    if experiment.description:
        lines.insert(1, "".join(f'<p class="lead">{_prose(part)}</p>' for part in experiment.description.split("\n\n")))
    if variant := cpu_variant(experiment):
        lines.append(f'<p class="warning">Run without a GPU, as its small variant: {escape(variant)}.</p>')
    if report.missing:
        lines.append(f'<p class="warning">{escape(_missing(report.missing))}</p>')
    if not stages:
        lines.append('<p class="warning">Only tuning runs are finished: there is nothing to compare yet.</p>')
    lines += [_leaders(stage) for stage in stages]
    return "\n".join(lines)


def _missing(names: Sequence[str]) -> str:
    named = "; ".join(names[:_NAMED_MISSING])
    more = len(names) - _NAMED_MISSING
    runs = "1 run is" if len(names) == 1 else f"{len(names)} runs are"
    return f"Not everything has been run: {runs} missing: {named}" + (f"; and {more} more." if more > 0 else ".")


def _prose(text: str) -> str:
    """Words in `backticks` are code; line breaks of a settings file mean nothing."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(text.split())))


def _leaders(stage: Stage) -> str:
    if len(stage.groups) != 1:
        return ""  # who leads among arms of other settings says nothing
    found = best_and_worst(stage.summaries)
    if not found:
        return ""
    words = {
        "accuracy": "most accurate",
        "own ranks": "most accurate at the clients' own ranks",
        "effective rank": "highest effective rank",
        "download": "least download",
    }
    cards = "".join(
        f"<div><dt>{words[kind]}</dt><dd>{escape(best)}</dd><dd class='worst'>last: {escape(worst)}</dd></div>"
        for kind, (best, worst) in found.items()
    )
    return f'<p class="facts">{escape(stage.title)}, among arms of mixed ranks:</p><dl class="leaders">{cards}</dl>'


def _findings_section(report: Report, stages: Sequence[Stage]) -> str:
    parts = [
        '<section id="findings"><h2>When not to use it: what this run shows against raFLoRA, and for it</h2>',
        "<p>Computed from this run's rows; only arms of equal settings are compared. “Not told apart” means that "
        "Student's 95 % interval of the differences, paired by seed, holds zero, or that there are fewer than three "
        "seeds; nothing is corrected for the number of comparisons, and the test sample's own error comes on top.</p>",
        f"<details><summary>The words</summary>{_GLOSSARY}</details>",
    ]
    for stage in stages:
        found = findings_of(stage.summaries, report.choices if stage.name == BEST else ())
        if len(stages) > 1:
            parts.append(f"<h3>{escape(stage.title)}</h3>")
        shown = [each for each in found if not each.is_detail]
        parts.append(_sentences(shown) if shown else "<p>Nothing in these rows speaks against it, or for it.</p>")
        details = [each for each in found if each.is_detail]
        if details:
            parts.append(f"<details><summary>{len(details)} more, arm by arm</summary>{_sentences(details)}</details>")
    return "\n".join(parts) + "</section>\n"


def _sentences(found: Sequence[Finding]) -> str:
    return _list([each.sentence for each in found if each.is_against], "against") + _list(
        [each.sentence for each in found if not each.is_against], "for"
    )


def _list(sentences: Sequence[str], kind: str) -> str:
    if not sentences:
        return ""
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _stage_section(report: Report, stage: Stage, arms: Sequence[str]) -> str:
    parts = [f'<section id="{stage.name}"><h2>{escape(stage.title)}</h2>']
    for group in stage.groups:
        if len(stage.groups) > 1:
            parts.append(f"<h3>{escape(group.title)}</h3>")
        parts.append(_accuracy_table(group))
    parts += [_energy_table(stage), _rank_table(stage)]
    for picture in draw_all(report.results.of_stage(stage.name), arms):
        drawn = inline_svg(picture, f"{stage.name}-{picture.name}")
        caption = f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption>"
        parts.append(f'<figure id="{stage.name}-{picture.name}">{drawn}{caption}</figure>')
    return "\n".join(parts) + "</section>\n"


def _accuracy_table(group: Group) -> str:
    gaps = {each.arm: each for each in differences(group.summaries, group.baseline)}
    marks = _marks({each.arm: each.accuracy.mean for each in rivals_of(group.summaries)})
    own_marks = _marks({each.arm: each.own_ranks.mean for each in rivals_of(group.summaries) if each.own_ranks.n})
    rows: list[list[str | _Cell]] = []
    for each in group.summaries:
        gap = gaps.get(each.arm)
        won = f"{gap.wins} of {gap.difference.n}" if gap and gap.difference.n else ""
        rows.append(
            [
                _arm(each),
                f"{each.learning_rate:g} {each.decay}",
                _Cell(spread_text(each.accuracy, points), marks.get(each.arm, "")),
                spread_text(gap.difference, signed_points) if gap else "baseline",
                won,
                _Cell(spread_text(each.own_ranks, points), own_marks.get(each.arm, "")),
                spread_text(gap.at_own_ranks, signed_points) if gap else "baseline",
                mebi(each.download_bytes),
                mebi(each.upload_bytes),
                decimals(each.seconds, 1),
                runs_text(each),
            ]
        )
    head = [
        "arm",
        "rate",
        "accuracy, %",
        f"points over {group.baseline}",
        "seeds above",
        "own ranks, %",
        f"points over {group.baseline}",
        "down, MiB",
        "up, MiB",
        "seconds a run",
    ]
    caption = "Test accuracy after the last round, at the arm's full rank and at the clients' own ranks: the mean over "
    caption += "all clients of the accuracy of the slice that each receives. Mean ± standard deviation over (n) seeds; "
    caption += "differences are paired by seed. Traffic is of all clients over all rounds."
    return _table(caption, [*head, "finished"], rows)


def _energy_table(stage: Stage) -> str:
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


def _rank_table(stage: Stage) -> str:
    ranks = sorted({rank for each in stage.summaries for rank in each.accuracy_at_rank})
    if len(ranks) < 2:
        return ""
    marks = {
        (arm, rank): mark
        for group in stage.groups
        for rank in ranks
        for arm, mark in _marks(
            {each.arm: each.accuracy_at_rank[rank].mean for each in rivals_of(group.summaries) if rank in _ranks(each)}
        ).items()
        if mark == "best"
    }
    rows: list[list[str | _Cell]] = [
        [_arm(each), *(_at_rank(each.accuracy_at_rank.get(rank), marks.get((each.arm, rank), "")) for rank in ranks)]
        for each in stage.summaries
    ]
    caption = (
        "Test accuracy, %, of the slice that a client of each rank receives after the last round. Methods that put "
    )
    caption += "what is learned into the base model (flora, fedex-lora) show nearly the same at every rank."
    return _table(caption, ["arm", *(f"rank {rank}" for rank in ranks)], rows)


def _marks(values: Mapping[str, float]) -> Mapping[str, str]:
    """Which arm is best and which worst; nobody where the first two, or the last two, are equal."""
    ordered = sorted(values, key=values.__getitem__)
    found = {}
    if len(ordered) > 1 and values[ordered[0]] < values[ordered[1]]:
        found[ordered[0]] = "worst"
    if len(ordered) > 1 and values[ordered[-1]] > values[ordered[-2]]:
        found[ordered[-1]] = "best"
    return found


def _ranks(summary: ArmSummary) -> tuple[int, ...]:
    return tuple(rank for rank, spread in summary.accuracy_at_rank.items() if spread.n)


def _at_rank(spread: Spread | None, mark: str) -> "_Cell":
    return _Cell("") if spread is None else _Cell(spread_text(spread, points), mark)


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
        if run and row.split == "validation" and row.rank == run.global_rank and row.round == run.rounds:
            at = (row.key.arm, row.key.learning_rate, row.key.decay)
            found.setdefault(at, {})[row.key.seed] = row.accuracy
    lost = {
        (key.arm, key.learning_rate, key.decay): run.status.partition(":")[0]
        for key, run in runs.items()
        if run.status != FINISHED
    }
    grid = [(rate, decay) for decay in tuning.decays for rate in tuning.learning_rates]

    def cell(arm: str, rate: float, decay: str) -> str:
        at = (arm, rate, decay)
        reached = points(fmean(found[at].values())) if at in found else ""
        return f"{lost[at]} {reached}".strip() if at in lost else reached

    rows = [[arm.name, *(cell(arm.name, *at) for at in grid)] for arm in report.experiment.arms]
    return _table("Validation accuracy, %, over the whole grid.", ["arm", *(f"{r:g} {d}" for r, d in grid)], rows)


def _settings_section(report: Report) -> str:
    # Where the data lies is of nobody's concern but this machine's; a report is for others.
    dumped = report.experiment.model_dump(mode="json", exclude_defaults=True, exclude={"data": {"folder"}})
    settings = json.dumps(dumped, indent=2)
    return (
        '<section id="settings"><h2>Settings</h2>'
        "<p>The numbers behind every table and picture: runs.csv, rounds.csv, partitions.csv and accuracy.csv "
        "in the folder of the results.</p>"
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
