"""Draws 1 - rho over rounds: measured dots on the lines that theory draws, where the theorem holds and where not.

It carries its own background, so that it reads the same on a light and on a dark page.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot

from benchmarks.collapse import SMALLEST, share_above
from benchmarks.theorem_tables import Findings
from coordinator.aggregation.low_rank import Matrix

PAPER, INK, FAINT = "#ffffff", "#24292f", "#6e7781"
# Viridis: even steps of lightness, told apart without colour vision, too.
COLOURS = {"raflora": "#414487", "flexlora": "#22a884", "fedit": "#b8a40a"}
NAMES = {"raflora": "raFLoRA", "flexlora": "FlexLoRA", "fedit": "FedIT, zero-padded"}
REGIME_COLOURS = ("#414487", "#22a884", "#b8a40a")
WIDTH_INCHES, HEIGHT_INCHES = 11.0, 3.9
DOTS_PER_INCH = 110
ROUNDS_SHOWN = 50
LEAST_SHARE, MOST = 1e-5, 12.0  # of the logarithmic axis


def draw(findings: Findings, path: Path) -> None:
    """Three panels on one scale: all clients, a draw of them, clients that add signal."""
    figure, axes = pyplot.subplots(
        1, 3, figsize=(WIDTH_INCHES, HEIGHT_INCHES), sharey=True, layout="constrained", squeeze=False
    )
    figure.set_facecolor(PAPER)
    _draw_all_clients(axes[0][0], findings)
    _draw_sampled(axes[0][1], findings)
    _draw_regimes(axes[0][2], findings)
    for axis in axes[0]:
        _dress(axis)
    axes[0][0].set_ylabel("1 - rho: energy above rank 8", color=INK)
    figure.suptitle("Rank collapse: measured (dots) and predicted (lines)", color=INK, fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor=PAPER)
    pyplot.close(figure)


def _draw_all_clients(axis: Any, findings: Findings) -> None:
    for case in findings.cases:
        if case.spectrum == "flat" and case.growth.low == case.growth.high == 1.0:
            colour = COLOURS[case.method]
            _dots(axis, share_above(case.measured), colour, NAMES[case.method])
            axis.plot(share_above(case.exact), color=colour, linewidth=1)
            if case.method != "raflora":
                axis.plot(case.bound, color=colour, linewidth=1, linestyle="--")
    axis.plot([], [], color=FAINT, linestyle="--", linewidth=1, label="the bound C gamma^t")
    axis.set_title("All 10 clients, no training", color=INK, fontsize=10.5, loc="left")


def _draw_sampled(axis: Any, findings: Findings) -> None:
    drawn = findings.sampling
    rounds = np.arange(drawn.average.shape[1])
    start = drawn.average[0, 0]
    left = drawn.average[:, :, SMALLEST:].sum(axis=2) / start[SMALLEST:].sum()
    axis.fill_between(rounds, left.min(axis=0), left.max(axis=0), color=COLOURS["flexlora"], alpha=0.2, linewidth=0)
    expected = (drawn.squares[SMALLEST:] ** rounds[:, None] * start[SMALLEST:]).sum(axis=1) / start[SMALLEST:].sum()
    _dots(axis, drawn.carried[:, :, -1].mean(axis=0) / start[-1], COLOURS["raflora"], "raFLoRA with carry, ranks 49-64")
    axis.plot(rounds, np.ones(len(rounds)), color=COLOURS["raflora"], linewidth=1)
    _dots(axis, drawn.zeroed[:, :, -1].mean(axis=0) / start[-1], COLOURS["fedit"], "the same with zeroing")
    axis.plot(rounds, (1.0 - drawn.absence[-1]) ** rounds, color=COLOURS["fedit"], linewidth=1)
    _dots(axis, left.mean(axis=0), COLOURS["flexlora"], "FlexLoRA, ranks 9-64; all seeds shaded")
    axis.plot(rounds, expected, color=COLOURS["flexlora"], linewidth=1)
    axis.set_title(f"10 of 100 drawn, {len(left)} seeds: energy left", color=INK, fontsize=10.5, loc="left")


def _draw_regimes(axis: Any, findings: Findings) -> None:
    regimes = [regime for regime in findings.regimes if regime.method == "flexlora"]
    for regime, colour in zip(regimes, REGIME_COLOURS, strict=False):
        _dots(axis, share_above(regime.measured)[:ROUNDS_SHOWN], colour, f"{regime.name} a round", every=3)
        axis.plot(share_above(regime.exact)[:ROUNDS_SHOWN], color=colour, linewidth=1)
    axis.plot(regimes[0].bound[:ROUNDS_SHOWN], color=FAINT, linestyle="--", linewidth=1, label="the theorem's bound")
    axis.set_title("FlexLoRA, clients that add signal", color=INK, fontsize=10.5, loc="left")


def _dots(axis: Any, values: Matrix, colour: str, label: str, every: int = 1) -> None:
    rounds = np.arange(0, len(values), every)
    axis.plot(rounds, values[rounds], "o", color=colour, markersize=4, label=label)


def _dress(axis: Any) -> None:
    axis.set_yscale("log")
    axis.set_ylim(LEAST_SHARE, MOST)
    axis.set_xlabel("round", color=INK)
    axis.tick_params(colors=FAINT, length=0, which="both")
    axis.grid(axis="y", color="#eaeef2", linewidth=0.8)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left")
