"""Adapters as values: their invariants, rank slices, and the first global adapter."""

import numpy as np
import pytest

from common.adapter import (
    MAX_TENSORS,
    Adapter,
    AdapterSpec,
    Factors,
    ModuleShape,
    TensorShape,
    effective,
    initial_adapter,
    shrunk_rank,
    slice_adapter,
)
from common.errors import AdapterMismatch, InvalidRequest, WrongRank

SPEC = AdapterSpec(
    modules=(ModuleShape("value", 6, 8), ModuleShape("query", 8, 5)),
    tensors=(TensorShape("head.weight", (3, 8)), TensorShape("head.bias", (3,)), TensorShape("scale", ())),
)


def trained(spec: AdapterSpec = SPEC, rank: int = 4, seed: int = 7) -> Adapter:
    """An adapter in which no number is zero."""
    numbers = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return numbers.normal(size=shape).astype(np.float32)

    return Adapter(
        {m.name: Factors(drawn(rank, m.in_features), drawn(m.out_features, rank)) for m in spec.modules},
        {t.name: drawn(*t.shape) for t in spec.tensors},
    )


def product(factors: Factors) -> np.ndarray:
    return factors.lora_B.astype(np.float64) @ factors.lora_A.astype(np.float64)


def test_a_spec_is_the_same_in_whatever_order_it_was_written() -> None:
    turned = AdapterSpec(SPEC.modules[::-1], SPEC.tensors[::-1])
    assert turned == SPEC
    assert [module.name for module in SPEC.modules] == ["query", "value"]
    assert SPEC.largest_rank == 5


@pytest.mark.parametrize(
    ("modules", "tensors"),
    [
        ((), ()),
        ((ModuleShape("a", 2, 2), ModuleShape("a", 2, 3)), ()),
        ((ModuleShape("a", 2, 2),), (TensorShape("a", (2,)),)),
        ((ModuleShape("a", 2, 2),), (TensorShape("a.lora_A", (2,)),)),
        ((ModuleShape("a", 2, 2),), (TensorShape("__metadata__", (2,)),)),
        ((ModuleShape("", 2, 2),), ()),
        ((ModuleShape("a\x1b[31m", 2, 2),), ()),
        ((ModuleShape("\ud800", 2, 2),), ()),
        ((ModuleShape("a" * 513, 2, 2),), ()),
        ((ModuleShape("a", 0, 2),), ()),
        ((ModuleShape("a", 2, 2**24 + 1),), ()),
        ((ModuleShape("a", 2, 2),), (TensorShape("t", (0,)),)),
        ((ModuleShape("a", 2, 2),), (TensorShape("t", (-1, -1)),)),
        ((ModuleShape("a", 2, 2),), (TensorShape("t", (1,) * 9),)),
        (tuple(ModuleShape(str(n), 2, 2) for n in range(MAX_TENSORS + 1)), ()),
    ],
)
def test_an_impossible_spec_is_refused(modules: tuple[ModuleShape, ...], tensors: tuple[TensorShape, ...]) -> None:
    with pytest.raises(InvalidRequest, match="adapter spec"):
        AdapterSpec(modules, tensors)


def test_an_adapter_knows_its_spec() -> None:
    assert trained().spec == SPEC
    assert trained(rank=3).rank == 3


def test_factors_share_a_rank_and_modules_too() -> None:
    with pytest.raises(AdapterMismatch, match="do not share a rank"):
        Factors(np.ones((2, 5), np.float32), np.ones((8, 3), np.float32))
    with pytest.raises(AdapterMismatch, match=r"\[2, 3\]"):
        Adapter({"a": trained(rank=2).modules["query"], "b": trained(rank=3).modules["query"]}, {})


def test_nobody_can_change_an_adapters_numbers() -> None:
    adapter = trained()
    for array in (adapter.modules["query"].lora_A, adapter.modules["query"].lora_B, adapter.tensors["head.bias"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("scaling", [1.0, 0.5, 16.0, 0.1])
def test_what_a_client_computes_from_its_slice_is_the_first_directions(scaling: float) -> None:
    adapter = trained(rank=4)
    for rank in range(1, 5):
        received = slice_adapter(adapter, rank, scaling=scaling)
        assert received.rank == rank
        for name, factors in adapter.modules.items():
            expected = product(Factors(factors.lora_A[:rank], factors.lora_B[:, :rank]))
            np.testing.assert_allclose(scaling * product(received.modules[name]), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(received.tensors["head.weight"], adapter.tensors["head.weight"])


def test_effective_undoes_the_slices_scaling() -> None:
    adapter = trained(rank=4)
    again = effective(slice_adapter(adapter, 4, scaling=8.0), scaling=8.0)
    np.testing.assert_array_equal(again.modules["query"].lora_B, adapter.modules["query"].lora_B)


def test_a_slice_of_a_slice_is_the_smaller_slice() -> None:
    adapter = trained(rank=4)
    directly = slice_adapter(adapter, 2, scaling=1.0)
    twice = slice_adapter(slice_adapter(adapter, 3, scaling=1.0), 2, scaling=1.0)
    np.testing.assert_array_equal(directly.modules["value"].lora_A, twice.modules["value"].lora_A)
    np.testing.assert_array_equal(directly.modules["value"].lora_B, twice.modules["value"].lora_B)


def test_a_share_of_a_rank_is_rounded_down_but_not_for_a_binary_error() -> None:
    found = [shrunk_rank(rank, share) for rank, share in [(90, 0.7), (10, 0.7), (4, 0.7), (64, 0.99), (4, 0.2), (8, 0)]]
    assert found == [63, 7, 2, 63, 0, 0]


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_the_adapter_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(WrongRank, match="1 to 4"):
        slice_adapter(trained(rank=4), rank, scaling=1.0)


def test_the_first_adapter_changes_nothing_and_has_no_dead_direction() -> None:
    adapter = initial_adapter(SPEC, rank=5, seed=1)
    for factors in adapter.modules.values():
        assert not factors.lora_B.any()
        np.testing.assert_allclose(factors.lora_A @ factors.lora_A.T, np.eye(5), atol=1e-6)
    assert not adapter.tensors["head.bias"].any()
    assert 0 < np.abs(adapter.tensors["head.weight"]).max() < 0.2


def test_the_first_adapter_follows_from_the_seed_and_the_names_alone() -> None:
    alone = AdapterSpec((ModuleShape("query", 8, 5),))
    first = initial_adapter(SPEC, rank=4, seed=1).modules["query"].lora_A
    np.testing.assert_array_equal(first, initial_adapter(alone, rank=4, seed=1).modules["query"].lora_A)
    assert not np.array_equal(first, initial_adapter(SPEC, rank=4, seed=2).modules["query"].lora_A)


def test_a_global_rank_that_does_not_fit_names_the_narrow_module() -> None:
    with pytest.raises(WrongRank, match="query is 8 x 5, so at most rank 5"):
        initial_adapter(SPEC, rank=6, seed=1)
    with pytest.raises(WrongRank):
        initial_adapter(SPEC, rank=0, seed=1)


def test_a_spec_that_would_fill_the_memory_is_refused_before_anything_is_allocated() -> None:
    side = 1 << 24
    with pytest.raises(InvalidRequest, match=r"at most 1073741824 are allowed"):
        AdapterSpec((ModuleShape("a", 2, 2),), (TensorShape("head", (side, side)),))
    wide = AdapterSpec((ModuleShape("a", side, side),))
    with pytest.raises(InvalidRequest, match="numbers at rank 64"):
        initial_adapter(wide, 64, seed=0)
