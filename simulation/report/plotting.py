"""How pictures look: colours, ends of lines, SVG that fits into a page. Knows matplotlib, knows no federation.

The object interface only, no pyplot: nothing global is left behind, and no window is ever asked for.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError

# Inks of a page that are replaced by the page's own colours where a picture stands inside it.
INK, FAINT, HAIRLINE, PAPER = "#24292f", "#6e7782", "#d8dee5", "#ffffff"
_PAGE_COLOURS = {INK: "var(--ink)", FAINT: "var(--faint)", HAIRLINE: "var(--line)", PAPER: "var(--paper)"}

# Okabe and Ito's colours, told apart without colour vision; yellow and black are left out, for they vanish on one
# of the two backgrounds. After one turn the dashes change.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
_REFERENCE_COLOUR = "#8a8f98"
_REFERENCE_DASHES: tuple[Any, ...] = ((0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3)))

_FONT_SIZE = 9.0
_DOTS_PER_INCH = 160
_LEFT_HALF = 0.5  # of the axis' width
_LABEL_GAP = 0.058  # of the axis' height: two labels closer than this overlap


@dataclass(frozen=True)
class Style:
    """How one arm is drawn, the same in every picture."""

    colour: str
    dashes: Any
    width: float = 1.8


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader needs beside it."""

    name: str  # of its file, and of its place in a page
    title: str
    caption: str
    figure: Any  # matplotlib's Figure


def styles_for(arms: Sequence[str], references: Sequence[str]) -> Mapping[str, Style]:
    """A style an arm: colours for what is compared, grey for references."""
    styles = {}
    compared = [arm for arm in arms if arm not in references]
    for index, arm in enumerate(compared):
        turn, colour = divmod(index, len(_COLOURS))
        styles[arm] = Style(_COLOURS[colour], _DASHES[turn % len(_DASHES)])
    for index, arm in enumerate(references):
        styles[arm] = Style(_REFERENCE_COLOUR, _REFERENCE_DASHES[index % len(_REFERENCE_DASHES)], 1.4)
    return styles


def new_figure(width_inches: float, height_inches: float, rows: int = 1, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes in reading order. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and only for who draws
        from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f'pictures need {error.name}: pip install "raflora[science]"') from None
    figure = Figure(figsize=(width_inches, height_inches), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True) for axis in row]
    for axis in axes:
        _plain(axis)
    return figure, axes


def whole_rounds(axis: Any, last_round: int) -> None:
    """A horizontal axis of rounds: whole numbers, from the first to the last."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axis.set_xlim(1, max(2, last_round))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=2))
    axis.set_xlabel("round")


def plain_numbers(axis: Any) -> None:
    """0.1, 1, 20 at the ticks of a logarithmic axis (axis.xaxis or axis.yaxis) instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(axis: Any, ends: Sequence[tuple[float, float, str, Style]]) -> None:
    """Writes each line's name where it ends, (x, y, name, style), moved apart where two would overlap.

    What ends in the left half is named there: a leader across the picture would look like a line of its own.
    """
    places = [axis.transAxes.inverted().transform(axis.transData.transform((x, y))) for x, y, _, _ in ends]
    for (x, y, name, _), place in zip(ends, places, strict=True):
        if place[0] < _LEFT_HALF:
            offset = {"xytext": (7, 0), "textcoords": "offset points"}
            axis.annotate(name, (x, y), va="center", color=INK, fontsize=_FONT_SIZE - 0.5, **offset)
    at_edge = sorted((float(place[1]), index) for index, place in enumerate(places) if place[0] >= _LEFT_HALF)
    for (_, index), height in zip(at_edge, _apart([height for height, _ in at_edge]), strict=True):
        x, y, name, style = ends[index]
        # From the middle of the name's left edge; a leader from its centre would run through the name.
        leader = {"arrowstyle": "-", "color": style.colour, "linewidth": 0.6, "linestyle": ":", "relpos": (0.0, 0.5)}
        axis.annotate(
            name,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            color=INK,
            fontsize=_FONT_SIZE - 0.5,
            arrowprops={**leader, "shrinkA": 1, "shrinkB": 2},
            annotation_clip=False,
        )


def id_of(kind: str, arm: str, seed: int | None = None) -> str:
    """Names a line in its picture: as an id must be, without blanks, and no other line's."""
    name = f"{kind}-{arm.replace(' ', ':')}"  # no arm's name has a colon
    return name if seed is None else f"{name}:{seed}"


def svg_of(picture: Picture) -> str:
    """The picture as a document of its own: the same text for the same rows, if it is the first drawing of it."""
    buffer = io.StringIO()
    with _reproducible(picture.name):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        picture.figure.savefig(buffer, format="svg", facecolor=PAPER, metadata=nothing)
    return buffer.getvalue()


def inline_svg(picture: Picture, prefix: str) -> str:
    """The picture as a part of a page: ids that begin with the prefix, the page's own ink and paper."""
    svg = svg_of(picture)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    for colour, variable in _PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    # The page says how wide it is; a reader who cannot see it hears its title.
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return svg.replace("<svg", f'<svg role="img" aria-label="{picture.title}"', 1)


def write_png(picture: Picture, path: Path) -> None:
    """The picture on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reproducible(picture.name):
        picture.figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, facecolor=PAPER)


def _reproducible(salt: str) -> Any:
    import matplotlib  # noqa: PLC0415

    return matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": _FONT_SIZE})


def _plain(axis: Any) -> None:
    """Only what carries the data: two spines, a faint grid."""
    axis.set_facecolor("none")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=FAINT, labelcolor=INK, labelsize=_FONT_SIZE - 0.5, which="both")
    axis.grid(visible=True, color=HAIRLINE, linewidth=0.6)
    axis.set_axisbelow(True)
    for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
        label.set_color(INK)
        label.set_fontsize(_FONT_SIZE)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved as little as needed to keep the gap; the whole stays inside the axis if it can."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LABEL_GAP) if moved else max(height, 0.0))
    top = 1.0
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], top)
        top = moved[index] - _LABEL_GAP
    return moved
