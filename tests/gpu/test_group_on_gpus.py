"""A group of two processes with a GPU each, over NCCL. Skipped where there are fewer."""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import (
    LLAMA_ORDER,
    PLAN,
    VIT_ORDER,
    random_adapter,
    save_vit,
    side_images,
    tiny_llama,
    word_problems,
)

from common.adapter import Adapter, AdapterSpec, ModuleShape
from common.codec import Layout, decode, encode
from worker.config import DataConfig, LaunchConfig, ModelConfig, WorkerConfig
from worker.supervisor import TaskFailed, TrainerProcess
from worker.trainer_protocol import Evaluate, Load, ModelOrder, Train

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RANK = 4


def settings(folder: Path, launch: LaunchConfig) -> WorkerConfig:
    """Of a worker with a GPU for each of its processes."""
    return WorkerConfig(
        rank=RANK,
        launch=launch,
        model=ModelConfig(path=str(folder), device="cuda", offline=True),
        data=DataConfig(
            train=str(folder / "train.jsonl"),
            test=str(folder / "test.jsonl"),
            prompt_column="question",
            response_column="answer",
            max_length=128,
        ),
    )


async def adapted(
    folder: Path, launch: LaunchConfig, order: ModelOrder = VIT_ORDER
) -> tuple[Adapter, dict[str, float]]:
    """What a worker that is launched so makes of a slice, and how it measures it."""
    trainer = TrainerProcess(600, launch=launch)
    try:
        loaded = await trainer.load(Load(settings(folder, launch).model_dump_json(), order))
        assert loaded.device.startswith("cuda")
        spec = AdapterSpec(tuple(ModuleShape(*module) for module in loaded.modules), ())
        start, update = folder / "slice", folder / "update"
        await asyncio.to_thread(start.write_bytes, encode(random_adapter(spec, RANK)))
        await trainer.train(Train(str(start), str(update), RANK, 1.0, "float32", PLAN), lambda _: None)
        measured = await trainer.evaluate(Evaluate(str(start), RANK, 1.0, "float32"), lambda _: None)
        content = await asyncio.to_thread(update.read_bytes)
        return decode(content, Layout(spec, RANK), "the test"), dict(measured.metrics)
    finally:
        await trainer.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def site(folder: Path, order: ModelOrder = VIT_ORDER) -> Path:
    save, rows = (save_vit, side_images) if order is VIT_ORDER else (tiny_llama, word_problems)
    save(folder)
    for file, count in (("train.jsonl", 22), ("test.jsonl", 7)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return folder


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize(
    ("order", "shard_base"),
    [(VIT_ORDER, False), (VIT_ORDER, True), (LLAMA_ORDER, True)],
    ids=["vit", "vit-sharded", "llama-sharded"],
)
async def test_two_gpus_teach_and_measure_what_one_does(order: ModelOrder, shard_base: bool, tmp_path: Path) -> None:
    folder = site(tmp_path, order)
    alone, measured_alone = await adapted(folder, LaunchConfig(), order)
    grouped, measured = await adapted(folder, LaunchConfig(processes=2, shard_base=shard_base), order)
    for name, factors in alone.modules.items():
        np.testing.assert_allclose(grouped.modules[name].lora_A, factors.lora_A, atol=1e-4)
        np.testing.assert_allclose(grouped.modules[name].lora_B, factors.lora_B, atol=1e-4)
    assert measured == pytest.approx(measured_alone, abs=1e-4)


async def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="would share a GPU; torch sees"):
        await adapted(site(tmp_path), LaunchConfig(processes=torch.cuda.device_count() + 1))
