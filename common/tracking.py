"""Where the course of a run is shown besides our own status: TensorBoard, MLflow, Weights & Biases. Settings only.

Whoever runs a process decides for it: nothing here is asked for, or known, by the other side.
"""

from pathlib import Path

from pydantic import Field

from common.settings import Section


class TrackingConfig(Section):
    """Each one that is set gets the numbers; its library must be installed: pip install "raflora[tracking]"."""

    tensorboard: Path | None = None
    """A folder for event files; `tensorboard --logdir FOLDER` shows them. Nothing leaves this machine."""
    mlflow: str = ""
    """A tracking URI: an http(s) address, or a folder's file URI or sqlite URL."""
    wandb: str = Field(default="", pattern=r"^([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]*$")
    """A Weights & Biases project, or ENTITY/PROJECT; the key is the one that `wandb login` keeps."""
    run_name: str = Field(default="", max_length=100)
    """Of this run there; unset: the federation's name, and for a worker its own."""

    @property
    def is_used(self) -> bool:
        """Whether anything is set."""
        return self.tensorboard is not None or bool(self.mlflow or self.wandb)
