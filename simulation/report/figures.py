"""The pictures of an experiment, each a pure function of rows: accuracy, energies, the theorem's bound, traffic.

matplotlib is loaded when the first is drawn. Every line is a mean over the finished seeds, every band (of up to six
arms) reaches from the lowest seed to the highest; a run that diverged is drawn as far as it came, alone and with a
cross at its end.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from simulation.report.plotting import (
    INK,
    Picture,
    Style,
    id_of,
    label_ends,
    new_figure,
    plain_numbers,
    styles_for,
    whole_rounds,
)
from simulation.report.summary import energy_above
from simulation.report.tables import MEBI
from simulation.results import PartitionRow, Results, RoundRow, RunKey, RunRow
from simulation.schedule import FINISHED

_WIDE, _HIGH = 7.6, 3.7
_PANELS_IN_A_ROW = 3
_MOST_BANDS = 6  # arms; the bands of more hide the lines
_PANEL_HEIGHT = 2.15
_LEAST_ENERGY = 1e-8  # below it a share of float32 factors is noise
_LEAST_SHARE_WITH_A_NAME = 0.05
_LOWEST_TONE = 0.08  # of the colour map: its ends are hard to tell from black and white


@dataclass(frozen=True)
class Material:
    """One stage's rows, sorted by arm, and how arms look."""

    arms: tuple[str, ...]
    styles: Mapping[str, Style]
    runs: Mapping[str, tuple[RunRow, ...]]
    rounds: Mapping[RunKey, tuple[RoundRow, ...]]
    partitions: Mapping[RunKey, tuple[PartitionRow, ...]]
    test: Mapping[RunKey, Mapping[tuple[int, int], float]]  # accuracy at (round, rank)

    @property
    def last_round(self) -> int:
        """Of the longest run."""
        return max((rows[-1].round for rows in self.rounds.values() if rows), default=1)

    @property
    def has_bands(self) -> bool:
        """Whether there are few enough arms for their spreads to be told apart."""
        return len(self.arms) <= _MOST_BANDS

    @property
    def mixed(self) -> tuple[str, ...]:
        """The arms whose clients have several ranks."""
        return tuple(arm for arm in self.arms if self.runs[arm][0].smallest_rank < self.runs[arm][0].global_rank)


def draw_all(results: Results, arms: Sequence[str] = ()) -> tuple[Picture, ...]:
    """Every picture of one stage's rows for which there are rows. Raises ConfigError without matplotlib."""
    material = gather(results, arms)
    if not material.arms:
        return ()
    pictures = [accuracy_over_rounds(material)]
    if material.mixed:
        pictures += [energy_above_smallest(material), energy_per_partition(material)]
    pictures += [accuracy_at_ranks(material), norm_over_rounds(material), accuracy_against_download(material)]
    return tuple(pictures)


def gather(results: Results, arms: Sequence[str] = ()) -> Material:
    """Sorts one stage's rows; arms in this order, others behind as they came."""
    present = list(dict.fromkeys(run.key.arm for run in results.runs))
    ordered = tuple(dict.fromkeys([*(arm for arm in arms if arm in present), *present]))
    runs = {arm: tuple(run for run in results.runs if run.key.arm == arm) for arm in ordered}
    references = [arm for arm in ordered if runs[arm][0].smallest_rank == runs[arm][0].global_rank]
    test: dict[RunKey, dict[tuple[int, int], float]] = {}
    for row in results.accuracy:
        if row.split == "test":
            test.setdefault(row.key, {})[row.round, row.rank] = row.accuracy
    return Material(
        arms=ordered,
        styles=styles_for(ordered, references),
        runs=runs,
        rounds=_grouped(sorted(results.rounds, key=lambda row: row.round)),
        partitions=_grouped(sorted(results.partitions, key=lambda row: (row.round, row.low))),
        test=test,
    )


def accuracy_over_rounds(material: Material) -> Picture:
    """Test accuracy at the global rank in every round that was evaluated."""
    figure, (axis,) = new_figure(_WIDE, _HIGH)

    def curve(run: RunRow) -> Mapping[float, float]:
        found = material.test.get(run.key, {})
        return {number: 100 * accuracy for (number, rank), accuracy in found.items() if rank == run.global_rank}

    ends = _curves(axis, material, material.arms, curve)
    whole_rounds(axis, material.last_round)
    axis.set_ylabel("test accuracy, %")
    label_ends(axis, ends)
    bands = "Band: lowest to highest seed." if material.has_bands else "So many arms are drawn without their spread."
    caption = f"The global adapter at its full rank on the test split, mean over seeds. {bands}"
    return Picture("accuracy", "Accuracy over rounds", caption, figure)


def energy_above_smallest(material: Material) -> Picture:
    """The measured share of energy above the smallest rank, and what the theorem allows a rank-agnostic average."""
    figure, (axis,) = new_figure(_WIDE, _HIGH)

    def curve(run: RunRow) -> Mapping[float, float]:
        by_round: dict[int, list[PartitionRow]] = {}
        for row in material.partitions.get(run.key, ()):
            by_round.setdefault(row.round, []).append(row)
        shares = {number: energy_above(rows, run.smallest_rank) for number, rows in by_round.items()}
        return {number: max(share, _LEAST_ENERGY) for number, share in shares.items()}

    ends = _curves(axis, material, material.mixed, curve)
    bounded = _rank_agnostic(material)
    for arm in bounded:
        bound = _bound(material, arm)
        axis.plot(
            list(bound), list(bound.values()), color=INK, linewidth=1.1, linestyle=(0, (4, 2)), gid=id_of("bound", arm)
        )
        visible = {number: value for number, value in bound.items() if value >= 10 * _LEAST_ENERGY}
        if visible:
            at = sorted(visible)[3 * len(visible) // 4]
            axis.annotate(
                rf"bound $C\,\gamma^t$ on {arm}",
                (at, visible[at]),
                xytext=(5, 2),
                textcoords="offset points",
                ha="left",
                va="bottom",
                color=INK,
                fontsize=8.5,
            )
    axis.set_yscale("log")
    lowest = min((y for line in axis.lines for y in line.get_ydata() if y > 0), default=_LEAST_ENERGY)
    axis.set_ylim(max(lowest / 2, _LEAST_ENERGY / 2), 1.5)
    whole_rounds(axis, material.last_round)
    axis.set_ylabel("energy above the smallest rank (log)")
    label_ends(axis, ends)
    smallest = sorted({material.runs[arm][0].smallest_rank for arm in material.mixed})
    of_rank = f"rank {smallest[0]}" if len(smallest) == 1 else f"each arm's own smallest rank ({_listed(smallest)})"
    caption = (
        f"Share of the global update's energy above {of_rank}, on a logarithmic scale; shares below "
        f"{_LEAST_ENERGY:g} are drawn there."
    )
    if bounded:
        caption += (
            f" Dashed: Theorem 4.4's bound C gamma^t on {', '.join(bounded)}, with C from its first round with energy "
            "and gamma from the census of ranks and the sampling. The theorem leaves out what training adds anew in "
            "every round: where the curve lies above the line, it overstates the collapse."
        )
    return Picture("energy-above", "Energy above the smallest rank, and the theorem", caption, figure)


def energy_per_partition(material: Material) -> Picture:
    """Stacked shares of energy per rank partition, one panel an arm."""
    arms = material.mixed
    columns = min(_PANELS_IN_A_ROW, len(arms))
    rows = math.ceil(len(arms) / columns)
    width = _WIDE if columns > 1 else _WIDE / 1.6
    figure, axes = new_figure(width, _PANEL_HEIGHT * rows + 0.3, rows, columns)
    for axis, arm in zip(axes, arms, strict=False):
        _stack(axis, material, arm)
    for axis in axes[len(arms) :]:
        axis.set_visible(False)
    figure.supxlabel("round", color=INK, fontsize=9)
    figure.supylabel("share of energy, %", color=INK, fontsize=9)
    caption = (
        "Which ranks of the global update carry its energy: mean over seeds, lowest ranks darkest and at the bottom, "
        "the same ranks in the same colour in all panels; bands that end with "
        f"{_LEAST_SHARE_WITH_A_NAME:.0%} or more bear their names. "
        "An arm whose upper bands vanish has lost what only its larger clients could train."
    )
    return Picture("energy-partitions", "Energy per rank partition over rounds", caption, figure)


def accuracy_at_ranks(material: Material) -> Picture:
    """Test accuracy of the final adapter, cut to each rank that a client has."""
    figure, (axis,) = new_figure(_WIDE, _HIGH)

    def curve(run: RunRow) -> Mapping[float, float]:
        found = material.test.get(run.key, {})
        return {rank: 100 * accuracy for (number, rank), accuracy in sorted(found.items()) if number == run.rounds}

    ranks = sorted({rank for of_run in material.test.values() for _, rank in of_run})
    axis.set_xscale("log", base=2)
    ends = _curves(axis, material, material.arms, curve, marker="o", only_finished=True)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set_xlabel("rank of the client's slice")
    axis.set_ylabel("test accuracy, %")
    label_ends(axis, ends)
    caption = (
        "After the last round: what a client of each rank receives, its slice of the global adapter. An arm in which "
        "all clients have one rank is a single point."
    )
    return Picture("accuracy-ranks", "Accuracy at each client's rank", caption, figure)


def norm_over_rounds(material: Material) -> Picture:
    """The Frobenius norm of the global update: where it grows and grows, training diverges."""
    figure, (axis,) = new_figure(_WIDE, _HIGH)

    def curve(run: RunRow) -> Mapping[float, float]:
        return {row.round: row.norm for row in material.rounds.get(run.key, ()) if 0 < row.norm < math.inf}

    ends = _curves(axis, material, material.arms, curve)
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    whole_rounds(axis, material.last_round)
    axis.set_ylabel("norm of the global update (log)")
    label_ends(axis, ends)
    caption = (
        "A norm that keeps doubling while the loss rises is divergence. A cross marks where a run could "
        "publish no further round."
    )
    return Picture("norm", "Norm of the global update", caption, figure)


def accuracy_against_download(material: Material) -> Picture:
    """Accuracy against the bytes that all clients together have downloaded so far."""
    figure, (axis,) = new_figure(_WIDE, _HIGH)

    def curve(run: RunRow) -> Mapping[float, float]:
        sent = accumulate(row.download_bytes for row in material.rounds.get(run.key, ()))
        numbers = (row.round for row in material.rounds.get(run.key, ()))
        so_far = dict(zip(numbers, sent, strict=True))
        found = material.test.get(run.key, {})
        return {
            number: so_far[number] / MEBI
            for number, rank in found
            if rank == run.global_rank and so_far.get(number, 0) > 0
        }

    ends = []
    for arm in material.arms:
        spent = _means([curve(run) for run in _finished(material, arm)])
        reached = _means([_full_rank(material, run) for run in _finished(material, arm)])
        shared = sorted(set(spent) & set(reached))
        if shared:
            style = material.styles[arm]
            xs, ys = [spent[number] for number in shared], [100 * reached[number] for number in shared]
            axis.plot(xs, ys, color=style.colour, linestyle=style.dashes, linewidth=style.width, gid=id_of("line", arm))
            axis.plot(xs[-1:], ys[-1:], color=style.colour, marker="o", markersize=4)
            ends.append((xs[-1], ys[-1], arm, style))
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    axis.set_xlabel("downloaded by all clients so far, MiB (log)")
    axis.set_ylabel("test accuracy, %")
    label_ends(axis, ends)
    caption = "What accuracy costs on the wire: mean over seeds, one point an evaluation; up and to the left is better."
    return Picture("accuracy-download", "Accuracy against download", caption, figure)


Curve = Callable[[RunRow], Mapping[float, float]]


def _curves(
    axis: Any, material: Material, arms: Iterable[str], curve: Curve, *, marker: str = "", only_finished: bool = False
) -> list[tuple[float, float, str, Style]]:
    """A line with its band for every arm, and where the lines end."""
    ends = []
    for arm in arms:
        style = material.styles[arm]
        finished = [found for run in _finished(material, arm) if (found := curve(run))]
        means = _means(finished)
        xs = sorted(means)
        if xs:
            single = {"marker": marker or "o", "markersize": 4} if marker or len(xs) == 1 else {}
            ys = [means[x] for x in xs]
            drawn = {"color": style.colour, "linestyle": style.dashes, "linewidth": style.width}
            axis.plot(xs, ys, gid=id_of("line", arm), **drawn, **single)
            if len(finished) > 1 and material.has_bands:
                low = [min(found[x] for found in finished if x in found) for x in xs]
                high = [max(found[x] for found in finished if x in found) for x in xs]
                axis.fill_between(xs, low, high, color=style.colour, alpha=0.16, linewidth=0)
            ends.append((xs[-1], ys[-1], arm, style))
        lost = [] if only_finished else [run for run in material.runs[arm] if run.status != FINISHED]
        for run in lost:
            found = curve(run)
            xs = sorted(found)
            if xs:
                axis.plot(
                    xs,
                    [found[x] for x in xs],
                    color=style.colour,
                    linestyle=style.dashes,
                    linewidth=0.9,
                    gid=id_of("lost", arm, run.key.seed),
                )
                axis.plot(xs[-1:], [found[xs[-1]]], color=style.colour, marker="x", markersize=6, markeredgewidth=1.6)
        if lost and not finished and (found := curve(lost[0])):
            ends.append((max(found), found[max(found)], f"{arm} ({lost[0].status.partition(':')[0]})", style))
    return ends


def _stack(axis: Any, material: Material, arm: str) -> None:
    from matplotlib import colormaps  # noqa: PLC0415 - an extra, and only for who draws

    shares: dict[tuple[int, int], dict[int, list[float]]] = {}
    for run in _finished(material, arm) or material.runs[arm]:
        for row in material.partitions.get(run.key, ()):
            shares.setdefault((row.low, row.high), {}).setdefault(row.round, []).append(100 * row.energy_share)
    axis.set_title(arm, color=INK, fontsize=9, loc="left")
    if not shares:
        return
    bands = sorted(shares)
    # The same indices have the same colour in every panel, whatever the levels of an arm are.
    highest = max(run.global_rank for of_arm in material.runs.values() for run in of_arm)
    rounds = sorted(set.intersection(*(set(shares[band]) for band in bands)))
    heights = [[fmean(shares[band][number]) for number in rounds] for band in bands]
    places = [math.log2(high) / max(1.0, math.log2(highest)) for _, high in bands]
    tones = [_LOWEST_TONE + (1 - 2 * _LOWEST_TONE) * place for place in places]
    colours = [colormaps["viridis"](tone) for tone in tones]
    axis.stackplot(rounds, heights, colors=colours, linewidth=0)
    whole_rounds(axis, material.last_round)
    axis.set_xlabel("")
    axis.set_ylim(0, 100)
    floor = 0.0
    for band, tone, height in zip(bands, tones, heights, strict=True):
        if height[-1] >= 100 * _LEAST_SHARE_WITH_A_NAME:
            name = f"{band[0] + 1}–{band[1]}"  # noqa: RUF001 - a range is set with this dash
            ink = "#fefefe" if tone < 0.55 else "#101010"
            axis.annotate(
                name,
                (rounds[-1], floor + height[-1] / 2),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=7.5,
                color=ink,
            )
        floor += height[-1]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _rank_agnostic(material: Material) -> tuple[str, ...]:
    """The arm that the theorem is about: the first with FlexLoRA's average and several ranks."""
    return tuple(arm for arm in material.mixed if material.runs[arm][0].method == "flexlora")[:1]


def _bound(material: Material, arm: str) -> Mapping[int, float]:
    """C gamma^t over the rounds, t counted from the first round; C and gamma are means over the seeds."""
    runs = [run for run in material.runs[arm] if math.isfinite(run.initial_energy_ratio)]
    numbers = sorted({row.round for run in runs for row in material.rounds.get(run.key, ())})
    if not numbers:
        return {}
    first = fmean(run.initial_energy_ratio for run in runs)
    factor = fmean(run.forecast_factor for run in runs)
    bound = {number: first * factor ** (number - numbers[0]) for number in numbers}
    return {number: value for number, value in bound.items() if value >= _LEAST_ENERGY}


def _full_rank(material: Material, run: RunRow) -> Mapping[float, float]:
    found = material.test.get(run.key, {})
    return {number: accuracy for (number, rank), accuracy in found.items() if rank == run.global_rank}


def _finished(material: Material, arm: str) -> tuple[RunRow, ...]:
    return tuple(run for run in material.runs[arm] if run.status == FINISHED)


def _means(curves: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """The mean of all curves that have a value there."""
    places = {x for curve in curves for x in curve}
    return {x: fmean(curve[x] for curve in curves if x in curve) for x in sorted(places)}


def _grouped(rows: Iterable[Any]) -> dict[RunKey, tuple[Any, ...]]:
    found: dict[RunKey, list[Any]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return {key: tuple(of_run) for key, of_run in found.items()}
