"""Every aggregation method, one small file each, found here by name; docs/methods.md compares them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from common.errors import ConfigError
from coordinator.aggregation.method import Method, MethodFactory, MethodOptions, Shrinkage
from coordinator.aggregation.methods.fedex_lora import FEDEX_LORA
from coordinator.aggregation.methods.fedit import FEDIT
from coordinator.aggregation.methods.ffa_lora import FFA_LORA
from coordinator.aggregation.methods.flexlora import FLEXLORA
from coordinator.aggregation.methods.flora import FLORA
from coordinator.aggregation.methods.florist import FLORIST
from coordinator.aggregation.methods.hetlora import HETLORA
from coordinator.aggregation.methods.raflora import RAFLORA
from coordinator.aggregation.methods.rb_lora import RB_LORA
from coordinator.aggregation.methods.replication import REPLICATION

METHODS: Mapping[str, MethodFactory] = {
    factory.name: factory
    for factory in (
        FEDEX_LORA,
        FEDIT,
        FFA_LORA,
        FLEXLORA,
        FLORA,
        FLORIST,
        HETLORA,
        RAFLORA,
        RB_LORA,
        REPLICATION,
    )
}

# What each setting may be, and how a person is told.
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "shrinkage": (lambda value: value in get_args(Shrinkage), f"one of {', '.join(get_args(Shrinkage))} is expected"),
    "weight_floor": (lambda value: 0.0 <= value <= 1.0, "a share of all examples, from 0 to 1, is expected"),
    "kappa": (lambda value: 0.0 <= value < math.inf, "a number of owners, 0 or more, is expected"),
    "energy_threshold": (lambda value: 0.0 < value <= 1.0, "a share of the energy, above 0 and up to 1, is expected"),
    "prune_share": (lambda value: 0.0 <= value < 1.0, "a share of the rank, from 0 to below 1, is expected"),
    "prune_penalty": (lambda value: 0.0 <= value < math.inf, "a weight, 0 or more, is expected"),
}


def make_method(options: MethodOptions) -> Method:
    """The method of this name with these settings. Raises ConfigError for a name or setting it cannot have."""
    if options.name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigError(f"aggregation method {options.name!r} is not known; the methods are {known}")
    factory = METHODS[options.name]
    for field in fields(options):
        if field.name != "name":
            _check_setting(factory, field.name, getattr(options, field.name), field.default)
    return factory.make(options)


def _check_setting(factory: MethodFactory, setting: str, value: Any, default: Any) -> None:
    # Another method's setting would be ignored in silence: a person who wrote it expects something of it.
    if setting not in factory.settings and value != default:
        have = ", ".join(factory.settings) or "none"
        name = setting.replace("_", " ")
        raise ConfigError(f"{setting} {value}: {factory.name} has no {name}; its settings are: {have}")
    is_allowed, expected = _RANGES[setting]
    if not is_allowed(value):
        raise ConfigError(f"{setting} {value}: {expected} ({factory.name})")
