"""`raflora plan`: what a federation will cost, before anybody spends money. Asks nobody and changes nothing."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from cli.census import Census, sites_of
from cli.errors import Failed
from cli.output import Format, print_screen
from cli.plan_tables import Assumed, plan_json, plan_screen
from common.adapter import AdapterSpec, check_rank
from common.errors import ConfigError, RafloraError, WrongRank
from common.settings import load_settings
from coordinator.aggregation.methods import make_method
from coordinator.config import CoordinatorConfig
from coordinator.footprint import DTYPE_BYTES, BaseFacts, StepSetting
from coordinator.founding import read_spec
from coordinator.planning import Links, Question, plan_federation
from worker.config import ModelConfig, WorkerConfig

_LANGUAGE_MODEL = "causal-lm"
_MAX_LENGTH = 256  # a worker's own default

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]


@Parameter(name="*")
@dataclass(frozen=True)
class Step:
    """How the sites train, as their worker.toml will have it; each of these has precedence over that file."""

    worker: Path | None = None
    """A site's worker.toml, of which only what decides about memory is read."""
    micro_batch: PositiveInt | None = None
    """Examples at one time, as a worker's batch_size; unset: training.batch_size."""
    max_length: PositiveInt | None = None
    """Tokens of an example, as a worker's data.max_length; unset: 256."""
    dtype: Dtype | None = None
    """Number format of the frozen weights in memory; unset: the checkpoint's, or bfloat16 beside quantised ones."""
    quantization: Quantization | None = None
    """How the frozen weights are quantised in memory; unset: not at all."""
    gradient_checkpointing: Annotated[bool | None, Parameter(negative="--no-gradient-checkpointing")] = None
    """Recompute activations instead of keeping them: less memory, more time."""


@Parameter(name="*")
@dataclass(frozen=True)
class Bandwidth:
    """Links."""

    mbit: PositiveFloat = 100.0
    """Of every site's link, in Mbit/s each way."""
    coordinator_mbit: PositiveFloat = 1000.0
    """Of the coordinator's link, which all share."""


def plan(
    federation: Annotated[Path, Parameter(help="federation.toml, as `raflora coordinator` takes it.")],
    /,
    *,
    sites: Annotated[str, Parameter(help="RANKxCOUNT, separated by commas: 8x5,16x3,64x1.")] = "",
    site: Annotated[
        tuple[str, ...],
        Parameter(
            help="NAME=RANK or NAME=RANK:EXAMPLES; repeatable. For a site with --probe, RANK is its largest rank."
        ),
    ] = (),
    probe: Annotated[
        tuple[Path, ...],
        Parameter(consume_multiple=True, help="What `raflora probe` wrote at a site; the folder is the site's name."),
    ] = (),
    examples: Annotated[
        PositiveInt | None, Parameter(help="Training examples of each site for which --site gives none.")
    ] = None,
    model: Annotated[str, Parameter(help="A folder or hub id, if adapter.spec is unset: reads config.json only.")] = "",
    step: Step = Step(),
    links: Bandwidth = Bandwidth(),
    offline: Annotated[bool, Parameter(help="Touch no network for --model.")] = False,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")] = (),
    format: Format = "table",
) -> None:
    """Predicts bytes, memory, time and the collapse of ranks for FEDERATION and a census of its sites.

    Every figure says whether it is exact, measured (--probe) or an estimate.
    """
    config = load_settings(CoordinatorConfig, federation, overrides=set_)
    spec, base = _shapes(config, model, offline=offline)
    census = sites_of(config, Census(sites, site, probe, examples))
    question = Question(
        config=config,
        spec=spec,
        base=base,
        setting=_setting_of(config, base, step),
        sites=census.sites,
        links=Links(links.mbit, links.coordinator_mbit),
    )
    answer = plan_federation(question)
    assumed = Assumed(question, census.named, census.notes)
    if format == "json":
        print(json.dumps(plan_json(answer, assumed), indent=2, allow_nan=False))
    else:
        print_screen(plan_screen(answer, assumed))
    sys.stdout.flush()


def _setting_of(config: CoordinatorConfig, base: BaseFacts, step: Step) -> StepSetting:
    # What overrides the settings of a coordinator or worker here is not meant for that site's.
    worker = None if step.worker is None else load_settings(WorkerConfig, step.worker, environ={})
    quantization: str = step.quantization or (worker.model.quantization if worker else "none")
    dtype: str = step.dtype or (worker.model.dtype if worker else "auto")
    if dtype == "auto":
        dtype = base.dtype if base.dtype in DTYPE_BYTES and quantization == "none" else "bfloat16"
    checkpoints = step.gradient_checkpointing
    if checkpoints is None:
        checkpoints = worker is not None and worker.model.gradient_checkpointing
    return StepSetting(
        micro_batch=step.micro_batch or (worker and worker.batch_size) or config.training.batch_size,
        tokens=step.max_length or (worker.data.max_length if worker else _MAX_LENGTH),
        dtype=dtype,
        quantization=quantization,
        checkpoints_gradients=checkpoints,
        is_language_model=config.model.task == _LANGUAGE_MODEL,
        freezes_lora_A=make_method(config.aggregation.options).freezes_lora_A,
    )


def _shapes(config: CoordinatorConfig, model: str, *, offline: bool) -> tuple[AdapterSpec, BaseFacts]:
    """What is adapted, and what is known of the rest. Raises ConfigError."""
    if model:
        return _shapes_of_model(config, model, offline=offline)
    if config.adapter.spec is None:
        raise ConfigError(
            "the shapes of the adapted layers are not known: set adapter.spec to what `raflora spec` writes, or give "
            "--model FOLDER_OR_ID, of which config.json is read"
        )
    spec, _ = read_spec(config, config.adapter.spec)
    return spec, _base_in(config.adapter.spec)


def _base_in(path: Path) -> BaseFacts:
    """The object "base" of a spec file; a file without it says nothing about memory."""
    fields: Any = json.loads(path.read_text(encoding="utf-8")).get("base", {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"adapter.spec: {path}: base is no object; write it anew with `raflora spec`")
    return BaseFacts.from_json(fields, f"adapter.spec: {path}")


def _shapes_of_model(config: CoordinatorConfig, model: str, *, offline: bool) -> tuple[AdapterSpec, BaseFacts]:
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise Failed(
            '--model needs torch and transformers (pip install "raflora[worker]"); without them run `raflora spec` '
            "where they are, and set adapter.spec"
        )
    from worker.trainer.quiet import silence_libraries  # noqa: PLC0415
    from worker.trainer.shapes import shapes_of  # noqa: PLC0415 - torch takes seconds and may not be installed
    from worker.trainer_protocol import ModelOrder  # noqa: PLC0415

    silence_libraries()
    order = ModelOrder(
        task=config.model.task,
        labels=config.model.labels,
        target_modules=config.adapter.target_modules,
        modules_to_save=config.adapter.modules_to_save,
        lora_rank=1,
        seed=0,  # shapes do not depend on it
    )
    try:
        shapes = shapes_of(ModelConfig(path=model, device="cpu", offline=offline), order)
        check_rank(shapes.spec, config.adapter.global_rank)
    except WrongRank as error:
        raise ConfigError(f"adapter.global_rank: {error}") from None
    except RafloraError as error:
        raise Failed(str(error)) from None
    return shapes.spec, BaseFacts.from_json(shapes.base, model)
