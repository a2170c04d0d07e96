"""What a client's slice or update weighs on the wire, as far as its method needs it."""

from math import prod

from common.codec import Layout
from coordinator.manifest import Manifest


def traffic_bytes(manifest: Manifest, rank: int) -> int:
    """The file's bytes; without lora_A where it is frozen, for then it follows from the federation's seed."""
    layout = Layout(manifest.spec, rank, manifest.adapter.wire_dtype)
    if not manifest.freezes_lora_A:
        return layout.size_bytes
    numbers = sum(prod(shape) for shape in layout.shapes.values())
    itemsize = (layout.size_bytes - len(layout.header)) // numbers
    return layout.size_bytes - itemsize * sum(rank * module.in_features for module in manifest.spec.modules)
