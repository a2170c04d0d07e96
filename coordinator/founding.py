"""How a federation comes to be: the manifest is frozen and the adapter of round 0 is made."""

from common.adapter import AdapterSpec, initial_adapter
from common.codec import encode
from common.errors import BaseModelMismatch, ConfigError, SpecMismatch, WrongRank
from coordinator.aggregation.method import MethodOptions, make_method
from coordinator.config import CoordinatorConfig
from coordinator.federation.requests import Found
from coordinator.manifest import Manifest
from coordinator.stores.blobs import BlobStore


def check_settings(config: CoordinatorConfig) -> None:
    """What pydantic cannot know. Raises ConfigError."""
    make_method(MethodOptions(config.aggregation.method, config.aggregation.weight_floor))


def found(manifest: Manifest, blobs: BlobStore) -> Found:
    """Makes manifest and seeded adapter durable. Raises ConfigError if the global rank does not fit the layers."""
    try:
        adapter = initial_adapter(manifest.spec, manifest.adapter.global_rank, manifest.rounds.seed)
    except WrongRank as error:
        raise ConfigError(f"adapter.global_rank: {error}") from None
    return Found(manifest.rules, blobs.put(manifest.content), blobs.put(encode(adapter)))


def check_base_model(expected: str, found_digest: str, whose: str) -> None:
    """Raises BaseModelMismatch unless both sides hold the same weights; an empty `expected` accepts any."""
    if expected and expected != found_digest:
        raise BaseModelMismatch(
            f"{whose}: base model {found_digest[:12] or '(no digest)'}, but this federation trains {expected[:12]}; "
            "point the worker's model.path at the same weights"
        )


def check_spec(manifest: Manifest, spec: AdapterSpec, whose: str) -> None:
    """Raises SpecMismatch, saying how they differ, unless the worker adapts exactly the manifest's layers."""
    if spec == manifest.spec:
        return
    expected = {**{m.name: m for m in manifest.spec.modules}, **{t.name: t for t in manifest.spec.tensors}}
    have = {**{m.name: m for m in spec.modules}, **{t.name: t for t in spec.tensors}}
    missing, extra = sorted(expected.keys() - have.keys()), sorted(have.keys() - expected.keys())
    if missing or extra:
        difference = f"missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}"
    else:
        name = next(n for n in sorted(expected) if expected[n] != have[n])
        difference = f"{name} is {have[name]}, expected {expected[name]}"
    raise SpecMismatch(
        f"{whose}: other adapted layers than the federation's: {difference}; "
        "is it the same model, and the same version of transformers?"
    )
