"""A round's aggregation from files: the same bytes whatever the order, the processes and the mapping."""

import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from common.adapter import (
    Adapter,
    AdapterSpec,
    Factors,
    ModuleShape,
    TensorShape,
    effective,
    initial_adapter,
    slice_adapter,
)
from common.codec import Layout, WireDtype, decode, digest_of, encode
from common.errors import AdapterMismatch, ConfigError, InvalidRequest, NotFinite
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.methods import METHODS, make_method
from coordinator.aggregation.round import (
    Aggregated,
    AggregationInput,
    AggregationJob,
    EffectiveUpdate,
    aggregate,
    aggregate_adapters,
    initialise_pool,
)

SPEC = AdapterSpec(
    modules=(ModuleShape("encoder.q", 24, 16), ModuleShape("encoder.v", 10, 16), ModuleShape("head.in", 8, 24)),
    tensors=(TensorShape("head.bias", (3,)), TensorShape("head.weight", (3, 5))),
)
GLOBAL_RANK = 8
LEVELS = (2, 4, 8)
RAFLORA = MethodOptions("raflora")


@dataclass(frozen=True)
class Trained:
    """What a client trained: its own factors, to be multiplied by its scaling."""

    client_id: str
    adapter: Adapter
    scaling: float
    num_examples: int


def trained(client_id: str, rank: int, seed: int, *, scaling: float = 1.0, num_examples: int = 10) -> Trained:
    rng = np.random.default_rng(seed)
    modules = {
        m.name: Factors(rng.standard_normal((rank, m.in_features)), rng.standard_normal((m.out_features, rank)))
        for m in SPEC.modules
    }
    tensors = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in SPEC.tensors}
    return Trained(client_id, Adapter(modules, tensors), scaling, num_examples)


CLIENTS = (
    trained("ada", 2, 1, scaling=8.0, num_examples=30),
    trained("bob", 4, 2, scaling=0.3, num_examples=7),
    trained("cyd", 8, 3, num_examples=11),
    trained("dan", 4, 4, scaling=2.0, num_examples=19),
)


def stored(
    folder: Path, clients: Sequence[Trained] = CLIENTS, dtype: WireDtype = WireDtype.FLOAT32, **changes: object
) -> AggregationJob:
    """A job whose files lie in the folder."""
    previous = folder / "previous"
    previous.write_bytes(encode(initial_adapter(SPEC, GLOBAL_RANK, seed=9)))
    inputs = []
    for client in clients:
        path = folder / client.client_id
        path.write_bytes(encode(client.adapter, dtype))
        inputs.append(
            AggregationInput(client.client_id, path, client.adapter.rank, client.scaling, client.num_examples)
        )
    job = AggregationJob(SPEC, dtype, GLOBAL_RANK, previous, tuple(inputs), RAFLORA, LEVELS)
    return replace(job, **changes)  # type: ignore[arg-type]


def digest(adapter: Adapter) -> str:
    return digest_of(encode(adapter))


def changes_of(aggregated: Aggregated) -> dict[str, tuple[bytes, bytes]]:
    return {name: (f.lora_A.tobytes(), f.lora_B.tobytes()) for name, f in aggregated.base_changes.items()}


def test_the_order_of_arrival_leaves_no_trace(tmp_path: Path) -> None:
    job = stored(tmp_path)
    in_order = aggregate(job)
    shuffled = aggregate(replace(job, inputs=job.inputs[::-1]))
    assert digest(shuffled.adapter) == digest(in_order.adapter)
    assert shuffled.report == in_order.report


def with_frozen_lora_A(client: Trained) -> Trained:
    """What the client would have trained under ffa-lora."""
    sent = slice_adapter(initial_adapter(SPEC, GLOBAL_RANK, seed=9), client.adapter.rank, scaling=1.0).modules
    modules = {name: Factors(sent[name].lora_A, f.lora_B) for name, f in client.adapter.modules.items()}
    return replace(client, adapter=Adapter(modules, client.adapter.tensors))


@pytest.mark.parametrize("name", sorted(METHODS))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(CLIENTS))))
def test_in_memory_and_from_files_are_the_same_bytes(tmp_path: Path, order: list[int], name: str) -> None:
    clients = [CLIENTS[i] for i in order]
    if make_method(MethodOptions(name)).freezes_lora_A:
        clients = [with_frozen_lora_A(client) for client in clients]
    job = stored(tmp_path, clients, options=MethodOptions(name))
    previous = initial_adapter(SPEC, GLOBAL_RANK, seed=9)
    updates = [
        EffectiveUpdate(c.client_id, effective(c.adapter, scaling=c.scaling), c.num_examples) for c in reversed(clients)
    ]
    stored_round = aggregate(job)
    in_memory = aggregate_adapters(previous, updates, MethodOptions(name), LEVELS)
    assert digest(in_memory.adapter) == digest(stored_round.adapter)
    assert in_memory.report == stored_round.report
    assert changes_of(in_memory) == changes_of(stored_round)
    assert set(changes_of(in_memory)) == (set(previous.modules) if name in {"flora", "fedex-lora"} else set())


def test_threads_and_spawned_processes_are_the_same_bytes(tmp_path: Path) -> None:
    job = stored(tmp_path)
    alone = aggregate(job)
    with ThreadPoolExecutor(3) as threads:
        assert digest(aggregate(job, threads.map).adapter) == digest(alone.adapter)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=initialise_pool) as pool:
        assert list(pool.map(blas_threads, range(2))) == [1, 1]
        in_pool = aggregate(job, pool.map)
    assert digest(in_pool.adapter) == digest(alone.adapter)
    assert in_pool.report == alone.report


def blas_threads(_: int) -> int:
    return max(int(library["num_threads"]) for library in threadpool_info() if library["user_api"] == "blas")


def test_a_job_can_be_sent_to_another_process(tmp_path: Path) -> None:
    job = stored(tmp_path)
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301 (what a process pool does between our own processes)


def test_the_result_is_an_adapter_at_the_global_rank(tmp_path: Path) -> None:
    adapter = aggregate(stored(tmp_path)).adapter
    assert adapter.spec == SPEC
    assert adapter.rank == GLOBAL_RANK
    decode(encode(adapter), Layout(SPEC, GLOBAL_RANK), whose="the result")


def test_a_scaling_is_the_same_as_scaled_factors(tmp_path: Path) -> None:
    folded = [Trained(c.client_id, effective(c.adapter, scaling=c.scaling), 1.0, c.num_examples) for c in CLIENTS]
    assert digest(aggregate(stored(tmp_path)).adapter) == digest(aggregate(stored(tmp_path, folded)).adapter)


def test_tensors_outside_lora_are_averaged_by_num_examples(tmp_path: Path) -> None:
    adapter = aggregate(stored(tmp_path)).adapter
    total = sum(c.num_examples for c in CLIENTS)
    for name in ("head.bias", "head.weight"):
        mean = sum(c.num_examples / total * c.adapter.tensors[name].astype(float) for c in CLIENTS)
        np.testing.assert_allclose(adapter.tensors[name], mean, rtol=1e-6)


def test_bfloat16_uploads_merge_to_within_their_precision(tmp_path: Path) -> None:
    exact = aggregate(stored(tmp_path)).adapter
    rounded = aggregate(stored(tmp_path, dtype=WireDtype.BFLOAT16)).adapter
    for name, factors in exact.modules.items():
        W = factors.lora_B @ factors.lora_A
        other = rounded.modules[name].lora_B @ rounded.modules[name].lora_A
        assert np.linalg.norm(other - W) < 1e-2 * np.linalg.norm(W)


@pytest.mark.parametrize("seed", range(3))
def test_rounds_without_training_keep_the_global_adapter(tmp_path: Path, seed: int) -> None:
    # The whole path: slice for unequal scalings, upload as it came, merge, ten times over.
    first = aggregate(stored(tmp_path, [trained(c.client_id, c.adapter.rank, seed) for c in CLIENTS]))
    now = first
    start = {name: f.lora_B @ f.lora_A for name, f in now.adapter.modules.items()}
    for _ in range(10):
        updates = []
        for c in CLIENTS:
            sent = slice_adapter(now.adapter, c.adapter.rank, scaling=c.scaling)
            updates.append(EffectiveUpdate(c.client_id, effective(sent, scaling=c.scaling), c.num_examples))
        now = aggregate_adapters(now.adapter, updates, RAFLORA, LEVELS)
    for name, factors in now.adapter.modules.items():
        np.testing.assert_allclose(factors.lora_B @ factors.lora_A, start[name], atol=1e-5 * np.abs(start[name]).max())
    assert now.report.rho == pytest.approx(first.report.rho, abs=1e-5)


# --- What must be refused


def test_an_overflow_names_the_module_and_the_client(tmp_path: Path) -> None:
    eve = trained("eve", 2, 5)
    modules = dict(eve.adapter.modules)
    modules["encoder.v"] = Factors(np.full((2, 16), 1e30), np.full((10, 2), 1e30))
    job = stored(tmp_path, [*CLIENTS, replace(eve, adapter=Adapter(modules, eve.adapter.tensors))])
    with pytest.raises(
        NotFinite, match=r"encoder\.v: the merged update .* beyond float32; the largest update is eve's"
    ):
        aggregate(job)


def test_an_overflow_by_the_scaling_names_the_client(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"ada: encoder\.q\.lora_B times its scaling 3e\+38 is beyond float32"):
        aggregate(stored(tmp_path, [replace(CLIENTS[0], scaling=3e38)]))


def test_a_client_that_diverged_is_named() -> None:
    previous = initial_adapter(SPEC, GLOBAL_RANK, seed=9)
    updates = [EffectiveUpdate(c.client_id, effective(c.adapter, scaling=c.scaling), 1) for c in CLIENTS]
    modules = dict(updates[2].adapter.modules)
    modules["head.in"] = Factors(modules["head.in"].lora_A, np.full((8, 8), np.nan))
    updates[2] = replace(updates[2], adapter=Adapter(modules, updates[2].adapter.tensors))
    with pytest.raises(NotFinite, match=r"head\.in: an update holds NaN or infinity; the largest update is cyd's"):
        aggregate_adapters(previous, updates, RAFLORA)


def test_a_round_needs_updates_and_one_of_each_client(tmp_path: Path) -> None:
    job = stored(tmp_path)
    with pytest.raises(InvalidRequest, match="no updates"):
        replace(job, inputs=())
    with pytest.raises(InvalidRequest, match="two updates"):
        replace(job, inputs=(*job.inputs, job.inputs[0]))


def test_a_wrong_method_is_told_before_any_file_is_read(tmp_path: Path) -> None:
    job = stored(tmp_path, options=MethodOptions("flexlora", weight_floor=0.5), previous=tmp_path / "missing")
    with pytest.raises(ConfigError, match="flexlora has no weight floor"):
        aggregate(job)


def test_an_adapter_of_another_model_is_refused() -> None:
    previous = initial_adapter(SPEC, GLOBAL_RANK, seed=9)
    other = initial_adapter(AdapterSpec((ModuleShape("encoder.q", 24, 16),)), 2, seed=1)
    with pytest.raises(AdapterMismatch, match="bob: other modules"):
        aggregate_adapters(previous, [EffectiveUpdate("bob", other, 1)], RAFLORA)
