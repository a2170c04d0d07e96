"""The manifest: the frozen description of a federation, under one digest that every task and update refers to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import cos, pi, sqrt
from pathlib import Path
from typing import Any, Self

from common.adapter import AdapterSpec, ModuleShape, TensorShape
from common.codec import Layout, digest_of
from common.errors import ConfigError, CorruptStore, InvalidRequest
from coordinator.aggregation.methods import make_method
from coordinator.config import (
    AdapterConfig,
    AggregationConfig,
    BaseModelConfig,
    CoordinatorConfig,
    EvaluationConfig,
    RanksConfig,
    RoundsConfig,
    TrainingConfig,
)
from coordinator.federation.state import Rules, Stopping

FORMAT = 1  # of the manifest; a coordinator refuses one that it does not know
_FROZEN_SECTIONS = ("model", "adapter", "rounds", "ranks", "aggregation", "training")
_NOT_PART = {  # changes no number
    "aggregation": {"processes"},
    "adapter": {"spec"},
    "model": {"base_model_digest"},  # the manifest has the true one
    # When rounds open and close may change with a restart; what is trained may not.
    "rounds": {
        "min_clients",
        "fraction",
        "quorum",
        "round_deadline_seconds",
        "lease_ttl_seconds",
        "evaluate_every",
        "max_failures",
        "max_attempts",
        "max_clients",
    },
}


@dataclass(frozen=True)
class RoundPlan:
    """How one client trains in one round."""

    learning_rate: float
    seed: int
    training: TrainingConfig
    freezes_lora_A: bool  # the method's: clients train lora_B alone


@dataclass(frozen=True)
class Manifest:
    """Everything that two sides must agree on."""

    federation: str
    model: BaseModelConfig
    adapter: AdapterConfig
    rounds: RoundsConfig
    ranks: RanksConfig
    aggregation: AggregationConfig
    training: TrainingConfig
    base_model_digest: str
    spec: AdapterSpec
    # Not part of its content: it may change with a restart.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @classmethod
    def of(cls, config: CoordinatorConfig, spec: AdapterSpec, base_model_digest: str) -> Self:
        """The manifest of a federation that is about to be founded."""
        sections = {name: getattr(config, name) for name in _FROZEN_SECTIONS}
        return cls(
            config.name, **sections, base_model_digest=base_model_digest, spec=spec, evaluation=config.evaluation
        )

    @cached_property
    def content(self) -> bytes:
        """Its canonical JSON."""
        text = json.dumps(
            {
                "format": FORMAT,
                "federation": self.federation,
                "base_model_digest": self.base_model_digest,
                "modules": [[m.name, m.out_features, m.in_features] for m in self.spec.modules],
                "tensors": [[t.name, list(t.shape)] for t in self.spec.tensors],
                **_frozen_settings(self),
            },
            sort_keys=True,
            separators=(",", ":"),
        )
        return text.encode()

    @classmethod
    def from_content(cls, content: bytes) -> Self:
        """The inverse of `content`. Raises CorruptStore for a format that this version does not know."""
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise CorruptStore(f"manifest: format {fields['format']}, but this version knows {FORMAT}; upgrade it")
        return cls(
            federation=fields["federation"],
            model=BaseModelConfig.model_validate(fields["model"]),
            adapter=AdapterConfig.model_validate(fields["adapter"]),
            rounds=RoundsConfig.model_validate(fields["rounds"]),
            ranks=RanksConfig.model_validate(fields["ranks"]),
            aggregation=AggregationConfig.model_validate(fields["aggregation"]),
            training=TrainingConfig.model_validate(fields["training"]),
            base_model_digest=fields["base_model_digest"],
            spec=spec_from_json(fields),
        )

    @cached_property
    def digest(self) -> str:
        """Its name."""
        return digest_of(self.content)

    @cached_property
    def freezes_lora_A(self) -> bool:
        """Whether clients train lora_B alone, because the method averages it over one common lora_A."""
        return make_method(self.aggregation.options).freezes_lora_A

    def layout(self, rank: int) -> Layout:
        """How a client's slice and update of this rank lie in their files."""
        return Layout(self.spec, rank, self.adapter.wire_dtype)

    def scaling(self, rank: int) -> float:
        """The factor before lora_B lora_A that a client of this rank uses."""
        alpha = self.adapter.lora_alpha
        match self.adapter.scaling:
            case "constant":
                return alpha
            case "alpha_over_rank":
                return alpha / rank
            case "alpha_over_sqrt_rank":
                return alpha / sqrt(rank)

    def learning_rate(self, round_number: int) -> float:
        """Of a round, counted from 1: decayed from learning_rate to final_fraction of it in the last round."""
        training, last = self.training, self.rounds.num_rounds - 1
        done = (round_number - 1) / last if last > 0 else 0.0
        match training.decay:
            case "constant":
                return training.learning_rate
            case "linear":
                left = 1.0 - done
            case "cosine":
                left = (1.0 + cos(pi * done)) / 2.0
        return training.learning_rate * (training.final_fraction + (1.0 - training.final_fraction) * left)

    def plan(self, round_number: int, client_id: str) -> RoundPlan:
        """The same for every attempt of a round, so that a repeated round gives the same bytes."""
        seed = hashlib.sha256(f"{self.rounds.seed}/{round_number}/{client_id}".encode()).digest()
        return RoundPlan(
            learning_rate=self.learning_rate(round_number),
            seed=int.from_bytes(seed[:4], "big") >> 1,  # 31 bits: every random generator accepts them
            training=self.training,
            freezes_lora_A=self.freezes_lora_A,
        )

    @property
    def rules(self) -> Rules:
        """The state machine's part; of a manifest read from the store, rounds and stopping have only what is frozen."""
        return rules_of(self)


def rules_of(source: Manifest | CoordinatorConfig) -> Rules:
    """The state machine's part of a federation, founded or still in its settings."""
    rounds, ranks, evaluation = source.rounds, source.ranks, source.evaluation
    return Rules(
        num_rounds=rounds.num_rounds,
        global_rank=source.adapter.global_rank,
        seed=rounds.seed,
        min_clients=rounds.min_clients,
        fraction=rounds.fraction,
        quorum=rounds.quorum,
        round_deadline_seconds=rounds.round_deadline_seconds,
        lease_ttl_seconds=rounds.lease_ttl_seconds,
        evaluate_every=rounds.evaluate_every,
        max_failures=rounds.max_failures,
        max_attempts=rounds.max_attempts,
        max_clients=rounds.max_clients,
        rank_policy=ranks.policy,
        rank_table=tuple((rule.client, rule.rank) for rule in ranks.table),
        rank_levels=ranks.levels,
        memory_share=ranks.memory_share,
        stopping=Stopping(
            metric=evaluation.metric_of(source.model.task),
            is_larger_better=evaluation.is_larger_better(source.model.task),
            is_central=evaluation.source == "central",
            min_delta=evaluation.min_delta,
            patience=evaluation.patience,
        ),
    )


def check_unchanged(manifest: Manifest, config: CoordinatorConfig) -> None:
    """Raises ConfigError that names the key if a founded federation is started with other settings."""
    if config.model.base_model_digest not in ("", manifest.base_model_digest):
        raise ConfigError(
            f"model.base_model_digest: {config.model.base_model_digest[:12]}, but federation {manifest.federation!r} "
            f"trains {manifest.base_model_digest[:12]}"
        )
    before, now = _frozen_settings(manifest), _frozen_settings(config)
    for section, settings in now.items():
        for key, value in settings.items():
            found = before[section].get(key)
            if found != value:
                raise ConfigError(
                    f"{section}.{key}: {value!r}, but federation {manifest.federation!r} was founded with {found!r} "
                    f"and cannot change; start a new one in another state_dir than {config.state_dir}"
                )


def spec_from_json(fields: Mapping[str, Any]) -> AdapterSpec:
    """The spec in a manifest."""
    return AdapterSpec(
        tuple(ModuleShape(name, out, into) for name, out, into in fields["modules"]),
        tuple(TensorShape(name, tuple(shape)) for name, shape in fields["tensors"]),
    )


def read_spec_file(path: Path) -> tuple[AdapterSpec, str]:
    """What `raflora spec` wrote: the spec and the base model's digest. Raises ConfigError."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        spec = AdapterSpec(
            tuple(ModuleShape(m["name"], m["out_features"], m["in_features"]) for m in fields["modules"]),
            tuple(TensorShape(t["name"], tuple(t["shape"])) for t in fields["tensors"]),
        )
        return spec, str(fields["base_model_digest"])
    except OSError as error:
        raise ConfigError(f"adapter.spec: {path.absolute()} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise ConfigError(f"adapter.spec: {path} is not what `raflora spec` writes: {error!r}") from None


def _frozen_settings(source: Manifest | CoordinatorConfig) -> dict[str, dict[str, Any]]:
    return {
        name: getattr(source, name).model_dump(mode="json", exclude=_NOT_PART.get(name)) for name in _FROZEN_SECTIONS
    }
