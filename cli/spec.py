"""`raflora spec`: what a federation must know of a base model, as JSON. Runs where torch is."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cli.errors import Failed
from common.adapter import AdapterSpec
from common.errors import RafloraError
from worker.config import ModelConfig
from worker.trainer.quiet import silence_libraries
from worker.trainer_protocol import ModelOrder

_SEED = 0  # shapes do not depend on it


def spec(
    model: Annotated[str, Parameter(help="A local folder or a hub id.")],
    /,
    *,
    target_modules: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, help="The layers that get LoRA, as adapter.target_modules.")
    ],
    task: Annotated[str, Parameter(help="What the model is for, as model.task: causal-lm, image-classification, ...")],
    modules_to_save: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, help="Layers trained whole, as adapter.modules_to_save.")
    ] = (),
    labels: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, help="The classes, if the head is trained: it has their number."),
    ] = (),
    revision: Annotated[str | None, Parameter(help="A hub commit of the model.")] = None,
    offline: Annotated[bool, Parameter(help="Touch no network for the model.")] = False,
    out: Annotated[Path | None, Parameter(help="A file for the JSON, instead of standard output.")] = None,
) -> None:
    """Describes MODEL: the digest of its weights, adapted modules, shapes.

    The coordinator's settings take the file (adapter.spec), so that no worker has to be trusted with it.
    """
    if find_spec("torch") is None or find_spec("peft") is None:
        raise Failed('`raflora spec` needs torch and peft; install them with: pip install "raflora[worker]"')
    from worker.trainer.model import describe_model  # noqa: PLC0415 - torch takes seconds and may not be installed
    from worker.trainer.shapes import shapes_of  # noqa: PLC0415 - likewise

    silence_libraries()

    order = ModelOrder(
        task=task,
        labels=labels,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        lora_rank=1,
        seed=_SEED,
    )
    config = ModelConfig(path=model, revision=revision, device="cpu", offline=offline)
    try:
        described, digest = describe_model(config, order)
        base = shapes_of(config, order).base
    except RafloraError as error:
        raise Failed(str(error)) from None
    text = spec_json(described, digest, base)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
        print(f"{out}: {len(described.modules)} modules, {len(described.tensors)} tensors, digest {digest}")


def spec_json(described: AdapterSpec, base_model_digest: str, base: Mapping[str, int | str] | None = None) -> str:
    """The file's content: base_model_digest, modules by name with both sizes, tensors by name with their shape.

    `base` is what `raflora plan` reads of the rest of the model (worker.trainer.shapes); no coordinator needs it.
    """
    return json.dumps(
        {
            "base_model_digest": base_model_digest,
            "base": dict(base or {}),
            "modules": [
                {"name": m.name, "out_features": m.out_features, "in_features": m.in_features}
                for m in described.modules
            ],
            "tensors": [{"name": t.name, "shape": list(t.shape)} for t in described.tensors],
        },
        indent=2,
    )
