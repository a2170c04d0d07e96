"""Draws what became of the energy of each rank partition, round by round: `raflora demo`'s results as a picture.

`python -m benchmarks.collapse_picture runs/demo/results.json docs/images/energy.png`

One panel a federation, stacked shares that fill it; the kind of picture follows from the name (png, svg). It carries
its own background, so that it reads the same on a light and on a dark page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

TITLES = {
    "raflora": "raFLoRA: a rank is averaged over its owners",
    "flexlora": "FlexLoRA: a rank is averaged over everybody",
}
PAPER, INK, FAINT = "#ffffff", "#24292f", "#6e7781"
# Viridis from its dark end: even steps of lightness, told apart without colour vision, too.
LOWEST_SHADE, HIGHEST_SHADE = 0.12, 0.95
WIDTH_INCHES, HEIGHT_INCHES = 9.0, 3.9
DOTS_PER_INCH = 160
LEAST_SHARE_WITH_A_NAME = 0.03
MANY_ROUNDS = 9  # so many ticks do not fit


@dataclass(frozen=True)
class Panel:
    """One federation's shares."""

    title: str
    names: tuple[str, ...]  # of the partitions, lowest ranks first
    rounds: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]  # [partition][round], each round's sum is 1


def main(arguments: Sequence[str]) -> None:
    """Reads the results, draws, says where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse_picture")
    parser.add_argument("results", type=Path, help="results.json of `raflora demo`")
    parser.add_argument("picture", type=Path, help="the picture to write, .png or .svg")
    given = parser.parse_args(arguments)
    results = json.loads(given.results.read_text(encoding="utf-8"))
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    ranks = ", ".join(str(site["rank"]) for site in results["sites"])
    caption = f"raflora demo: {len(results['sites'])} sites of ranks {ranks}, the same data and seed {results['seed']}"
    draw([panel_of(federation) for federation in results["federations"]], caption, given.picture)
    print(given.picture)


def panel_of(federation: dict[str, Any]) -> Panel:
    """What one federation's panel shows."""
    rounds = federation["rounds"]
    partitions = rounds[0]["partitions"]
    return Panel(
        title=TITLES.get(federation["method"], federation["method"]),
        names=tuple(f"{p['low'] + 1}-{p['high']}" for p in partitions),
        rounds=tuple(each["round"] for each in rounds),
        shares=tuple(
            tuple(each["partitions"][index]["energy_share"] for each in rounds) for index in range(len(partitions))
        ),
    )


def draw(panels: Sequence[Panel], caption: str, path: Path) -> None:
    """All panels side by side, on one scale."""
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(WIDTH_INCHES, HEIGHT_INCHES), sharey=True, squeeze=False, layout="constrained"
    )
    figure.set_facecolor(PAPER)
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw_panel(axis, panel)
    axes[0][0].set_ylabel("share of the energy", color=INK)
    figure.suptitle("Energy of the global adapter, by rank partition", color=INK, fontsize=13, fontweight="bold")
    figure.supxlabel(caption, color=FAINT, fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor=PAPER)


def _draw_panel(axis: Any, panel: Panel) -> None:
    shades = _shades(len(panel.names))
    axis.stackplot(panel.rounds, panel.shares, colors=shades, edgecolor=PAPER, linewidth=0.8)
    axis.set_xlim(panel.rounds[0], panel.rounds[-1])
    axis.set_ylim(0.0, 1.0)
    axis.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_xticks([number for number in panel.rounds if number % 2 == 0 or len(panel.rounds) < MANY_ROUNDS])
    axis.set_xlabel("round", color=INK)
    axis.set_title(panel.title, color=INK, fontsize=10.5, loc="left")
    axis.tick_params(colors=FAINT, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    _name_partitions(axis, panel)


def _name_partitions(axis: Any, panel: Panel) -> None:
    """Each partition's ranks and its last share beside the right edge; what is thinner than a line goes unnamed."""
    below = 0.0
    for name, shares in zip(panel.names, panel.shares, strict=True):
        last = shares[-1]
        if last >= LEAST_SHARE_WITH_A_NAME:
            axis.annotate(
                f"ranks {name}: {last:.0%}",
                (panel.rounds[-1], below + last / 2),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                annotation_clip=False,
            )
        below += last


def _shades(count: int) -> list[Any]:
    colours = pyplot.get_cmap("viridis")
    step = (HIGHEST_SHADE - LOWEST_SHADE) / max(1, count - 1)
    return [colours(LOWEST_SHADE + step * index) for index in range(count)]


if __name__ == "__main__":
    main(sys.argv[1:])
