"""Where an exported model comes from: gathered from the coordinator, kept beside the weights in raflora.json.

The record is what `raflora export --from FOLDER` needs to go on without a coordinator, and what the model card says.
It names no site unless asked to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from raflora.v1 import status_pb2

from common.errors import ConfigError
from common.transfer import write_durably
from common.version import software_version
from worker.peft_format import public_name

if TYPE_CHECKING:
    from coordinator.publishing import PublishedAdapter

RECORD_FILE = "raflora.json"
_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Contributor:
    """One client, as its last accepted update has it."""

    client_id: str
    lora_rank: int
    num_examples: int
    updates: int  # that were accepted, one a round


@dataclass(frozen=True)
class Group:
    """The contributors of one rank, counted."""

    lora_rank: int
    clients: int
    num_examples: int
    updates: int


@dataclass(frozen=True)
class Level:
    """The clients that were evaluated at one rank."""

    lora_rank: int
    clients: int
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """What the evaluation after one round said of its adapter."""

    round: int
    federated: Mapping[str, float]  # by num_examples, over the clients' own data
    central: Mapping[str, float]  # over the evaluators' data
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Best:
    """The best round, and in what."""

    round: int
    metric: str
    value: float
    source: str  # "federated" or "central"


@dataclass(frozen=True)
class Origin:
    """Everything that an exported folder says about itself."""

    federation: str
    base_model: str
    base_model_digest: str
    task: str
    labels: tuple[str, ...]
    modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    manifest_digest: str
    adapter_digest: str  # of the global adapter, as status and rounds show it; empty: not known
    method: str
    round: int
    num_rounds: int
    global_rank: int
    rank: int  # directions of the global adapter in the folder; zeros of padding are none
    software_version: str
    groups: tuple[Group, ...] = ()  # by rank, ascending
    contributors: tuple[Contributor, ...] = ()  # empty unless names were asked for
    measured: Measured | None = None  # the last evaluation of this adapter or of one before it
    best: Best | None = None


def origin_of(
    header: status_pb2.AdapterHeader,
    status: status_pb2.FederationStatus,
    rounds: Sequence[status_pb2.RoundSummary],
    *,
    with_client_names: bool,
) -> Origin:
    """What the coordinator says of the adapter that it announced with `header`."""
    until = [summary for summary in rounds if summary.round <= header.round]
    evaluated = [summary for summary in until if summary.evaluations or summary.federated_metrics]
    contributors = _contributors(until)
    published = next((s.adapter_digest for s in until if s.round == header.round), "")
    return Origin(
        federation=status.federation,
        base_model=public_name(header.base_model),
        base_model_digest=header.base_model_digest,
        task=header.task,
        labels=tuple(header.labels),
        modules=tuple(header.modules),
        modules_to_save=tuple(header.modules_to_save),
        manifest_digest=status.manifest_digest,
        adapter_digest=published,
        method=status.method,
        round=header.round,
        num_rounds=status.num_rounds,
        global_rank=status.global_rank,
        rank=header.lora_rank,
        software_version=status.software_version,
        groups=_groups(contributors),
        contributors=contributors if with_client_names else (),
        measured=_measured(evaluated[-1]) if evaluated else None,
        best=_best(status.best) if status.HasField("best") else None,
    )


def origin_of_published(published: "PublishedAdapter") -> Origin:
    """What the coordinator itself can say while it exports: no clients and no evaluations."""
    manifest = published.manifest
    return Origin(
        federation=manifest.federation,
        base_model=public_name(manifest.model.base_model),
        base_model_digest=manifest.base_model_digest,
        task=manifest.model.task,
        labels=manifest.model.labels,
        modules=tuple(module.name for module in manifest.spec.modules),
        modules_to_save=manifest.adapter.modules_to_save,
        manifest_digest=manifest.digest,
        adapter_digest="",
        method=manifest.aggregation.method,
        round=published.round,
        num_rounds=manifest.rounds.num_rounds,
        global_rank=manifest.adapter.global_rank,
        rank=published.adapter.rank,
        software_version=software_version(),
    )


def write_origin(folder: Path, origin: Origin) -> None:
    """Beside the weights, replaced in one step."""
    write_durably(folder / RECORD_FILE, TypeAdapter(Origin).dump_json(origin, indent=2) + b"\n")


def read_origin(folder: Path) -> Origin:
    """What the folder says of itself. Raises ConfigError if it is not one that raflora exported."""
    path = folder / RECORD_FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_RECORD_BYTES)
        return TypeAdapter(Origin).validate_json(content)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; --from takes a folder that `raflora export` "
            "or a coordinator's export_dir wrote"
        ) from None
    except ValidationError as error:
        raise ConfigError(f"{path}: is damaged: {_first_problem(error)}; export the folder anew") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([".".join(str(part) for part in problem["loc"]) or "the file", problem["msg"]])


def _contributors(rounds: Sequence[status_pb2.RoundSummary]) -> tuple[Contributor, ...]:
    last: dict[str, status_pb2.Contribution] = {}
    counts: dict[str, int] = {}
    for summary in rounds:
        for contribution in summary.contributions:
            last[contribution.client_id] = contribution
            counts[contribution.client_id] = counts.get(contribution.client_id, 0) + 1
    return tuple(
        Contributor(name, last[name].lora_rank, last[name].num_examples, counts[name]) for name in sorted(last)
    )


def _groups(contributors: Sequence[Contributor]) -> tuple[Group, ...]:
    ranks = sorted({one.lora_rank for one in contributors})
    of_rank = {rank: [one for one in contributors if one.lora_rank == rank] for rank in ranks}
    return tuple(
        Group(rank, len(some), sum(one.num_examples for one in some), sum(one.updates for one in some))
        for rank, some in of_rank.items()
    )


def _measured(summary: status_pb2.RoundSummary) -> Measured:
    federated = dict(summary.federated_metrics)
    if not federated:
        said = {name for one in summary.evaluations for name in one.metrics}
        known = {"accuracy": summary.accuracy, "eval_loss": summary.eval_loss}
        federated = {name: value for name, value in known.items() if name in said}
    levels = tuple(
        Level(level.lora_rank, level.clients, level.num_examples, dict(level.metrics)) for level in summary.rank_levels
    )
    return Measured(summary.round, federated, dict(summary.central_metrics), levels)


def _best(best: status_pb2.BestAdapter) -> Best:
    return Best(best.round, best.metric, best.value, best.source)
