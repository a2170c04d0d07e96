"""Quantised bases on a CUDA device, also on one that is not the first; and memory that runs out there for real."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from tiny_models import PLAN, VIT_ORDER, random_adapter, same, save_vit, side_images  # noqa: E402

from worker.config import DataConfig, ModelConfig  # noqa: E402
from worker.trainer.data import load_data  # noqa: E402
from worker.trainer.fitting import MicroBatch, OutOfMemory  # noqa: E402
from worker.trainer.model import load_model, read_adapter, write_adapter  # noqa: E402
from worker.trainer.training import train  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("number", sorted({0, torch.cuda.device_count() - 1}))
def test_a_quantised_base_lies_and_is_trained_on_the_device_that_was_named(
    tmp_path: Path, bits: Any, number: int
) -> None:
    folder = save_vit(tmp_path)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(16)))
    device = f"cuda:{number}"
    model = load_model(
        ModelConfig(path=str(folder), device=device, quantization=bits, gradient_checkpointing=True), VIT_ORDER
    )
    assert {str(parameter.device) for parameter in model.live.parameters()} == {device}
    config = DataConfig(train=str(folder / "train.jsonl"), holdout=0.25)
    preparation = model.task.prepare(model.folder, model.base, model.labels, config)
    data = load_data(config, preparation, seed=1, offline=True)
    for rank in (4, 2):
        start = random_adapter(model.spec, rank)
        write_adapter(model, start, scaling=1.0)
        train(model, data.train, PLAN, collator=preparation.collator, memory_batch=2, report=lambda *_: None)
        assert not same(read_adapter(model), start)
    assert {str(parameter.device) for parameter in model.live.parameters()} == {device}


def test_memory_of_a_gpu_that_runs_out_is_given_back_before_the_next_try() -> None:
    free = torch.cuda.mem_get_info(0)[0]
    tried = []

    def work(examples: int) -> int:
        tried.append(examples)
        held = [torch.empty(free // 8, dtype=torch.uint8, device="cuda:0") for _ in range(3 * examples)]
        return len(held)

    assert MicroBatch().fit(work, batch_size=8, doing="training on", device="cuda:0") == (6, 2)
    assert tried == [8, 4, 2]
    with pytest.raises(OutOfMemory, match=r"of cuda:0 \(.* GiB free\)"):
        MicroBatch().fit(lambda _: work(9), batch_size=1, doing="training on", device="cuda:0")
