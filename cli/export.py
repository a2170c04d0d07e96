"""`raflora export`: the published adapter as a stock PEFT folder, padded, or merged into its base model.

Only --merged needs torch. What is asked of the coordinator is what any observer may ask.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import UInt32
from raflora.v1 import status_pb2, status_pb2_grpc

from cli.connection import Connection, reach
from cli.download import fetch_adapter, read_adapter
from cli.errors import Failed
from cli.export_card import CARD_FILE, Edition, card_of
from cli.export_folder import files_in, free_folder, staged
from cli.export_hub import check_can_push, push
from cli.export_loading import FEATURES, Place, loading_lines, unknown_base
from cli.export_origin import Origin, origin_of, read_origin, write_origin
from cli.export_report import Made, Use, as_json, lines_of
from cli.export_vllm import (
    ACCEPTED_RANKS,
    Server,
    accepted_rank,
    check_served,
    pad_adapter,
    serve_lines,
    serve_merged_lines,
    warnings_for,
)
from cli.output import Format
from cli.rounds import list_rounds
from cli.words import plain
from common.adapter import Adapter, Factors
from common.errors import AdapterMismatch, ConfigError, WrongRank
from common.version import software_version
from worker.config import ModelConfig
from worker.peft_format import WEIGHTS_FILE, public_name, read_peft_folder, write_peft_folder

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_READ_BYTES = 1 << 20
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", WEIGHTS_FILE)  # in the order in which one is shown


@Parameter(name="*")
@dataclass(frozen=True)
class Form:
    """What the folder will hold."""

    rank: UInt32 = 0
    """Cut to so many directions; 0: all of them."""
    pad_to: UInt32 = 0
    """Pad with zeros to this rank, for software that takes certain ranks only."""
    for_: Annotated[Literal["vllm"] | None, Parameter(name="--for")] = None
    """Check that vLLM takes it, pad it to one of vLLM's ranks, print the command that serves it."""
    merged: bool = False
    """The whole model with the adapter in its weights, instead of the adapter; needs torch and --model."""
    with_client_names: bool = False
    """Name the clients in the model card; without it they are only counted."""


@Parameter(name="*")
@dataclass(frozen=True)
class Base:
    """The base model: a name to load it by, and how it is loaded for --merged."""

    model: str | None = None
    """A local folder or a hub id: the very model that the federation trained on, as FOLDER is to name it (no paths)."""
    revision: str | None = None
    """A hub commit of it."""
    dtype: Dtype = "auto"
    """Of the merged weights; auto: as the base model's files have it."""
    offline: bool = False
    """Touch no network when loading it."""


@Parameter(name="*")
@dataclass(frozen=True)
class Hub:
    """Where else the folder goes."""

    push_to: str | None = None
    """USER/REPOSITORY on the Hugging Face hub, with your own login."""
    private: bool = False
    """A new repository there is private."""


@dataclass(frozen=True)
class Published:
    """An adapter as it came, with what is known of it."""

    adapter: Adapter
    scaling: float
    origin: Origin


async def export(
    folder: Annotated[Path, Parameter(help="Where the weights, a model card and raflora.json go: a new folder.")],
    /,
    *,
    form: Form = Form(),
    best: Annotated[bool, Parameter(help="The best adapter so far instead of the newest.")] = False,
    from_: Annotated[
        Path | None, Parameter(name="--from", help="A folder that was exported before, instead of a coordinator.")
    ] = None,
    base: Base = Base(),
    hub: Hub = Hub(),
    overwrite: Annotated[bool, Parameter(help="Write into FOLDER although it holds files; others' stay.")] = False,
    format: Annotated[Format, Parameter(help="What is printed.")] = "table",
    connection: Connection = Connection(),
) -> None:
    """Writes the published adapter into FOLDER, so that `PeftModel.from_pretrained(base, FOLDER)` loads it.

    A download that breaks off goes on where it was when the command is run again. docs/export.md shows each kind.
    """
    _check_flags(form, best=best, from_=from_, base=base, hub=hub)
    folder = free_folder(folder, overwrite=overwrite)
    if from_ is not None:
        published = _from_folder(from_, form.rank)
    else:
        published = await _from_coordinator(connection, form, best=best, beside=folder)
    _check_form(form, published.origin)
    if base.model is not None:
        published = replace(published, origin=replace(published.origin, base_model=public_name(base.model)))
    with staged(folder) as staging:
        place = Place(hub.push_to or folder.name, published.origin.base_model, form.merged)
        edition = _write(staging, published, form, base, place)
        write_origin(staging, published.origin)
        (staging / CARD_FILE).write_text(card_of(published.origin, edition), encoding="utf-8")
        files = files_in(staging)
    made = Made(folder, files, published.origin, edition, _use(folder, published.origin, edition, form, base))
    if format == "table":
        print("\n".join(lines_of(made)))
    pushed = None if hub.push_to is None else push(folder, files, hub.push_to, private=hub.private)
    if format == "json":
        print(json.dumps({**as_json(made), "uploaded_to": pushed}, indent=2, allow_nan=False))
    elif pushed is not None:
        print(f"uploaded to {pushed}")


def _check_flags(form: Form, *, best: bool, from_: Path | None, base: Base, hub: Hub) -> None:
    """Raises ConfigError or Failed for what cannot be meant or done, before anybody is asked."""
    if best and from_ is not None:
        raise ConfigError("--best asks the coordinator, and --from asks none; leave one out")
    if form.merged and base.model is None:
        raise ConfigError("--merged needs --model BASE, the folder or hub id of the base model")
    if form.merged and form.pad_to:
        raise ConfigError("--pad-to is for adapters; a merged model has no rank to pad")
    if not form.merged and (base.revision or base.offline or base.dtype != "auto"):
        raise ConfigError("--revision, --dtype and --offline say how the base model is loaded; they go with --merged")
    if form.for_ == "vllm" and form.pad_to not in (0, *ACCEPTED_RANKS):
        ranks = ", ".join(str(rank) for rank in ACCEPTED_RANKS)
        raise ConfigError(f"--pad-to {form.pad_to}: vLLM takes the ranks {ranks}; leave --pad-to out")
    if hub.private and hub.push_to is None:
        raise ConfigError("--private is for --push-to")
    if form.merged and (find_spec("torch") is None or find_spec("peft") is None):
        raise Failed('--merged needs torch and peft; install them with: pip install "raflora[worker]"')
    if hub.push_to is not None:
        check_can_push(hub.push_to)


def _check_form(form: Form, origin: Origin) -> None:
    if form.merged and origin.task == FEATURES:
        raise Failed(
            f"--merged: a base model of the task {FEATURES!r} is of a type that plain transformers does not know, "
            "merged or not; export the adapter and load it with the lines that are printed"
        )
    if form.for_ == "vllm" and not form.merged:
        check_served(origin)


async def _from_coordinator(connection: Connection, form: Form, *, best: bool, beside: Path) -> Published:
    download = await fetch_adapter(connection, form.rank, beside=beside, best=best)
    try:
        adapter = read_adapter(download)
    except AdapterMismatch as error:
        raise Failed(str(error)) from None
    finally:
        download.path.unlink(missing_ok=True)
    async with reach(connection) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        answer = await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=connection.timeout_seconds)
    if best and not answer.status.HasField("best"):
        raise Failed(
            f"--best: coordinator {connection.address} (version {plain(answer.status.software_version)}) knows of no "
            "best adapter and sent its newest; leave --best out"
        )
    rounds = await list_rounds(connection)
    header = download.header
    origin = origin_of(header, answer.status, rounds.rounds, with_client_names=form.with_client_names)
    return Published(adapter, header.scaling, origin)


def _from_folder(folder: Path, rank: int) -> Published:
    """An adapter that was exported before. Raises ConfigError or WrongRank."""
    origin = read_origin(folder)
    try:
        adapter, scaling = read_peft_folder(folder)
    except AdapterMismatch as error:
        raise ConfigError(f"--from {error}") from None
    known = min(adapter.rank, origin.rank)  # what was padded has no more directions than before
    if rank > known:
        raise WrongRank(f"rank {rank}: the adapter in {folder} has the ranks 1 to {known}")
    adapter = _first(adapter, rank or known)
    return Published(adapter, scaling, replace(origin, rank=adapter.rank))


def _first(adapter: Adapter, rank: int) -> Adapter:
    modules = {n: Factors(f.lora_A[:rank], f.lora_B[:, :rank]) for n, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)


def _write(staging: Path, published: Published, form: Form, base: Base, place: Place) -> Edition:
    """Fills the folder with weights."""
    origin, adapter = published.origin, published.adapter
    written_rank = form.pad_to or (accepted_rank(adapter.rank) if form.for_ and not form.merged else adapter.rank)
    peft = staging / "adapter-to-merge" if form.merged else staging
    try:
        write_peft_folder(
            peft,
            pad_adapter(adapter, written_rank),
            scaling=published.scaling,
            base_model=origin.base_model,
            task=origin.task,
            modules_to_save=list(origin.modules_to_save),
        )
    except AdapterMismatch as error:
        raise Failed(str(error)) from None
    dtype = _merge(peft, staging, origin, base) if form.merged else "float32"
    return Edition(
        rank=adapter.rank,
        written_rank=written_rank,
        scaling=published.scaling,
        weights_digest=_digest_of_file(next(staging / name for name in _WEIGHTS if (staging / name).is_file())),
        place=place,
        dtype=dtype,
        exported_with=software_version(),
        made=datetime.now(UTC).date(),
        answer_ends=_answer_ends(origin, base),
    )


def _answer_ends(origin: Origin, base: Base) -> Mapping[str, int]:
    """The tokens that end an answer, where the base model's tokenizer is at hand; nothing is downloaded for it."""
    if origin.task != "causal-lm" or base.model is None or find_spec("torch") is None or find_spec("peft") is None:
        return {}
    from worker.trainer.merge import named_answer_ends  # noqa: PLC0415 - torch takes seconds
    from worker.trainer.quiet import silence_libraries  # noqa: PLC0415

    silence_libraries()
    return named_answer_ends(ModelConfig(path=base.model, revision=base.revision, offline=True))


def _merge(peft: Path, into: Path, origin: Origin, base: Base) -> str:
    """The merged model's dtype; the adapter's own folder is gone afterwards."""
    from worker.trainer.merge import MergeOrder, merge  # noqa: PLC0415 - torch takes seconds and may not be installed
    from worker.trainer.quiet import silence_libraries  # noqa: PLC0415

    silence_libraries()
    order = MergeOrder(
        model=ModelConfig(
            path=base.model or "", revision=base.revision, dtype=base.dtype, offline=base.offline, device="cpu"
        ),
        adapter=peft,
        base_model_digest=origin.base_model_digest,
        task=origin.task,
        labels=origin.labels,
        modules_to_save=origin.modules_to_save,
    )
    try:
        dtype = merge(order, into)
    except AdapterMismatch as error:
        raise Failed(str(error)) from None
    for path in peft.iterdir():
        path.unlink()
    peft.rmdir()
    return dtype


def _use(folder: Path, origin: Origin, edition: Edition, form: Form, base: Base) -> Use:
    """How the folder is loaded and served."""
    here = replace(edition.place, where=str(folder), base_model=base.model or origin.base_model)
    load = tuple(loading_lines(origin, here))
    unknown = () if form.merged else tuple(unknown_base(here.base_model))
    if form.for_ != "vllm":
        return Use(load, warnings=unknown)
    if form.merged:
        return Use(load, tuple(serve_merged_lines(str(folder))))
    server = Server(plain(here.base_model), edition.written_rank, tuple(edition.answer_ends.values()))
    return Use(load, tuple(serve_lines(folder.name, str(folder), server)), (*unknown, *warnings_for(origin)))


def _digest_of_file(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            found.update(block)
    return found.hexdigest()
