"""The parts of the measurements that measure nothing: what takes turns, what is pinned, what grows, and by how much."""

from pathlib import Path

import pytest

from benchmarks.interleaved import Turn
from benchmarks.load.growth import Grown, markdown_of
from benchmarks.load.growth_cases import Case, Sweep, sweeps
from benchmarks.load.growth_rounds import Row
from benchmarks.programs import take_turns
from benchmarks.rivals.environment import PACKAGES, Rivals, requirements
from benchmarks.rounds.parts import SIZES
from common.codec import Layout


def test_turns_alternate_and_the_first_of_each_is_not_counted() -> None:
    order: list[str] = []

    def contender(name: str) -> Turn:
        order.append(name)
        return Turn(float(len(order)), 0.0)

    turns = take_turns({"ours": lambda: contender("ours"), "theirs": lambda: contender("theirs")}, 2)
    assert order == ["ours", "theirs"] * 3
    assert [turn.wall_seconds for turn in turns["ours"]] == [3.0, 5.0]


def test_rounds_carry_as_many_bytes_as_their_name_says() -> None:
    assert SIZES["empty"].flower_bytes == 0
    assert SIZES["10mb"].flower_bytes == pytest.approx(10e6, rel=0.05)
    assert SIZES["50mb"].flower_bytes == pytest.approx(50e6, rel=0.05)


def test_every_rival_is_pinned_and_torch_comes_first() -> None:
    assert set(requirements()) == set(PACKAGES)
    assert next(iter(requirements())) == "torch"


def test_what_is_not_installed_is_named_with_its_reason() -> None:
    rivals = Rivals(Path("nowhere"), {"torch": "2.13.0"}, ("flwr 1.42.0: no matching distribution",))
    assert rivals.why_not("torch") == ""
    assert rivals.why_not("torch", "flwr") == "flwr could not be installed: flwr 1.42.0: no matching distribution"


def test_growth_changes_one_quantity_at_a_time() -> None:
    modules, clients = sweeps([100, 10], [], [1])
    assert [case.clients for case in clients.cases] == [10, 100]
    assert modules.cases == (Case(modules=1),)
    assert {case.global_rank for sweep in (clients, modules) for case in sweep.cases} == {Case().global_rank}


def test_a_case_counts_its_directions_and_bytes() -> None:
    case = Case(clients=4, global_rank=8, modules=2)
    assert [case.rank_of(i) for i in range(4)] == [2, 4, 8, 2]
    assert case.directions == 16
    assert case.bytes_each_way == sum(Layout(case.spec, rank).size_bytes for rank in (2, 4, 8, 2))


def test_a_case_that_was_not_begun_is_named() -> None:
    small, large = Case(clients=10), Case(clients=10_000)
    row = Row(small, 3, 0.5, 0.25, 0.4, 0.1, 130.0, 120.0, 165.0, 90.0, 1.0)
    table = markdown_of(Grown(Sweep("clients", (small, large)), (row,), (large,)))
    assert "| 10 | 16 | 4 | 2.2 | 0.50 | 0.25 | 0.40 | 40.0 | 130 | 120 | 0.10 |" in table
    assert table.endswith("Not begun, the time was up: 10,000 clients.")
