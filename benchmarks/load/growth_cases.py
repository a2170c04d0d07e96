"""What grows: one quantity at a time, everything else as in the base case."""

from dataclasses import dataclass, replace

from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout

SIDE = 768  # of every layer, as in ViT-base


@dataclass(frozen=True)
class Case:
    """One federation. Clients hold a quarter, a half and the whole of the global rank, in turn."""

    clients: int = 100
    global_rank: int = 16
    modules: int = 4

    @property
    def spec(self) -> AdapterSpec:
        """The adapted layers."""
        return AdapterSpec(tuple(ModuleShape(f"layer.{i:04}", SIDE, SIDE) for i in range(self.modules)), ())

    def rank_of(self, number: int) -> int:
        """Of the client with this number."""
        return max(1, self.global_rank >> (2, 1, 0)[number % 3])

    @property
    def directions(self) -> int:
        """The sum of all clients' ranks: what the merge is linear in."""
        return sum(self.rank_of(number) for number in range(self.clients))

    @property
    def bytes_each_way(self) -> int:
        """What all clients together download, and upload, in a round."""
        sizes = {rank: Layout(self.spec, rank).size_bytes for rank in {self.rank_of(i) for i in range(3)}}
        return sum(sizes[self.rank_of(number)] for number in range(self.clients))


BASE = Case()


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one quantity."""

    name: str  # the field of Case
    cases: tuple[Case, ...]


def sweeps(clients: list[int], ranks: list[int], modules: list[int], base: Case = BASE) -> list[Sweep]:
    """One sweep a quantity, in rising order."""
    asked = [
        Sweep("global_rank", tuple(replace(base, global_rank=value) for value in sorted(ranks))),
        Sweep("modules", tuple(replace(base, modules=value) for value in sorted(modules))),
        # Last, because it takes longest: what is left out for want of time is then the largest cohort.
        Sweep("clients", tuple(replace(base, clients=value) for value in sorted(clients))),
    ]
    return [sweep for sweep in asked if sweep.cases]
