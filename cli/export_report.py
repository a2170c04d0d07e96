"""What `raflora export` says of a folder that it made: lines for people, an object for machines. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.export_card import Edition
from cli.export_origin import Origin
from cli.words import plain
from common.sizes import human_bytes

_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Use:
    """How a folder is used, in lines that can be pasted."""

    load: tuple[str, ...]  # of Python
    serve: tuple[str, ...] = ()  # of a shell; empty unless they were asked for
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """A folder, complete."""

    folder: Path
    files: Sequence[str]  # relative, those that this export wrote
    origin: Origin
    edition: Edition
    use: Use


def lines_of(made: Made) -> list[str]:
    """For people."""
    origin, edition = made.origin, made.edition
    padded = "" if edition.written_rank == edition.rank else f", padded to {edition.written_rank}"
    size = human_bytes(sum(size for name, size in _sizes(made).items() if name.endswith(_WEIGHTS)))
    what = f"merged, {edition.dtype}, {size}" if edition.place.merged else size
    return [
        f"{made.folder}: round {origin.round}, rank {edition.rank}{padded}, {what}",
        f"trained on {plain(origin.base_model)}, weights sha256 {plain(origin.base_model_digest)}",
        *(f"  {line}" for line in made.use.load),
        *made.use.warnings,
        *made.use.serve,
    ]


def as_json(made: Made) -> dict[str, Any]:
    """For machines; the digests are SHA-256, an empty one is not known."""
    origin, edition = made.origin, made.edition
    return {
        "folder": str(made.folder),
        "federation": origin.federation,
        "round": origin.round,
        "rank": edition.rank,
        "written_rank": edition.written_rank,  # with the zeros of padding
        "merged": edition.place.merged,
        "dtype": edition.dtype,
        "task": origin.task,
        "base_model": origin.base_model,
        "base_model_digest": origin.base_model_digest,
        "adapter_digest": origin.adapter_digest,  # of the global adapter, as `raflora rounds` shows it
        "weights_digest": edition.weights_digest,  # of the file here
        "files": [{"name": name, "size_bytes": size} for name, size in _sizes(made).items()],
        "load": list(made.use.load),
        "serve": list(made.use.serve),
        "warnings": list(made.use.warnings),
    }


def _sizes(made: Made) -> dict[str, int]:
    return {name: (made.folder / name).stat().st_size for name in made.files}
