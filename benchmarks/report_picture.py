"""A part's figures against their bars: how many times the bar each one is, whichever way is better."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.interleaved import Figure, Goal
from benchmarks.report import is_measured

# Even steps of lightness: what is reached is told apart without colour vision, too.
_COLOURS = {"goal": "#1f4e79", "bar": "#6fa8dc", "below": "#f6b26b"}
_MEANINGS = {"goal": "goal reached", "bar": "bar reached", "below": "below the bar"}
_INCHES_A_BAR = 0.3
_MARGIN = 0.8  # of the leftmost value
_AXIS = "times the bar, right is better (1: the bar; |: the goal; thin line: from lowest to highest)"


def times_the_bar(goal: Goal, value: float) -> float:
    """1 at the bar, more is better."""
    return value / goal.bar if goal.at_least else goal.bar / value


def _least(figure: Figure) -> float:
    ends = (figure.value.low, figure.value.median, figure.value.high)
    return min((times_the_bar(figure.goal, end) for end in ends if end > 0), default=1.0) if figure.goal else 1.0


def draw(figures: Sequence[Figure], path: Path) -> bool:
    """The picture; whether there was anything to draw."""
    # Drawn without a screen, and only here: measuring must not load it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    shown = [figure for figure in figures if figure.goal and is_measured(figure) and figure.value.median > 0][::-1]
    if not shown:
        return False
    canvas = Canvas(figsize=(9, 1.1 + _INCHES_A_BAR * len(shown)), layout="constrained")
    axes = canvas.subplots()
    for row, figure in enumerate(shown):
        goal = figure.goal
        assert goal
        reached = times_the_bar(goal, figure.value.median)
        axes.barh(row, reached - 1, left=1, color=_COLOURS[goal.says(figure.value.median)], height=0.6)
        ends = sorted(times_the_bar(goal, end) for end in (figure.value.low, figure.value.high) if end > 0)
        if ends:
            axes.plot([ends[0], ends[-1]], [row, row], color="#333333", linewidth=1)
        axes.plot([times_the_bar(goal, goal.goal)], [row], marker="|", color="black", markersize=11)
    reached_by = [figure.goal.says(figure.value.median) for figure in shown if figure.goal]
    for name in (name for name in _MEANINGS if name in reached_by):
        axes.barh([0], [0], color=_COLOURS[name], label=_MEANINGS[name])
    canvas.legend(fontsize=8, ncols=len(_MEANINGS), loc="outside upper center")
    axes.set_xscale("log")
    # Bars that start at 1 and go left do not count for the automatic limits.
    axes.set_xlim(left=_MARGIN * min(1.0, *(_least(figure) for figure in shown)))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [figure.name for figure in shown], fontsize=8)
    axes.set_xlabel(_AXIS, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(canvas).print_png(path, metadata={"Software": ""})
    return True
