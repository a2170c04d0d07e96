"""Files are looked at in processes that may die: the coordinator goes on, and the next file gets a new process."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape, initial_adapter
from common.codec import Layout, WireDtype, encode
from common.errors import AdapterMismatch, InspectionFailed, NotFinite, OutOfBounds, WrongSize
from coordinator.inspection import Inspection, inspect_file
from coordinator.inspectors import Allowance, Inspectors

SPEC = AdapterSpec((ModuleShape("a", 7, 5), ModuleShape("b", 4, 9)), (TensorShape("bias", (3,)),))
PLANTED = Path(__file__).parent.parent / "faults" / "planted_inspection.py"
PLENTY = Allowance(seconds=60.0, memory_bytes=1 << 30)


def filled(rank: int, seed: int = 0) -> Adapter:
    numbers = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return numbers.normal(size=shape).astype(np.float32)

    modules = {m.name: Factors(drawn(rank, m.in_features), drawn(m.out_features, rank)) for m in SPEC.modules}
    return Adapter(modules, {"bias": drawn(3)})


def inspection_of(folder: Path, content: bytes, layout: Layout) -> Inspection:
    path = folder / "update"
    path.write_bytes(content)
    return Inspection(path, layout, "client 'ada', round 1")


def planted(name: str, allowance: Allowance = PLENTY) -> Inspectors:
    return Inspectors(allowance, (sys.executable, str(PLANTED), name))


@pytest.fixture
def good(tmp_path: Path) -> Inspection:
    return inspection_of(tmp_path, encode(filled(3)), Layout(SPEC, 3))


async def test_a_good_file_passes_and_its_norms_come_back(good: Inspection) -> None:
    inspectors = Inspectors(PLENTY)
    asked = replace(good, bounds=(1, 3), scaling=0.5)
    assert await inspectors.inspect(asked) == pytest.approx(inspect_file(asked), rel=1e-12)
    assert await inspectors.inspect(good) == ()
    inspectors.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c[:-4] + np.float32("nan").tobytes(), NotFinite),
        (lambda c: c[:-4] + np.float32(2e4).tobytes(), OutOfBounds),
        (lambda c: c + b"x", WrongSize),
        (lambda c: b"\xff" * len(c), AdapterMismatch),
    ],
)
async def test_what_is_wrong_comes_back_with_its_type(good: Inspection, change, error: type[Exception]) -> None:
    good.path.write_bytes(change(good.path.read_bytes()))
    inspectors = Inspectors(PLENTY)
    with pytest.raises(error, match="client 'ada', round 1") as raised:
        await inspectors.inspect(good)
    assert type(raised.value) is error
    inspectors.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("abort", "was ended by SIGABRT"),
        ("leave", "ended with status 3"),
        ("hog", f"needed more than {1 << 30} bytes"),
        ("bug", "failed with ZeroDivisionError"),
        ("garbage", "was ended by SIGKILL"),
    ],
)
async def test_a_process_that_dies_costs_its_upload_alone(good: Inspection, name: str, says: str) -> None:
    inspectors = planted(name)
    for _ in range(2):  # the second one meets a new process, and not a broken pipe
        with pytest.raises(InspectionFailed, match=says):
            await inspectors.inspect(good)
    inspectors.close()
    others = Inspectors(PLENTY)
    assert await others.inspect(good) == ()
    others.close()


@pytest.mark.parametrize("name", ["loop", "stop"])
async def test_a_process_that_takes_too_long_is_ended(good: Inspection, name: str) -> None:
    inspectors = planted(name, Allowance(seconds=0.5, memory_bytes=1 << 30))
    with pytest.raises(InspectionFailed, match=r"took longer than 0.5 s"):
        await inspectors.inspect(good)
    inspectors.close()


async def test_a_death_among_many_harms_no_other(good: Inspection) -> None:
    inspectors = planted("first_name")
    bad = replace(good, whose="client 'bob', round 1")
    results = await asyncio.gather(
        *(inspectors.inspect(bad if index % 3 == 0 else good) for index in range(9)), return_exceptions=True
    )
    assert [isinstance(result, InspectionFailed) for result in results] == [index % 3 == 0 for index in range(9)]
    assert [result for index, result in enumerate(results) if index % 3] == [()] * 6
    inspectors.close()


async def test_a_coordinator_that_ends_waits_for_nobody(good: Inspection) -> None:
    inspectors = planted("loop")
    waiting = asyncio.create_task(inspectors.inspect(good))
    while not inspectors._busy:  # noqa: ASYNC110 - a thread begins it, and tells nobody
        await asyncio.sleep(0)
    inspectors.close()
    with pytest.raises(InspectionFailed, match="SIGKILL"):
        await waiting


async def test_the_smallest_allowance_is_enough_for_a_file_that_is_larger(tmp_path: Path) -> None:
    spec = AdapterSpec((ModuleShape("wide", 1 << 16, 1 << 22),))
    layout = Layout(spec, 16)
    path = tmp_path / "update"
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size_bytes)  # zeros, and no space on disk
    assert layout.size_bytes > 256 << 20
    inspectors = Inspectors(Allowance(60.0, 256 << 20))
    assert await inspectors.inspect(Inspection(path, layout, "ada", bounds=(4, 16))) == (0.0, 0.0)
    inspectors.close()


@given(
    rank=st.integers(1, 4),
    cuts=st.sets(st.integers(1, 4)),
    scaling=st.floats(-4, 4),
    dtype=st.sampled_from(WireDtype),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_the_norms_are_those_of_the_products(  # noqa: PLR0917 - hypothesis hands them over
    tmp_path_factory: pytest.TempPathFactory, rank: int, cuts: set[int], scaling: float, dtype: WireDtype, seed: int
) -> None:
    adapter, bounds = filled(rank, seed), tuple(sorted({min(cut, rank) for cut in cuts} | {rank}))
    found = inspection_of(tmp_path_factory.mktemp("norms"), encode(adapter, dtype), Layout(SPEC, rank, dtype))
    norms = inspect_file(replace(found, bounds=bounds, scaling=scaling))
    for low, high, norm in zip((0, *bounds), bounds, norms, strict=False):
        products = [scaling * f.lora_B[:, low:high] @ f.lora_A[low:high] for f in adapter.modules.values()]
        expected = np.sqrt(sum(np.sum(product.astype(np.float64) ** 2) for product in products))
        assert norm == pytest.approx(expected, rel=2e-2 if dtype is not WireDtype.FLOAT32 else 1e-5, abs=1e-6)


async def test_a_lora_A_that_was_trained_is_seen(tmp_path: Path, good: Inspection) -> None:
    slice_path = tmp_path / "slice"
    slice_path.write_bytes(good.path.read_bytes())
    asked = replace(good, handed_out=slice_path)
    assert inspect_file(asked) == ()
    slice_path.write_bytes(encode(initial_adapter(SPEC, 3, seed=5)))
    with pytest.raises(AdapterMismatch, match="lora_A was trained"):
        inspect_file(asked)
