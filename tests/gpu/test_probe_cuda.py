"""Dry runs on a CUDA device: memory that follows the rank, an out-of-memory that costs one measurement, the command."""

import json
import sys
from pathlib import Path

import pytest
from coordinators import settings_of, to_toml
from tiny_models import MOODS

from cli.main import main
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.measurement import Measurement, line_through, read_probe
from worker.supervisor import TaskFailed, TrainerProcess
from worker.trainer_protocol import DryRun, ModelOrder

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

WIDTH = 4096
ORDER = ModelOrder("feature-classification", MOODS, ("projection",), (), 8, 1)
TRAINER = (sys.executable, "-m", "worker.trainer")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from worker.trainer.features import FeatureClassifier, FeatureConfig  # noqa: PLC0415 # torch is there by now

    folder = tmp_path_factory.mktemp("wide")
    config = FeatureConfig(  # type: ignore[call-arg] # the number of labels is every configuration's
        hidden_size=WIDTH, num_hidden_layers=0, num_labels=len(MOODS)
    )
    FeatureClassifier(config).save_pretrained(folder)
    return folder


def dry_run(model: Path, rank: int) -> DryRun:
    config = WorkerConfig(
        model=ModelConfig(path=str(model), device="cuda", offline=True), data=DataConfig(train="none")
    )
    return DryRun(config.model_dump_json(), ORDER, rank, micro_batch=4, steps=5)


async def test_peak_memory_is_a_straight_line_over_the_rank(model: Path) -> None:
    trainer = TrainerProcess(600, TRAINER)
    try:
        found = [(rank, await trainer.dry_run(dry_run(model, rank), lambda _: None)) for rank in (256, 1024, 4096)]
    finally:
        await trainer.stop()
    line = line_through(
        [
            Measurement(lora_rank=rank, micro_batch=4, peak_bytes=done.peak_bytes, seconds_per_step=1.0)
            for rank, done in found
        ]
    )
    # Two factors of WIDTH numbers a rank, each as weight, gradient and two moments; some are there twice in a step.
    at_least = 2 * WIDTH * 4 * 4
    assert at_least <= line.bytes_per_rank <= 2 * at_least
    # torch reserves in blocks of up to 20 MiB.
    assert line.deviation < 0.1
    assert found[0][1].memory_bytes == torch.cuda.get_device_properties(0).total_memory


async def test_an_out_of_memory_costs_one_measurement(model: Path) -> None:
    free_bytes, _ = torch.cuda.mem_get_info()
    # What is left holds a process's CUDA context and rank 8 (0.1 GiB), but not rank 4096 (0.6 GiB) as well.
    taken = torch.empty(free_bytes - (1 << 30), dtype=torch.uint8, device="cuda")
    trainer = TrainerProcess(600, TRAINER)
    try:
        with pytest.raises(TaskFailed) as caught:
            await trainer.dry_run(dry_run(model, WIDTH), lambda _: None)
        assert caught.value.word == "out_of_memory"
        assert (await trainer.dry_run(dry_run(model, 8), lambda _: None)).peak_bytes > 0
    finally:
        await trainer.stop()
        del taken
        torch.cuda.empty_cache()


def test_the_command_proposes_a_rank_for_this_gpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation, worker = tmp_path / "federation.toml", tmp_path / "worker.toml"
    asked = settings_of(
        tmp_path / "coordinator",
        model__task="feature-classification",
        model__labels=list(MOODS),
        adapter__target_modules=["projection"],
        adapter__modules_to_save=[],
        adapter__global_rank=64,
    )
    federation.write_text(to_toml(asked))
    settings = {
        "state_dir": str(tmp_path / "state"),
        "model": {"path": str(model), "device": "cuda", "offline": True},
        "data": {"train": "none.jsonl"},
    }
    worker.write_text(to_toml(settings))
    assert main(["probe", "--config", str(worker), "--federation", str(federation), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["proposal"]["lora_rank"] == 64
    probe = read_probe(tmp_path / "state" / "probe.json")
    assert probe is not None
    assert probe.device.startswith("cuda")
