"""The trainer process gets none of the worker's secrets through its environment."""

import sys

import pytest

from worker.supervisor import TaskFailed, TrainerProcess
from worker.trainer_protocol import Failed, Load, ModelOrder, to_line

_SAYS_ITS_ENVIRONMENT = """
import os, sys
sys.stdin.readline()
told = " ".join(name for name in os.environ if name.startswith("RAFLORA_"))
print(LINE.replace("NAMES", told), flush=True)
"""


async def test_the_trainer_is_not_told_the_join_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFLORA__COORDINATOR__JOIN_TOKEN", "secret")
    monkeypatch.setenv("RAFLORA_IDENTITY", "/secret")
    monkeypatch.setenv("RAFLORA_DATA", "/data")
    line = to_line(Failed("model_error", "NAMES", fatal=True)).decode().strip()
    script = _SAYS_ITS_ENVIRONMENT.replace("LINE", repr(line))
    trainer = TrainerProcess(60, [sys.executable, "-c", script])
    with pytest.raises(TaskFailed) as caught:
        await trainer.load(
            Load("{}", ModelOrder(task="", labels=(), target_modules=(), modules_to_save=(), lora_rank=1, seed=0))
        )
    names = str(caught.value).split()
    assert "RAFLORA_DATA" in names
    assert not [name for name in names if name.startswith("RAFLORA__") or name == "RAFLORA_IDENTITY"]
