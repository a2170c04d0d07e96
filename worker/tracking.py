"""The course of this worker for the site's own TensorBoard, MLflow or Weights & Biases; no coordinator knows of it.

Sent are the training loss of each step, and of each task what its result measured, how long it took, how many examples
it saw, its round and rank; and beside the curves the names of run and model, the rank and the quantization. If [policy]
lets no metrics leave, only what stays on this machine is allowed.
"""

from collections.abc import Mapping
from pathlib import Path

import structlog

from common.errors import ConfigError
from common.trackers import Run, Trackers, check_installed, destinations, leaves_this_machine
from worker.config import WorkerConfig
from worker.messages import Progress, Task, TaskKind
from worker.peft_format import public_name

log = structlog.get_logger()


def trackers_of(config: WorkerConfig, client_id: str) -> Trackers:
    """What the settings name, told in the log. Raises ConfigError if the site's policy forbids it."""
    tracking = config.tracking
    if leaves_this_machine(tracking) and not config.policy.may_send_metrics:
        raise ConfigError(
            "tracking: policy.may_send_metrics is false, so no losses leave this site; "
            "tracking.tensorboard writes to a folder here, or leave [tracking] out"
        )
    check_installed(tracking)
    settings = shown_beside(config)
    name = tracking.run_name or client_id
    if tracking.is_used:
        what = "train/loss of each step; metrics, seconds, examples, round and rank of each task"
        log.info("tracking", to=destinations(tracking), what=what, run=name, beside=settings)
    return Trackers.of(tracking, Run("raflora", name, config.state_dir, settings))


def shown_beside(config: WorkerConfig) -> dict[str, str]:
    """What stands beside the curves; of a folder only its name, for where it lies is nobody's business elsewhere."""
    path = config.model.path
    name = Path(path).name if Path(path).expanduser().is_dir() else public_name(path)
    return {"model": name, "rank": str(config.rank), "quantization": config.model.quantization}


class Course:
    """Notes on one axis: optimizer steps of this worker, as if its rounds stood one after the other."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers
        self._before = 0  # steps of the rounds before this one
        self._noted = 0
        self._task: tuple[int, int] = (0, 0)

    def at(self, task: Task, progress: Progress) -> None:
        """A step of a task that trains."""
        if task.kind is not TaskKind.TRAIN or not progress.total_steps:
            return
        if (task.round, task.attempt) != self._task:
            self._task = (task.round, task.attempt)
            self._before = max(self._noted, (task.round - 1) * progress.total_steps)
        self._noted = max(self._noted, self._before + progress.step)
        self._trackers.note(self._noted, {"train/loss": progress.train_loss})

    def done(self, task: Task, metrics: Mapping[str, float], more: Mapping[str, float]) -> None:
        """What a task measured."""
        kind = "train" if task.kind is TaskKind.TRAIN else "evaluate"
        values = {**metrics, **more, "round": float(task.round), "rank": float(task.lora_rank)}
        self._trackers.note(self._noted, {f"{kind}/{name}": value for name, value in values.items()})
