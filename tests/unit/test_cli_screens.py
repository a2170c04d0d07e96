"""The federation as a person sees it."""

from io import StringIO

import pytest
from canned_coordinator import client, finished, partitions, summary, training
from raflora.v1 import status_pb2
from rich.console import Console, RenderableType

from cli.screens import (
    clients_table,
    energy_bar,
    energy_bars,
    energy_comparison,
    joined_line,
    phase_name,
    round_line,
    rounds_table,
    standing_line,
    status_screen,
)


def drawn(screen: RenderableType) -> str:
    console = Console(file=StringIO(), width=140, markup=False, highlight=False, color_system=None)
    console.print(screen)
    return console.file.getvalue()


def lines_of(screen: RenderableType) -> list[str]:
    return [" ".join(line.split()) for line in drawn(screen).splitlines() if line.strip()]


def test_the_screen_says_what_a_person_wants_to_know() -> None:
    lines = lines_of(status_screen(training()))
    assert lines[0] == "digits · image-classification · raflora · global rank 4"
    assert lines[1] == "round 2/20 training 1 of 2 updates, quorum 2, deadline in 42 s"
    assert lines[2] == "! bob is late"
    assert "ada 2 training ████░░░░░░░░░░░░ 10/40 0.500 0.0 s" in lines
    assert "bob 4 done - 1 min 15 s late" in lines
    assert "Energy per rank partition after round 1" in lines
    assert f"1-2 {'█' * 36} 90.0 % 2 clients" in lines
    assert any(line.startswith("rho 0.900 (share within the smallest rank) effective rank 3.2") for line in lines)
    assert any("accuracy 50.0 %" in line for line in lines)
    assert any(line.startswith("2 of 2 clients connected adapter bytes: up 0 B, down 3.0 MiB") for line in lines)
    assert lines[-1] == "Forecast: the energy above rank 2 would halve every 1.6 rounds"


def test_a_notice_about_the_connection_stands_beside_the_last_state() -> None:
    text = drawn(status_screen(training(), notice="reconnecting in 1.0 s"))
    assert "reconnecting in 1.0 s" in text
    assert "10/40" in text


def test_a_federation_that_has_not_begun_has_no_energies() -> None:
    text = drawn(status_screen(status_pb2.FederationStatus(federation="digits", num_rounds=3, paused=True)))
    assert "Energy" not in text
    assert "paused" in text


def test_a_finished_federation_has_no_assignments() -> None:
    assert "10/40" not in drawn(status_screen(finished()))


def test_a_phase_of_a_newer_coordinator_is_a_number() -> None:
    status = status_pb2.FederationStatus()
    status.phase = 77  # type: ignore[assignment]
    assert phase_name(status.phase) == "phase 77"
    assert phase_name(status_pb2.PHASE_WAITING_FOR_CLIENTS) == "waiting for clients"


def test_a_client_name_with_control_characters_does_not_reach_the_terminal() -> None:
    status = training()
    status.assignments[0].client_id = "\x1b[31mada"
    status.explanation = "waiting for \x1b]0;owned\x07"
    assert "\x1b" not in drawn(status_screen(status))
    assert "\x1b" not in drawn(joined_line(client("\x1b[2J", 2)))


def test_square_brackets_of_a_name_are_no_markup() -> None:
    assert "[bold]ada[/bold]" in drawn(clients_table([client("[bold]ada[/bold]", 2)]))


@pytest.mark.parametrize(
    ("share", "cells"),
    [
        (1.0, "████"),
        (0.5, "██  "),
        (0.01, "▏   "),
        (0.0, "    "),
        (7.0, "████"),
        (-1.0, "    "),
        (float("nan"), "    "),
    ],
)
def test_a_bar_is_as_wide_as_it_was_asked_to_be(share: float, cells: str) -> None:
    assert energy_bar(share, 4) == cells


def test_bars_are_aligned_and_say_who_trains_what() -> None:
    bars = partitions(0.75, 0.25, 0.0, 0.0)
    bars[3].contributors, bars[3].rounds_uncovered = 0, 3
    assert drawn(energy_bars(bars, width=4)).splitlines() == [
        " 1-2  ███    75.0 %  2 clients",
        " 3-4  █      25.0 %  2 clients",
        " 5-8          0.0 %  2 clients",
        "9-16          0.0 %  nobody for 3 rounds",
    ]


def test_two_methods_stand_side_by_side() -> None:
    lines = lines_of(energy_comparison("raFLoRA", partitions(0.5, 0.5), "FlexLoRA", partitions(1.0, 1e-6)))
    assert lines[0] == "ranks raFLoRA FlexLoRA"
    assert lines[1] == f"1-2 {'█' * 12} 50.0 % {'█' * 24} 100.0 %"
    assert lines[2] == f"3-4 {'█' * 12} 50.0 % ▏ 0.0001 %"


def test_a_worker_that_joined_is_one_line() -> None:
    assert str(joined_line(client("ada", 4))) == "ada joined: rank 4, 312 examples, adapter 1.5 KiB, cpu"


def test_a_worker_that_was_granted_less_says_so() -> None:
    granted = client("ada", 4)
    granted.max_rank = 16
    assert "rank 4 of 16" in str(joined_line(granted))


def test_a_round_is_one_line() -> None:
    assert str(round_line(summary(3), num_rounds=20)) == (
        "round  3/20  accuracy 50.0 %  loss 0.750  rho 0.900  effective rank 3.2  up 1.5 KiB  down 3.0 MiB  in 13.0 s"
    )


def test_a_round_without_an_evaluation_has_no_accuracy() -> None:
    unmeasured = summary(3)
    del unmeasured.evaluations[:]
    assert "accuracy -  loss -" in str(round_line(unmeasured, num_rounds=9))


def test_the_table_of_rounds_names_contributors_by_partition() -> None:
    lines = lines_of(rounds_table([summary(1), summary(2, accuracy=0.75)]))
    assert lines[0] == "round accuracy loss rho effective rank contributors up down seconds"
    assert lines[2] == "2 75.0 % 0.750 0.900 3.2 1-2:2 3-4:2 1.5 KiB 3.0 MiB 10.0 + 2.0 + 1.0"


def test_the_table_of_clients_has_a_row_each() -> None:
    lines = lines_of(clients_table([client("ada", 2), client("bob", 4)]))
    assert lines[1] == "ada 2 2 active 312 0 cpu - 1.5 KiB 0.0 s -"
    assert len(lines) == 3


def test_where_it_stands_is_one_line() -> None:
    assert str(standing_line(training())) == "round 2/20  training  1 of 2 updates, quorum 2, deadline in 42 s"
