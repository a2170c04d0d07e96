"""The trainer on a CUDA device: the same slice in, trained factors out. Skipped where there is none."""

import sys
from pathlib import Path

import pytest

from common.adapter import AdapterSpec, ModuleShape, TensorShape, initial_adapter
from common.codec import Layout, WireDtype, decode, encode
from simulation.digits import BASE_FOLDER, LABELS, digits_task, sites_for, write_jsonl
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.supervisor import TrainerProcess
from worker.trainer_protocol import Evaluate, Load, ModelOrder, Plan, Train

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.slow]
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PLAN = Plan(
    learning_rate=4e-3,
    local_steps=60,
    local_epochs=1.0,
    batch_size=32,
    weight_decay=0.0,
    max_grad_norm=1.0,
    warmup_steps=0,
    seed=1,
)


async def test_training_on_cuda_teaches_the_slice(tmp_path: Path) -> None:
    write_jsonl(sites_for(["site"])["site"], tmp_path / "train.jsonl")
    write_jsonl(digits_task().test, tmp_path / "test.jsonl")
    config = WorkerConfig(
        rank=8,
        model=ModelConfig(path=str(BASE_FOLDER), device="cuda", offline=True),
        data=DataConfig(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl")),
    )
    order = ModelOrder("image-classification", LABELS, ("all-linear",), (), 8, 0)
    trainer = TrainerProcess(600, [sys.executable, "-m", "worker.trainer"])
    try:
        loaded = await trainer.load(Load(config.model_dump_json(), order))
        assert "cuda" in loaded.device.lower() or "nvidia" in loaded.device.lower()
        spec = AdapterSpec(
            tuple(ModuleShape(*module) for module in loaded.modules),
            tuple(TensorShape(*tensor) for tensor in loaded.tensors),
        )
        start, update = tmp_path / "slice", tmp_path / "update"
        start.write_bytes(encode(initial_adapter(spec, 8, 0)))
        await trainer.train(Train(str(start), str(update), 8, 1.0, "float32", PLAN), lambda _: None)
        decode(update.read_bytes(), Layout(spec, 8, WireDtype.FLOAT32), "update")
        before = await trainer.evaluate(Evaluate(str(start), 8, 1.0, "float32"), lambda _: None)
        after = await trainer.evaluate(Evaluate(str(update), 8, 1.0, "float32"), lambda _: None)
        assert after.metrics["accuracy"] > before.metrics["accuracy"] + 0.3
    finally:
        await trainer.stop()
