"""How much a process grows while it aggregates a round from files: `python -m benchmarks.aggregation.memory FOLDER K`.

Modules are merged side by side on threads, as a coordinator does it by default.
The layers are LLaMA-3B's q_proj and v_proj. A folder has two different files of every rank; further clients are hard
links to them in all but name: the same path read again, as often as there are clients.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.aggregation.inputs import GLOBAL_RANK, RANKS
from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, initial_adapter
from common.codec import WireDtype, encode
from common.memory import keep_memory_flat
from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.round import AggregationInput, AggregationJob, aggregate
from coordinator.merging import make_pool

LAYERS = 2  # of LLaMA-3B's 28: a thousand clients take ten seconds then
VARIANTS = 2
_SECONDS = 600.0
_WIDTH = 3072
_SHAPES = (("q_proj", 3072), ("v_proj", 1024))


def spec_of(layers: int) -> AdapterSpec:
    """The adapted modules."""
    return AdapterSpec(
        tuple(ModuleShape(f"layers.{i}.{name}", out, _WIDTH) for i in range(layers) for name, out in _SHAPES)
    )


def write_inputs(folder: Path, layers: int = LAYERS) -> None:
    """The global adapter and the clients' files."""
    rng = np.random.default_rng(0)
    fresh = initial_adapter(spec_of(layers), GLOBAL_RANK, seed=1)
    spectrum = np.float32(1e-2) / np.arange(1, GLOBAL_RANK + 1, dtype=np.float32)
    modules = {
        name: Factors(f.lora_A, rng.standard_normal(f.lora_B.shape, dtype=np.float32) * spectrum)
        for name, f in fresh.modules.items()
    }
    (folder / "previous").write_bytes(encode(Adapter(modules, {})))
    for rank in RANKS:
        for variant in range(VARIANTS):
            moved = {name: _moved(f, rank, rng) for name, f in modules.items()}
            (folder / f"{rank}-{variant}").write_bytes(encode(Adapter(moved, {})))


def job_of(folder: Path, clients: int, layers: int = LAYERS) -> AggregationJob:
    """A round of so many clients."""
    inputs = []
    for k in range(clients):
        rank = RANKS[k % len(RANKS)]
        path = folder / f"{rank}-{k // len(RANKS) % VARIANTS}"
        inputs.append(AggregationInput(f"client-{k:05}", path, rank, scaling=1.0, num_examples=100 + k % 7))
    options = MethodOptions("raflora")
    spec, previous = spec_of(layers), folder / "previous"
    return AggregationJob(spec, WireDtype.FLOAT32, GLOBAL_RANK, previous, tuple(inputs), options, RANKS)


def growth_mib(folder: Path, clients: int) -> float:
    """Of a fresh process, from before the round to its peak."""
    command = [sys.executable, "-m", "benchmarks.aggregation.memory", str(folder), str(clients)]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS)
    return float(json.loads(answer.stdout))


def main() -> None:
    """One round; prints by how many MiB this process grew."""
    keep_memory_flat()  # as a coordinator does at its start
    job = job_of(Path(sys.argv[1]), int(sys.argv[2]))
    np.linalg.svd(np.ones((256, 256)) @ np.ones((256, 256)))  # BLAS takes its own buffers at first use
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _status_mib("VmRSS")
    with make_pool(0) as pool:
        aggregate(job, pool.map)
    print(json.dumps(_status_mib("VmHWM") - before))


def _moved(factors: Factors, rank: int, rng: np.random.Generator) -> Factors:
    A, B = factors.lora_A[:rank], factors.lora_B[:, :rank]
    step_A = rng.standard_normal(A.shape, dtype=np.float32) * np.float32(0.3 / np.sqrt(A.shape[1]))
    step_B = rng.standard_normal(B.shape, dtype=np.float32) * np.float32(0.3 * np.linalg.norm(B) / np.sqrt(B.size))
    return Factors(A + step_A, B + step_B)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
