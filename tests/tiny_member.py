"""A process of a group with torch but without a model: the real socket, store and agreements, and mishaps on demand.

A Train's slice_path says what happens, and at which process: "well", "out_of_memory@1", "data_error@0", ...
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.errors import RafloraError
from worker.trainer.group import Group
from worker.trainer.member import Say, Work, serve
from worker.trainer_protocol import (
    Answer,
    Evaluate,
    Evaluated,
    Failed,
    Load,
    Loaded,
    ProgressMade,
    Train,
    Trained,
    request_from_line,
)

NUM_EXAMPLES = 7


class DataMishap(RafloraError):
    """What a test asked for."""

    reason = "data_error"


class StopMishap(RafloraError):
    """What the agent asked for."""

    reason = "stopped"


def worker(say: Say, stopping: threading.Event, group: Group) -> Work:
    def answer(line: bytes) -> Answer:
        request = request_from_line(line)
        try:
            match request:
                case Load():
                    return loaded(group, request.federation)
                case Train():
                    return group.together(lambda: trained(say, stopping, group, request), word_of)
                case Evaluate():
                    return group.together(lambda: evaluated(group), word_of)
                case other:
                    raise DataMishap(type(other).__name__)
        except RafloraError as error:
            return Failed(error.reason, str(error), fatal=getattr(error, "is_the_end", False))
        except MemoryError as error:
            return Failed("out_of_memory", type(error).__name__)

    return answer


def loaded(group: Group, folder: str) -> Loaded:
    """Writes down which process it is, and stands for a sharded base if the launcher asks for one."""
    Path(folder, f"pid-{group.rank}").write_text(str(os.getpid()))
    named = sorted(name for name in os.environ if "RANK" in name or name.startswith("ACCELERATE"))
    Path(folder, f"environment-{group.rank}").write_text(" ".join(named))
    group.accompany = (lambda: None) if group.is_to_shard else None
    return Loaded("a", (), (), NUM_EXAMPLES, "cpu", 1 << 30)


def trained(say: Say, stopping: threading.Event, group: Group, request: Train) -> Answer:
    what, _, where = request.slice_path.partition("@")
    total = torch.tensor([float(group.rank + 1)])
    group.agree()
    group.add_up(total)
    if where == str(group.rank):
        MISHAPS[what]()
    if what == "out_of_memory_in_a_pass":
        group.add_up(total)  # as a layer is gathered: no agreement comes first, and the other process never comes
    if what == "wait":
        say(ProgressMade("training", 1, 100, 0.5))
        stopping.wait(60)
    if stopping.is_set():
        raise StopMishap("stopped")
    count = group.agree(amount=group.rank + 1)
    return Trained(count, 0.0, {"sum": float(total[0])})


def evaluated(group: Group) -> Answer:
    rows = np.arange(group.rank + 1, dtype=np.float32)[:, None] * np.ones((1, group.rank + 2), dtype=np.float32)
    every = group.gather_rows(rows)
    return Evaluated(len(every), {"columns": every.shape[1], "sum": float(every[every >= 0].sum())})


def word_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    return error.reason if isinstance(error, RafloraError) else "failed"


def _fails(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


MISHAPS: dict[str, Callable[[], None]] = {
    "out_of_memory": _fails(MemoryError()),
    "out_of_memory_in_a_pass": _fails(MemoryError()),
    "data_error": _fails(DataMishap("data_error on demand")),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

if __name__ == "__main__":
    sys.exit(serve(sys.argv[-1], worker))
