"""Pictures show the series they claim to, as SVG and as PNG."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from simulated_rows import a_run, an_experiment, key

pytest.importorskip("matplotlib")

from simulation.report.figures import draw_all, energy_above_smallest, gather
from simulation.report.plotting import Picture, inline_svg, styles_for, svg_of, write_png
from simulation.results import Results

SVG = "{http://www.w3.org/2000/svg}"
MIXED = {"raflora", "flexlora", "flora"}
REFERENCES = {"all-rank-4", "all-rank-16"}


def pictures_of(results: Results) -> dict[str, Picture]:
    return {picture.name: picture for picture in draw_all(results)}


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    return pictures_of(an_experiment())


def ids_in(svg: str) -> set[str]:
    return {element.get("id", "") for element in ElementTree.fromstring(svg).iter()}  # noqa: S314 - our own text


def lines_in(picture: Picture) -> set[str]:
    return {name.removeprefix("line-") for name in ids_in(svg_of(picture)) if name.startswith("line-")}


def texts_in(picture: Picture) -> list[str]:
    root = ElementTree.fromstring(svg_of(picture))  # noqa: S314 - our own text
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def test_every_picture_is_a_document_of_its_own(pictures: dict[str, Picture]) -> None:
    assert set(pictures) == {
        *("accuracy", "energy-above", "energy-partitions", "accuracy-ranks", "norm", "accuracy-download")
    }
    for picture in pictures.values():
        assert ElementTree.fromstring(svg_of(picture)).tag == f"{SVG}svg"  # noqa: S314 - our own text


@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("accuracy", MIXED | REFERENCES),
        ("energy-above", MIXED),
        ("accuracy-ranks", MIXED | REFERENCES),
        ("norm", MIXED | REFERENCES),
        ("accuracy-download", MIXED | REFERENCES),
    ],
)
def test_a_picture_has_a_line_and_a_name_for_every_arm(pictures: dict[str, Picture], name: str, arms: set[str]) -> None:
    picture = pictures[name]
    assert lines_in(picture) == arms
    assert arms <= set(texts_in(picture))


def test_energies_have_a_panel_for_every_arm_of_several_ranks(pictures: dict[str, Picture]) -> None:
    assert set(texts_in(pictures["energy-partitions"])) >= MIXED


def test_the_bound_is_drawn_from_the_first_rows_ratio_and_factor() -> None:
    picture = energy_above_smallest(gather(an_experiment(rounds=3)))
    (axis,) = picture.figure.axes
    (bound,) = [line for line in axis.lines if line.get_gid() == "bound-flexlora"]
    # C = 0.6 and gamma = 0.25, as the rows say; the first round is t = 0.
    assert list(bound.get_xdata()) == [1, 2, 3]
    assert list(bound.get_ydata()) == pytest.approx([0.6, 0.15, 0.0375])


def test_a_line_is_the_mean_over_seeds() -> None:
    results = a_run(key("raflora", 0), 0.8) + a_run(key("raflora", 1), 0.6)
    (axis,) = pictures_of(results)["accuracy"].figure.axes
    (line,) = [line for line in axis.lines if line.get_gid() == "line-raflora"]
    assert line.get_ydata()[-1] == pytest.approx(70.0)


def test_an_accuracy_of_an_earlier_round_is_not_drawn_as_the_last() -> None:
    found = a_run(key("raflora"), 0.8)
    earlier = replace(found, accuracy=tuple(row for row in found.accuracy if row.round < 3))
    (axis,) = pictures_of(earlier)["accuracy-ranks"].figure.axes
    assert not axis.lines


def test_more_than_six_arms_are_drawn_without_bands() -> None:
    def bands(arms: int) -> int:
        results = Results()
        for number in range(arms):
            results += a_run(key(f"arm {number}"), 0.5) + a_run(key(f"arm {number}", 1), 0.6)
        (axis,) = pictures_of(results)["accuracy"].figure.axes
        return len(axis.collections)

    assert bands(6) == 6
    assert bands(7) == 0


def test_the_caption_names_every_smallest_rank() -> None:
    results = a_run(key("raflora"), 0.8) + a_run(key("low"), 0.8)
    lower = replace(results, runs=(results.runs[0], replace(results.runs[1], smallest_rank=2)))
    assert "above rank 4," in pictures_of(results)["energy-above"].caption
    assert "above each arm's own smallest rank (2, 4)," in pictures_of(lower)["energy-above"].caption


def test_a_diverged_run_is_drawn_apart_and_named() -> None:
    lost = a_run(key("hot"), 0.5, status="diverged: not finite")
    picture = pictures_of(an_experiment() + lost)["norm"]
    assert "lost-hot:0" in ids_in(svg_of(picture))
    assert "hot (diverged)" in texts_in(picture)
    assert "hot" not in lines_in(picture)


def test_references_alone_have_no_energy_to_lose() -> None:
    results = a_run(key("all-rank-4"), 0.7, levels=(4,))
    assert "energy-above" not in pictures_of(results)


def test_no_rows_no_pictures() -> None:
    assert draw_all(Results()) == ()


def test_the_same_rows_give_the_same_bytes() -> None:
    first, second = (svg_of(energy_above_smallest(gather(an_experiment()))) for _ in range(2))
    assert first == second


def test_ids_in_a_page_never_meet(pictures: dict[str, Picture]) -> None:
    picture = pictures["accuracy"]
    one, other = inline_svg(picture, "a"), inline_svg(picture, "b")
    assert 'id="a-' in one
    assert not ids_in(one) & ids_in(other) - {""}
    assert "http" not in one
    assert "var(--ink)" in one


def test_a_png_is_a_png(pictures: dict[str, Picture], tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "accuracy.png"
    write_png(pictures["accuracy"], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_many_arms_with_long_names_still_fit() -> None:
    results = Results()
    for number in range(18):
        results += a_run(
            key(f"an arm whose name is as long as names may ever be, number {number:02}"), 0.5 + number / 99
        )
    assert svg_of(energy_above_smallest(gather(results)))


def test_eighteen_arms_look_different() -> None:
    styles = styles_for([f"arm-{number}" for number in range(18)], [])
    assert len({(style.colour, str(style.dashes)) for style in styles.values()}) == 18


def test_matplotlib_is_loaded_by_the_first_picture_and_pyplot_never() -> None:
    code = (
        "import sys, simulation.report.figures, simulation.report.render\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from simulated_rows import an_experiment\n"
        "assert simulation.report.figures.draw_all(an_experiment())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}\n" + code
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
