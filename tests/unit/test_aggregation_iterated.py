"""Large stacks, which are decomposed by iteration on the raw factors: as exact as the dense average."""

import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aggregation_cases import FLEXLORA, RAFLORA, assert_alive, factors_of, label, product, single
from aggregation_cohorts import RANK, RANKS, Cohort, cohort, excess, merge
from dense_reference import Client, flexlora, raflora
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, effective
from common.codec import Layout, WireDtype, decode, digest_of, encode, name_of_lora_A
from common.errors import NotFinite
from coordinator.aggregation import stacking, subspace
from coordinator.aggregation.low_rank import Matrix
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import make_method
from coordinator.aggregation.round import (
    AggregationInput,
    AggregationJob,
    EffectiveUpdate,
    aggregate,
    aggregate_adapters,
)
from coordinator.aggregation.stack import BLOCK_ROWS, Stack, Weighted
from coordinator.aggregation.subspace import leading_triplets
from coordinator.aggregation.updates import HeldPart

few = settings(max_examples=4, deadline=None)


SHRINKAGES: tuple[tuple[MethodOptions, dict[str, object]], ...] = (
    (RAFLORA, {}),
    (MethodOptions("raflora", weight_floor=0.6), {"weight_floor": 0.6}),
    (MethodOptions("raflora", shrinkage="sqrt-share"), {"shrink": lambda share, _: share**0.5}),
    (MethodOptions("raflora", shrinkage="share"), {"shrink": lambda share, _: share}),
    (MethodOptions("raflora", shrinkage="effective-owners"), {"shrink": lambda _, owners: owners / (owners + 1)}),
)


# --- As exact as the dense average


@pytest.mark.parametrize(("kind", "bound"), [("real", 1e-8), ("first", 1e-8), ("flat", 1e-6)])
@few
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(150, 97), (97, 150), (130, 130)]))
def test_the_error_is_that_of_the_optimal_truncation(
    kind: str, bound: float, seed: int, shape: tuple[int, int]
) -> None:
    c = cohort(kind, seed, shape=shape)
    W = raflora(c.clients, c.PB, c.PA)
    assert excess(product(merge(c).factors), W) <= bound
    assert excess(product(merge(c, FLEXLORA).factors), flexlora(c.clients)) <= bound


@pytest.mark.parametrize(("options", "reference"), SHRINKAGES, ids=[label(options) for options, _ in SHRINKAGES])
def test_every_shrinkage_weighs_as_the_blackboard_says(options: MethodOptions, reference: dict[str, object]) -> None:
    c = cohort("real")
    # Only small clients, so that the previous global's own directions have their part.
    c = replace(c, clients=tuple(x for x in cohort("real", clients=100).clients if x.rank <= 12))
    W = raflora(c.clients, c.PB, c.PA, **reference)  # type: ignore[arg-type]
    assert excess(product(merge(c, options).factors), W) <= 1e-8


class _Mistaken:
    """An operator whose transpose is another one's."""

    def __init__(self, right: Stack, wrong: Stack) -> None:
        self.shape, self.forward, self.backward = right.shape, right.forward, wrong.backward


def test_a_planted_mistake_is_seen_by_the_same_measure() -> None:
    c = cohort("real")
    W = flexlora(c.clients)
    right, wrong = stack_of(c), stack_of(replace(c, clients=c.clients[::-1]), weights_of=c.clients)
    assert excess(triplets(right, right), W) <= 1e-8
    assert excess(triplets(_Mistaken(right, wrong), right), W) > 1e-6


def stack_of(c: Cohort, *, kept_bytes: int = 1 << 30, weights_of: Sequence[Client] = ()) -> Stack:
    """With FlexLoRA's weights."""
    total = sum(x.num_examples for x in c.clients)
    shares = [x.num_examples / total for x in (weights_of or c.clients)]
    entries = [
        Weighted(HeldPart(factors_of(x)), np.full(x.rank, share)) for x, share in zip(c.clients, shares, strict=True)
    ]
    return Stack(entries, RANK, kept_bytes=kept_bytes)


def triplets(operator: subspace.Operator, stack: Stack) -> Matrix:
    found = leading_triplets(
        operator, stack.mean_rows.T.astype(float), RANK, noise=stack.noise, rng=np.random.default_rng(0)
    )
    return (found.left * found.values) @ found.right.T


# --- The form of the result


@pytest.mark.parametrize("kind", ["real", "first", "flat"])
def test_rows_are_orthonormal_columns_orthogonal_and_signs_fixed(kind: str) -> None:
    factors = merge(cohort(kind)).factors
    np.testing.assert_allclose(factors.lora_A @ factors.lora_A.T, np.eye(RANK), atol=1e-6)
    norms = np.linalg.norm(factors.lora_B, axis=0)
    np.testing.assert_allclose(factors.lora_B.T @ factors.lora_B, np.diag(norms**2), atol=1e-5 * norms[0] ** 2)
    assert np.all(np.diff(norms) <= 0)
    largest = np.abs(factors.lora_A).argmax(axis=1)
    assert np.all(factors.lora_A[np.arange(RANK), largest] > 0)


def test_directions_that_nobody_trained_are_exactly_zero_and_alive() -> None:
    c = cohort("first", clients=60)
    small = replace(c, clients=tuple(x for x in c.clients if x.rank <= 8))
    merged = merge(small)
    assert np.count_nonzero(merged.factors.lora_B.any(axis=0)) == 8
    assert not merged.factors.lora_B[:, 8:].any()
    assert merged.energy_lost == 0.0
    assert_alive(merged.factors)


def test_updates_that_cancel_leave_zero_and_not_noise() -> None:
    c = cohort("real")
    opposite = tuple(replace(x, B=-x.B[:, ::-1], A=x.A[::-1]) for x in c.clients)
    # FlexLoRA's weights, for raFLoRA's differ by index.
    merged = merge(replace(c, clients=(*c.clients, *opposite)), FLEXLORA)
    assert not merged.factors.lora_B.any()
    assert_alive(merged.factors)


def test_a_start_that_says_nothing_is_made_up_for() -> None:
    # Every lora_A has its opposite, so that their mean is nothing; the products are the same.
    c = cohort("real")
    opposite = tuple(replace(x, B=-x.B, A=-x.A) for x in c.clients)
    both = replace(c, clients=(*c.clients, *opposite))
    assert excess(product(merge(both, FLEXLORA).factors), flexlora(c.clients)) <= 1e-8


def test_a_client_alone_in_another_row_space_is_found() -> None:
    # In no direction of the others, and nearly absent from the mean of the lora_A.
    c = cohort("real")
    rng = np.random.default_rng(1)
    A = single(1e-3 * rng.standard_normal((2, 97)))
    strange = Client(single(1e3 * rng.standard_normal((150, 2))), A, 400)
    other = replace(c, clients=(*c.clients, strange))
    assert excess(product(merge(other, FLEXLORA).factors), flexlora(other.clients)) <= 1e-8


# --- The certificate


@pytest.mark.parametrize("kind", ["real", "flat"])
def test_the_certificate_bounds_the_residual_and_knows_the_energy(kind: str) -> None:
    c = cohort(kind)
    merged = merge(c)
    W = raflora(c.clients, c.PB, c.PA)
    values = np.linalg.svd(W, compute_uv=False)
    rows, S = merged.factors.lora_A.astype(float), merged.singular_values
    U = merged.factors.lora_B / S
    residual = np.linalg.norm(W.T @ U - rows.T * S) / S[-1]
    assert residual <= merged.certificate.residual + 2e-5  # what float32 leaves
    assert merged.certificate.residual < 0.02
    energies = values**2
    assert merged.certificate.captured == pytest.approx(energies[:RANK].sum() / energies.sum(), rel=0.05)
    assert merged.energy_lost == pytest.approx(energies[RANK:].sum(), rel=0.2)
    assert 3 <= merged.certificate.half_passes <= subspace.MAX_HALF_PASSES


def test_what_does_not_converge_is_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "MAX_HALF_PASSES", 3)
    c = cohort("flat")
    updates, examples = [factors_of(x) for x in c.clients], [x.num_examples for x in c.clients]
    merged = make_method(RAFLORA).merge(c.previous, updates, examples)
    assert merged.certificate.way == "dense"
    assert excess(product(merged.factors), raflora(c.clients, c.PB, c.PA)) <= 1e-8
    assert_alive(merged.factors)


# --- The same bytes


SPEC = AdapterSpec((ModuleShape("q", 150, 97), ModuleShape("v", 90, 97)))


def stored(
    folder: Path, *, clients: int = 40, scaling: float = 1.0, dtype: WireDtype = WireDtype.FLOAT32
) -> AggregationJob:
    """A round in files."""
    made = {m.name: cohort("real", shape=(m.out_features, m.in_features), clients=clients) for m in SPEC.modules}
    previous = Adapter({name: c.previous for name, c in made.items()}, {})
    (folder / "previous").write_bytes(encode(previous))
    inputs = []
    for k in range(clients):
        factors = {name: factors_of(c.clients[k]) for name, c in made.items()}
        path, rank = folder / f"client-{k:03}", RANKS[k % len(RANKS)]
        path.write_bytes(encode(Adapter(factors, {}), dtype))
        inputs.append(AggregationInput(path.name, path, rank, scaling, made["q"].clients[k].num_examples))
    return AggregationJob(SPEC, dtype, RANK, folder / "previous", tuple(inputs), RAFLORA, RANKS)


def held(job: AggregationJob) -> tuple[Adapter, list[EffectiveUpdate]]:
    """The same in memory."""
    previous = decode(job.previous.read_bytes(), Layout(SPEC, RANK), whose="previous")
    updates = []
    for entry in job.inputs:
        adapter = decode(entry.path.read_bytes(), Layout(SPEC, entry.rank, job.wire_dtype), whose=entry.client_id)
        updates.append(EffectiveUpdate(entry.client_id, effective(adapter, scaling=entry.scaling), entry.num_examples))
    return previous, updates


@pytest.mark.parametrize("dtype", list(WireDtype))
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_from_files_in_memory_shuffled_and_in_threads(tmp_path: Path, dtype: WireDtype, scaling: float) -> None:
    job = stored(tmp_path, scaling=scaling, dtype=dtype)
    expected = aggregate(job)
    assert expected.report.certificate.iterated == 2
    previous, updates = held(job)
    others = [
        aggregate(replace(job, inputs=job.inputs[::-1])),
        aggregate_adapters(previous, updates[::-1], RAFLORA, RANKS),
    ]
    with ThreadPoolExecutor(2) as threads:
        others.append(aggregate(job, threads.map))
    for other in others:
        assert digest_of(encode(other.adapter)) == digest_of(encode(expected.adapter))
        assert other.report == expected.report


@pytest.mark.parametrize("kept_bytes", [0, 150_000])
def test_blocks_that_are_read_again_give_the_bits_of_those_that_are_kept(kept_bytes: int) -> None:
    c = cohort("real", clients=100)
    kept, again = stack_of(c), stack_of(c, kept_bytes=kept_bytes)
    assert kept.directions > 2 * BLOCK_ROWS
    columns = np.random.default_rng(0).standard_normal((97, 5)).astype(np.float32)
    for _ in range(2):
        images = kept.forward(columns)
        assert again.forward(columns).tobytes() == images.tobytes()
        assert again.backward(images).tobytes() == kept.backward(images).tobytes()


def test_the_stack_is_the_weighted_sum_of_the_products() -> None:
    c = cohort("real")
    W, stack = flexlora(c.clients), stack_of(c)
    columns = np.eye(97, dtype=np.float32)
    np.testing.assert_allclose(stack.forward(columns), W, atol=1e-6)
    np.testing.assert_allclose(stack.backward(np.eye(150, dtype=np.float32)), W.T, atol=1e-6)
    np.testing.assert_allclose(stack.dense(), W, atol=1e-7)


def test_memory_does_not_grow_with_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "KEPT_BYTES", 1 << 18)  # less than either round's factors
    job = stored(tmp_path, clients=60)
    many = tuple(replace(entry, client_id=f"{entry.client_id}-{k}") for entry in job.inputs for k in range(8))
    aggregate(job)
    sent = sum(entry.path.stat().st_size for entry in job.inputs)
    growth = peak_of(lambda: aggregate(replace(job, inputs=many))) - peak_of(lambda: aggregate(job))
    assert growth < 0.1 * 7 * sent


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- What must be refused


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_number_that_is_not_finite_names_module_and_client(tmp_path: Path, poison: float) -> None:
    job = stored(tmp_path)
    previous, updates = held(job)
    culprit = updates[7]
    lora_A = culprit.adapter.modules["v"].lora_A.copy()
    lora_A[0, 3] = poison
    modules = {**culprit.adapter.modules, "v": replace(culprit.adapter.modules["v"], lora_A=lora_A)}
    updates[7] = replace(culprit, adapter=Adapter(modules, {}))
    with pytest.raises(NotFinite, match="v: an update holds NaN or infinity; the largest update is client-007's"):
        aggregate_adapters(previous, updates, RAFLORA)
    # In a file that went bad after it was checked.
    layout = Layout(SPEC, job.inputs[7].rank)
    with job.inputs[7].path.open("r+b") as file:
        file.seek(layout.offsets[name_of_lora_A("v")] + 12)
        file.write(np.float32(poison).tobytes())
    with pytest.raises(NotFinite, match=r"v: client-007: v\.lora_A holds (nan|inf) at index 3; .* is client-007's"):
        aggregate(job)


def test_a_product_beyond_float32_is_refused_and_named(tmp_path: Path) -> None:
    previous, updates = held(stored(tmp_path))
    huge = updates[4].adapter.modules["q"]
    modules = {**updates[4].adapter.modules, "q": Factors(huge.lora_A * 1e30, huge.lora_B * 1e30)}
    updates[4] = replace(updates[4], adapter=Adapter(modules, {}))
    with pytest.raises(NotFinite, match=r"q: the merged update .* beyond float32; the largest update is client-004's"):
        aggregate_adapters(previous, updates, RAFLORA)
