"""What a method adds to the base: summed densely, never beyond a float, and seen whole in the report."""

import numpy as np
import pytest
from numpy.typing import NDArray

from common.adapter import Adapter, Factors
from common.errors import NotFinite
from coordinator.aggregation.round import EffectiveUpdate
from simulation.base_change import accumulated, base_content, base_of, change_bytes, report_on_model

SHAPES = {"one": (6, 5), "other": (4, 7)}


def random_adapter(rank: int, seed: int = 0) -> Adapter:
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape).astype(np.float32)

    return Adapter({name: Factors(drawn(rank, into), drawn(out, rank)) for name, (out, into) in SHAPES.items()}, {})


def dense(factors: Factors) -> NDArray[np.float64]:
    return np.asarray(factors.lora_B.astype(float) @ factors.lora_A.astype(float))


def test_changes_add_up() -> None:
    first, second = random_adapter(3, seed=0).modules, random_adapter(2, seed=1).modules
    total = accumulated(accumulated({}, first), second)
    for name in ("one", "other"):
        np.testing.assert_allclose(total[name], dense(first[name]) + dense(second[name]), rtol=1e-12)


def test_a_file_of_the_base_gives_the_same_numbers_back() -> None:
    base = accumulated({}, random_adapter(3, seed=0).modules)
    found = base_of(base_content(base))
    assert found.keys() == base.keys()
    assert all(np.array_equal(found[name], base[name]) for name in base)


def test_what_no_weight_could_hold_is_refused() -> None:
    huge = Factors(np.full((1, 5), 1e20, dtype=np.float32), np.full((6, 1), 1e20, dtype=np.float32))
    with pytest.raises(NotFinite, match="one: the change of the base model"):
        accumulated({}, {"one": huge})


def test_the_download_grows_with_the_rank_of_the_change() -> None:
    sizes = [change_bytes(random_adapter(rank).modules) for rank in (1, 2, 3)]
    assert sizes[2] - sizes[1] == pytest.approx(4 * (6 + 5 + 4 + 7), abs=16)  # and a digit of a header
    assert change_bytes({}) == 0


def test_the_report_sees_base_and_adapter_together() -> None:
    adapter = random_adapter(2, seed=2)
    base = accumulated({}, random_adapter(3, seed=0).modules)
    updates = [EffectiveUpdate("ada", adapter, 10)]
    report = report_on_model(base, adapter, updates, (1, 2))
    learned = [base[name] + dense(adapter.modules[name]) for name in ("one", "other")]
    assert report.energy == pytest.approx(sum(float(np.sum(matrix**2)) for matrix in learned))
    assert [(p.low, p.high) for p in report.partitions] == [(0, 1), (1, 2), (2, 5)]
    assert sum(p.energy_share for p in report.partitions) == pytest.approx(1.0)
