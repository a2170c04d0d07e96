"""What `make bench` says: how far a figure came, what fell short, what became worse, and where it is written."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import recorded
from benchmarks.interleaved import Figure, Goal, Spread
from benchmarks.report import NOT_MEASURED, Report, json_of, markdown_of, sentences_of, verdict_of, with_tables
from benchmarks.report_picture import draw, times_the_bar

SETTING = {"date": "2026-12-01", "cores": "2"}
FASTER = Figure("rounds", "round", Spread(90, 80, 100), "x", Goal(50, 80), "theirs over ours")
FLAT = Figure("rounds", "memory", Spread(120, 120, 120), "KB", Goal(100, 80, at_least=False))
ABSENT = Figure("rivals", "theirs", NOT_MEASURED, "x", Goal(2, 3), "flwr could not be installed")
SECONDS = Figure("rounds", "seconds", Spread(0.5, 0.4, 0.6), "s")


def report(*figures: Figure) -> Report:
    return Report(SETTING, figures)


def test_a_figure_says_how_far_it_came() -> None:
    assert [verdict_of(figure) for figure in (FASTER, FLAT, ABSENT, SECONDS)] == ["goal", "below", "not measured", ""]


def test_what_fell_short_and_what_is_missing_is_said_in_words() -> None:
    assert sentences_of(report(FASTER, FLAT, ABSENT, SECONDS)) == [
        "Below the bar: rounds: memory is 120 KB; at most 100 was asked.",
        "Not measured: rivals: theirs. flwr could not be installed",
    ]


def test_json_has_no_number_where_there_is_none() -> None:
    absent = json.loads(json_of(report(ABSENT)))["figures"][0]
    assert absent["value"] is None
    assert absent["reached"] == "not measured"


def test_a_page_gets_its_tables_between_the_markers_and_keeps_the_rest() -> None:
    page = "# Title\n<!-- bench:rounds: begin; measured, not written by hand -->old<!-- bench:rounds: end -->\nrest\n"
    written = with_tables(page, {"rounds": markdown_of(report(FASTER, FLAT), "rounds")})
    assert "| round | 90 x | 80 to 100 | at least 50 | at least 80 | goal |" in written
    assert "| memory | 120 KB |  | at most 100 | at most 80 | below |" in written
    assert "- round: theirs over ours." in written
    assert "old" not in written
    assert written.startswith("# Title\n")
    assert written.endswith("\nrest\n")
    assert with_tables(written, {"rounds": "new"}).count("bench:rounds") == 2


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for rounds"):
        with_tables("# Title", {"rounds": "table"})


def test_the_page_of_performance_has_a_place_for_every_part() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(part in with_tables(page, {part: part}) for part in bench.PARTS)


@pytest.mark.parametrize(
    ("now", "is_worse"),
    [
        (60.0, True),  # below the recorded spread, and by a third
        (82.0, False),  # within the spread
        (79.0, False),  # out of the spread, but close to the median
        (200.0, False),  # better
        (math.nan, False),  # not measured
    ],
)
def test_a_ratio_is_worse_once_it_left_the_recorded_spread_and_the_tolerance(now: float, is_worse: bool) -> None:
    figure = Figure("rounds", "round", Spread(now, now, now), "x", Goal(50, 80))
    changes = recorded.worse([figure], {"rounds/round": Spread(90, 80, 100)})
    assert bool(changes) is is_worse


def test_less_is_better_where_the_goal_says_so_and_nobody_knows_without_a_goal() -> None:
    before = {"rounds/memory": Spread(80, 79, 81), "rounds/seconds": Spread(0.1, 0.1, 0.1)}
    (change,) = recorded.worse([FLAT, SECONDS, FASTER], before)
    assert change.sentence == "rounds: memory is 120 KB; recorded was 80 (79 to 81)."


def test_recording_one_part_keeps_the_figures_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    recorded.write([FASTER], SETTING, path)
    recorded.write([FLAT, ABSENT], SETTING, path)
    assert recorded.read(path) == {"rounds/round": FASTER.value, "rounds/memory": FLAT.value}


def test_recording_one_part_leaves_the_others_their_day_and_machine(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "recorded.json", {"date": "2026-12-24", "cores": "64"}
    alone = Figure("transfer", "upload", Spread(0.7, 0.6, 0.8), "of raw TCP")
    recorded.write([FASTER, alone], SETTING, path)
    recorded.write([alone, ABSENT], elsewhere, path)
    assert recorded.settings_of(path) == {"rounds": SETTING, "transfer": elsewhere}


def test_a_picture_shows_what_has_a_goal_and_a_number(tmp_path: Path) -> None:
    assert not draw([SECONDS, ABSENT], tmp_path / "none.png")
    assert draw([FASTER, FLAT], tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 1000


def test_twice_as_good_as_the_bar_is_two_whichever_way_is_better() -> None:
    assert times_the_bar(Goal(50, 80), 100) == 2
    assert times_the_bar(Goal(100, 80, at_least=False), 50) == 2


def test_one_case_of_one_part_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.part_and_case("rounds:10mb") == ("rounds", "10mb")
    assert bench.part_and_case("rounds") == ("rounds", None)
    with pytest.raises(SystemExit):
        bench.main(["--only", "sounds"])
    assert "'sounds' is no part" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--repetitions", "3"])
    assert "at least 5" in capsys.readouterr().err
