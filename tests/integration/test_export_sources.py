"""`raflora export` from a real coordinator, from its export_dir, and from a folder of its own: the same adapter."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from coordinators import CoordinatorProcess, clients_of, observing, settings_of

from cli.export_origin import read_origin
from cli.main import main
from worker.peft_format import read_peft_folder


@dataclass(frozen=True)
class Federation:
    """One that has finished and still answers."""

    address: str
    export_dir: Path


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    settings = settings_of(
        folder,
        export_dir=str(folder / "export"),
        rounds__evaluate_every=1,
        adapter__scaling="alpha_over_sqrt_rank",
        adapter__lora_alpha=3.0,
    )
    process = CoordinatorProcess(folder, settings)
    try:
        address = process.wait_until_listening()
        asyncio.run(finish(address))
        yield Federation(address, folder / "export")
        process.terminate()
    finally:
        process.close()


async def finish(address: str) -> None:
    async with clients_of(address, {"ada": 2, "bob": 4, "eve": 8}) as clients, observing(address) as observer:
        await asyncio.gather(*(client.work() for client in clients))
        await observer.finished()


def export(folder: Path, *flags: object) -> int:
    return main(["export", str(folder), *map(str, flags)])


def product(folder: Path, rank: int) -> np.ndarray:
    """scaling lora_B lora_A of one layer, of the first directions."""
    adapter, scaling = read_peft_folder(folder)
    factors = adapter.modules["encoder.0.query"]
    return scaling * factors.lora_B[:, :rank] @ factors.lora_A[:rank]


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_every_source_gives_the_same_product(rank: int, federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "one", "--coordinator", federation.address, "--rank", rank) == 0
    assert export(tmp_path / "two", "--from", federation.export_dir, "--rank", rank) == 0
    assert export(tmp_path / "three", "--from", tmp_path / "one", "--pad-to", 16) == 0
    expected = product(federation.export_dir, rank)
    for name in ("one", "two", "three"):
        np.testing.assert_allclose(product(tmp_path / name, 16), expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (3, rank not in (1,))


def test_the_best_adapter_is_one_of_a_round_that_was_evaluated(federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "best", "--coordinator", federation.address, "--best") == 0
    origin = read_origin(tmp_path / "best")
    assert origin.best is not None
    assert origin.best.round == origin.round == 1  # the second is no better
    assert origin.adapter_digest
    assert origin.measured is not None
    assert origin.measured.round == 1
    assert [group.updates for group in origin.groups] == [1, 1, 1], "what came later is no part of it"


def test_the_card_has_the_story_of_both_rounds(federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "adapter", "--coordinator", federation.address) == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| round | 2 of 2 |" in card
    for line in ("| 2 | 1 | 10 | 2 |", "| 4 | 1 | 20 | 2 |", "| 8 | 1 | 30 | 2 |"):
        assert line in card
    origin = read_origin(tmp_path / "adapter")
    assert origin.measured is not None
    assert origin.measured.round == 2
    assert origin.measured.federated["accuracy"] == pytest.approx((10 * 2 + 20 * 4 + 30 * 8) / 60 / 8)
    assert not {"ada", "bob", "eve"} & set(card.split())


def test_the_coordinators_own_folder_says_where_it_comes_from(federation: Federation, tmp_path: Path) -> None:
    origin = read_origin(federation.export_dir)
    assert (origin.federation, origin.round, origin.global_rank) == ("digits", 2, 8)
    assert export(tmp_path / "adapter", "--from", federation.export_dir) == 0
    assert "Who trained it" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_folder_knows_how_many_of_its_directions_are_zeros(federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "cut", "--from", federation.export_dir, "--rank", 2, "--pad-to", 16) == 0
    assert export(tmp_path / "again", "--from", tmp_path / "cut") == 0
    assert read_peft_folder(tmp_path / "again")[0].rank == 2
    assert export(tmp_path / "more", "--from", tmp_path / "cut", "--rank", 3) == 3


def test_a_folder_may_be_made_of_itself(federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "one", "--from", federation.export_dir) == 0
    assert export(tmp_path / "one", "--from", tmp_path / "one", "--rank", 2, "--overwrite") == 0
    assert read_peft_folder(tmp_path / "one")[0].rank == 2
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_rank_beyond_the_global_one_is_refused(federation: Federation, tmp_path: Path) -> None:
    assert export(tmp_path / "adapter", "--from", federation.export_dir, "--rank", 9) == 3
    assert export(tmp_path / "adapter", "--coordinator", federation.address, "--rank", 9) == 3
    assert not (tmp_path / "adapter").exists()
