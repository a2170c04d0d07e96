"""What the trainer tells of its failures; the rest of it is met as a process in test_trainer_process.py."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer import process as trainer
from worker.trainer.fitting import is_out_of_memory
from worker.trainer.process import log_context
from worker.trainer_protocol import Evaluate, Failed, to_line

pytestmark = pytest.mark.torch


def test_torchs_own_complaint_about_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_errors_of_memory_are_known_by_their_type(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 must have the same dtype"), ValueError("memory")])
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "denied", "/data/patients"), "trainer_died"),
        (MemoryError("/data/patients"), "out_of_memory"),
    ],
)
def test_what_nobody_foresaw_stays_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, reason: str
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "request_from_line", fails)
    answer = trainer._Trainer(lambda _: None, threading.Event()).answer(to_line(Evaluate("slice", 1, 1.0, "float32")))
    assert isinstance(answer, Failed)
    assert (answer.reason, answer.fatal) == (reason, reason == "trainer_died")
    assert answer.message.startswith(type(error).__name__)
    assert "patients" not in answer.message
    assert "patients" in capsys.readouterr().err


def test_a_line_of_the_trainers_log_names_federation_and_client(tmp_path: Path) -> None:
    config = WorkerConfig(rank=4, state_dir=tmp_path, model=ModelConfig(path="-"), data=DataConfig(train="-"))
    context = log_context(config, "intents")
    assert context.keys() == {"role", "client", "federation"}
    assert (context["role"], context["federation"]) == ("trainer", "intents")
    assert context["client"], "a worker without a name goes by the host's"
