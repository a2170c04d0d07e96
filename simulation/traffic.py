"""What travels between a coordinator and its clients, as far as the method needs it. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from common.codec import Layout
from coordinator.federation.events import AdapterPublished, Event, TaskClaimed
from coordinator.manifest import Manifest
from simulation.base_change import weight_bytes
from simulation.local_work import BaseChange


def traffic_bytes(manifest: Manifest, rank: int) -> int:
    """A slice's or update's bytes; without lora_A where it is frozen, for then the federation's seed gives it."""
    layout = Layout(manifest.spec, rank, manifest.adapter.wire_dtype)
    if not manifest.freezes_lora_A:
        return layout.size_bytes
    numbers = sum(prod(shape) for shape in layout.shapes.values())
    itemsize = (layout.size_bytes - len(layout.header)) // numbers
    return layout.size_bytes - itemsize * sum(rank * module.in_features for module in manifest.spec.modules)


@dataclass(frozen=True)
class BaseDownloads:
    """How far each client follows a base model that changes; a fold of the journal, as the state is."""

    change_bytes: tuple[int, ...] = ()  # of each published round; all zero for most methods
    followed: Mapping[str, int] = field(default_factory=dict)  # by client: the newest round whose change it has

    def missed_bytes(self, client_id: str, base: BaseChange) -> int:
        """What a client must fetch to have the accumulated change `base`.

        That is every round's change since it last fetched a task, or the changed weights themselves if they are less.
        """
        return min(sum(self.change_bytes[self.followed.get(client_id, 0) :]), weight_bytes(base))

    def after(self, event: Event, published: int) -> "BaseDownloads":
        """The same after an event that happened when so many rounds were published."""
        match event:
            case TaskClaimed(client_id=client_id) if any(self.change_bytes):
                return replace(self, followed={**self.followed, client_id: published})
            case AdapterPublished(report_json=report_json):
                newest = json.loads(report_json)["simulation"]["newest_change_bytes"]
                return replace(self, change_bytes=(*self.change_bytes, newest))
            case _:
                return self
