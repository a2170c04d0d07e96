"""What a federation will cost before anybody spends money: bytes, memory, time, and which ranks would die.

Pure arithmetic on settings, shapes and a census of sites; no file is read, no model is loaded, nobody is asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout, WireDtype
from common.sizes import human_bytes
from coordinator.aggregation.forecast import CollapseForecast, energy_factor, forecast_collapse, half_life_of
from coordinator.aggregation.iterated import is_large
from coordinator.config import CoordinatorConfig
from coordinator.federation.state import Profile, part_of
from coordinator.footprint import BaseFacts, Footprint, StepSetting, footprint_of, lora_numbers, trained_numbers

# Of one core in float64 with one BLAS thread: 9 to 44 measured on 2 cores with AVX2 (2026-11-23), small stacks slowest.
AGGREGATION_FLOPS = 10e9
_HALF_PASSES = 4  # what an iteration takes on trained factors; its panels are within the rate
FEW_OWNERS = 2  # a rank partition with fewer is one site's, or nobody's
MAX_SITES = 100_000


@dataclass(frozen=True)
class Site:
    """One site of the census, with the rank that it will train at."""

    name: str
    rank: int
    reason: str
    profile: Profile  # measured: what `raflora probe` wrote
    knows_examples: bool = False  # whether profile.num_examples was told


@dataclass(frozen=True)
class Links:
    """Connections, in megabits a second each way."""

    site_mbit: float = 100.0
    coordinator_mbit: float = 1000.0

    def seconds(self, size_bytes: int, cohort_bytes: int) -> float:
        """For one site's bytes, while the whole cohort's pass the coordinator's link."""
        return max(8e-6 * size_bytes / self.site_mbit, 8e-6 * cohort_bytes / self.coordinator_mbit)


@dataclass(frozen=True)
class Question:
    """Everything that a plan is made of."""

    config: CoordinatorConfig
    spec: AdapterSpec
    base: BaseFacts
    setting: StepSetting
    sites: tuple[Site, ...]
    links: Links = Links()


@dataclass(frozen=True)
class LevelPlan:
    """The sites of one rank."""

    rank: int
    sites: tuple[str, ...]
    lora_parameters: int  # exact, as all numbers of shapes
    trained_parameters: int  # those and the modules that are trained whole
    slice_bytes: int  # one download: exact
    update_bytes: int  # one upload: exact
    footprint: Footprint
    measured_bytes: int  # the largest of its probed sites' training steps; 0: nobody was probed
    memory_bytes: int  # the smallest of its probed sites' devices; 0: not known
    transfer_seconds: float  # down and up, while all others of the cohort transfer too: an estimate
    training_seconds: float  # of the slowest site, at the speed that was measured there; 0: not known


@dataclass(frozen=True)
class Partition:
    """The rank indices from low (inclusive) to high, and what becomes of their energy without news."""

    low: int
    high: int
    sites: int
    share: float  # of all examples (weights_of)
    average_factor: float  # what a rank-agnostic average (FlexLoRA) leaves of it after a round; raFLoRA leaves all
    half_life_rounds: float  # under that average; infinity: it stays


@dataclass(frozen=True)
class Traffic:
    """Bytes of adapters through the coordinator; what gRPC and TLS put around them is not counted."""

    down_round: int  # of a round's cohort
    up_round: int
    down_total: int  # over all rounds, evaluations included
    up_total: int
    is_exact: bool  # every site takes part in every round; otherwise what is expected of a draw


@dataclass(frozen=True)
class FederationPlan:
    """The answer."""

    levels: tuple[LevelPlan, ...]
    traffic: Traffic
    cohort: int
    aggregation_seconds: float  # of one round: an estimate
    round_seconds: float  # training, transfers and aggregation; 0: a level's speed is not known
    partitions: tuple[Partition, ...]
    forecast: CollapseForecast
    warnings: tuple[str, ...]


def plan_federation(question: Question) -> FederationPlan:
    """The plan. The census is not empty, and no site's rank is above the global one."""
    config, sites = question.config, question.sites
    rounds = config.rounds
    cohort = min(len(sites), max(rounds.min_clients, part_of(rounds.fraction, len(sites))))
    ranks = sorted({site.rank for site in sites})
    levels = tuple(_level(question, rank, _cohort_bytes(question, cohort)) for rank in ranks)
    aggregation = aggregation_seconds(question, cohort)
    slowest = max((level.transfer_seconds + level.training_seconds for level in levels), default=0.0)
    is_known = all(level.training_seconds for level in levels)
    round_seconds = slowest + aggregation if is_known else 0.0  # of some levels' speed alone nothing follows
    partitions = _partitions(question, cohort)
    census = [(site.rank, weight) for site, weight in zip(sites, weights_of(sites), strict=True)]
    return FederationPlan(
        levels=levels,
        traffic=_traffic(question, levels, cohort),
        cohort=cohort,
        aggregation_seconds=aggregation,
        round_seconds=round_seconds,
        partitions=partitions,
        forecast=forecast_collapse(census, cohort),
        warnings=_warnings(question, partitions, round_seconds),
    )


def _cohort_bytes(question: Question, cohort: int) -> int:
    """Of one slice for everybody in a cohort, as far as a draw can be expected to be like all sites."""
    sizes = {rank: _slice_bytes(question, rank) for rank in {site.rank for site in question.sites}}
    return round(sum(sizes[site.rank] for site in question.sites) * cohort / len(question.sites))


def _slice_bytes(question: Question, rank: int) -> int:
    return Layout(question.spec, rank, WireDtype(question.config.adapter.wire_dtype)).size_bytes


def _level(question: Question, rank: int, cohort_bytes: int) -> LevelPlan:
    spec = question.spec
    sites = [site for site in question.sites if site.rank == rank]
    size_bytes = _slice_bytes(question, rank)
    measured = [site.profile.measured for site in sites if site.profile.measured is not None]
    memories = [site.profile.memory_bytes for site in sites if site.profile.memory_bytes]
    seconds = [training_seconds(question.config, site) for site in sites]
    probed = [each for each in seconds if each]
    return LevelPlan(
        rank=rank,
        sites=tuple(site.name for site in sites),
        lora_parameters=lora_numbers(spec, rank),
        trained_parameters=trained_numbers(spec, rank, freezes_lora_A=question.setting.freezes_lora_A),
        slice_bytes=size_bytes,
        update_bytes=size_bytes,
        footprint=footprint_of(spec, rank, question.base, question.setting),
        measured_bytes=max((each.base_bytes + rank * each.bytes_per_rank for each in measured), default=0),
        memory_bytes=min(memories, default=0),
        transfer_seconds=2 * question.links.seconds(size_bytes, cohort_bytes),  # once down, once up
        training_seconds=max(probed, default=0.0),
    )


def training_seconds(config: CoordinatorConfig, site: Site) -> float:
    """Of a round at the speed that was measured there; 0: speed or number of examples is not known."""
    training, speed = config.training, site.profile.examples_per_second
    if speed <= 0.0:
        return 0.0
    if training.local_steps:
        return training.local_steps * training.batch_size / speed
    return training.local_epochs * site.profile.num_examples / speed if site.knows_examples else 0.0


def aggregation_seconds(question: Question, cohort: int) -> float:
    """One round's decompositions of all modules, spread over the processes: an estimate."""
    # The widest stack that a cohort can have: its largest ranks.
    width = sum(sorted((site.rank for site in question.sites), reverse=True)[:cohort])
    rank = question.config.adapter.global_rank
    total = sum(_aggregation_flops(module, width, rank) for module in question.spec.modules)
    return total / AGGREGATION_FLOPS / max(1, question.config.aggregation.processes)


def _aggregation_flops(module: ModuleShape, width: int, rank: int) -> float:
    """A large stack's half passes, or a small one's thin QRs, the core's product and SVD, and the way back."""
    sides = (module.out_features, module.in_features)
    if is_large(width, sides, rank):
        return _HALF_PASSES * 2.0 * sum(sides) * width * rank
    qr = sum(4 * side * width**2 - 4 / 3 * width**3 + 2 * side * width * rank for side in sides if width < side)
    short, long = sorted(min(side, width) for side in sides)
    return qr + 2 * short * width * long + 22 * short**2 * long


def _traffic(question: Question, levels: Sequence[LevelPlan], cohort: int) -> Traffic:
    rounds, number = question.config.rounds, len(question.sites)
    drawn = cohort / number
    every, last = rounds.evaluate_every, rounds.num_rounds
    evaluated = sum(done % every == 0 or done == last for done in range(1, last + 1)) if every else 0
    # A slice that was evaluated is still there when the next round trains from it; the last one is only evaluated.
    only_trained = last - (evaluated - 1 if evaluated else 0)
    a_round = drawn * sum(len(level.sites) * level.slice_bytes for level in levels)
    everybody = sum(len(level.sites) * level.slice_bytes for level in levels)
    return Traffic(
        down_round=round(a_round),
        up_round=round(drawn * sum(len(level.sites) * level.update_bytes for level in levels)),
        down_total=round(a_round * only_trained + everybody * evaluated),
        up_total=round(a_round * last),
        is_exact=cohort == number,
    )


def weights_of(sites: Sequence[Site]) -> tuple[int, ...]:
    """Every site's examples; a number that is not known is taken to be the mean of the others."""
    known = [site.profile.num_examples for site in sites if site.knows_examples]
    usual = max(1, round(sum(known) / len(known))) if known else 1
    return tuple(site.profile.num_examples if site.knows_examples else usual for site in sites)


def _partitions(question: Question, cohort: int) -> tuple[Partition, ...]:
    """Between the ranks that somebody holds, the levels that may be granted, and the global rank."""
    sites, config = question.sites, question.config
    bounds = sorted({site.rank for site in sites} | set(config.ranks.levels) | {config.adapter.global_rank})
    weights = weights_of(sites)
    partitions = []
    for low, high in zip([0, *bounds], bounds, strict=False):
        owners = [weight for site, weight in zip(sites, weights, strict=True) if site.rank >= high]
        share = sum(owners) / sum(weights)
        factor = energy_factor(share, len(sites), cohort)
        partitions.append(Partition(low, high, len(owners), share, factor, half_life_of(factor)))
    return tuple(partitions)


def _warnings(question: Question, partitions: Sequence[Partition], round_seconds: float) -> tuple[str, ...]:
    rounds = question.config.rounds
    warnings = []
    if len(question.sites) < rounds.min_clients:
        warnings.append(
            f"{len(question.sites)} sites, but rounds.min_clients is {rounds.min_clients}: no round would open"
        )
    floor = question.config.aggregation.weight_floor
    warnings += [_few_owners(partition, floor) for partition in partitions if partition.sites < FEW_OWNERS]
    if not floor and any(partition.sites == 1 for partition in partitions):
        warnings.append("let a second site train each of these ranks, or set aggregation.weight_floor (0.3, say)")
    warnings += [why for site in question.sites for why in _too_large(site, question.config.ranks.memory_share)]
    if round_seconds > rounds.round_deadline_seconds:
        warnings.append(
            f"a round takes about {round_seconds:,.0f} s, but rounds.round_deadline_seconds is "
            f"{rounds.round_deadline_seconds:,.0f}: it would close without the slowest, or not at all"
        )
    return tuple(warnings)


def _few_owners(partition: Partition, weight_floor: float) -> str:
    is_one = partition.high == partition.low + 1
    name = f"rank {partition.high}" if is_one else f"ranks {partition.low + 1}-{partition.high}"
    if partition.sites == 0:
        return f"{name}: no site trains them; a smaller adapter.global_rank would do"
    is_bounded = f"aggregation.weight_floor {weight_floor:g} bounds what it does"
    fate = is_bounded if weight_floor else "its noise goes into the adapter whole"
    return f"{name}: one site alone trains them, and {fate}"


def _too_large(site: Site, memory_share: float) -> Iterator[str]:
    profile, measured = site.profile, site.profile.measured
    if measured is None:
        return
    needed = measured.base_bytes + site.rank * measured.bytes_per_rank
    if needed > memory_share * profile.memory_bytes:
        yield (
            f"{site.name}: a step at rank {site.rank} takes {human_bytes(needed)} as probed, which is more than "
            f"{memory_share:.0%} of the device's {human_bytes(profile.memory_bytes)}"
        )
