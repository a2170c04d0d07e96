"""What travels in the rounds: factors of rank 16 of square layers of 3072, as LLaMA-3.2-3B's q_proj."""

from common.adapter import AdapterSpec, ModuleShape

RANK = 16
_SIDE = 3072
_TINY = AdapterSpec((ModuleShape("layer", 16, 16),), ())


def spec_of(num_modules: int) -> AdapterSpec:
    """So many layers; none: one tiny layer, as small as an adapter can be, for an empty round."""
    if not num_modules:
        return _TINY
    return AdapterSpec(tuple(ModuleShape(f"layer.{i:04}", _SIDE, _SIDE) for i in range(num_modules)), ())


def modules_for(megabytes: float) -> int:
    """How many layers make about so many million bytes each way, in float32; none for an empty round."""
    return round(megabytes * 1e6 / (2 * _SIDE * RANK * 4))
