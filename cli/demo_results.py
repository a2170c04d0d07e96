"""What a demonstration leaves for other programs: results.json, plain numbers of every round.

`python -m benchmarks.collapse_picture` draws it.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raflora.v1 import status_pb2

from cli.demo_setting import Setting
from cli.local_federation import Story

_LIBRARIES = ("raflora", "torch", "transformers", "peft", "grpcio", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Check:
    """The exported folder, loaded with stock PEFT in a process that knows nothing of the federation."""

    reported_accuracy: float  # by the worker of the global rank, in the last round
    loaded_accuracy: float
    base_accuracy: float  # of the base model alone, on the same examples
    num_examples: int
    load: tuple[str, ...]  # the lines of Python that load it

    @property
    def agrees(self) -> bool:
        """Whether both are the same share of the same examples, to within float noise."""
        return abs(self.reported_accuracy - self.loaded_accuracy) * self.num_examples < 0.01


def results_of(setting: Setting, stories: Sequence[Story], check: Check) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "rounds": setting.rounds,
        "seed": setting.seed,
        "sites": [asdict(site) for site in setting.sites],
        "adapter": str(setting.adapter),
        "check": {**asdict(check), "agrees": check.agrees},
        "federations": [_federation(story) for story in stories],
    }


def write_results(results: dict[str, Any], path: Path) -> None:
    """As indented JSON."""
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _federation(story: Story) -> dict[str, Any]:
    return {
        "method": story.method,
        "start_seconds": round(story.start_seconds, 1),
        "total_seconds": round(story.total_seconds, 1),
        "forecast": {
            "sentence": story.forecast.sentence,
            "factor": story.forecast.factor,
            "half_life_rounds": story.forecast.half_life_rounds,
        },
        "clients": [
            {
                "name": client.client_id,
                "rank": client.lora_rank,
                "num_examples": client.num_examples,
                "adapter_bytes": client.slice_bytes,
            }
            for client in sorted(story.clients, key=lambda client: client.client_id)
        ],
        "rounds": [_round(summary) for summary in story.rounds],
    }


def _round(summary: status_pb2.RoundSummary) -> dict[str, Any]:
    return {
        "round": summary.round,
        "updates": len(summary.contributions),
        "accuracy": summary.accuracy,
        "accuracies": {e.client_id: e.metrics["accuracy"] for e in summary.evaluations},
        "eval_loss": summary.eval_loss,
        "train_loss": summary.train_loss,
        "learning_rate": summary.learning_rate,
        "partitions": [
            {"low": p.low, "high": p.high, "energy_share": p.energy_share, "contributors": p.contributors}
            for p in summary.partitions
        ],
        "rho": summary.rho,
        "effective_rank": summary.effective_rank,
        "rank_99": summary.rank_99,
        "energy": summary.energy,
        "bytes_up": summary.bytes_received,
        "bytes_down": summary.bytes_sent,
        "training_seconds": round(summary.training_seconds, 3),
        "aggregation_seconds": round(summary.aggregation_seconds, 3),
        "evaluation_seconds": round(summary.evaluation_seconds, 3),
        "adapter_digest": summary.adapter_digest,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
