"""The sites that a plan counts on: from words on a command line and from what `raflora probe` wrote."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from coordinator.config import CoordinatorConfig
from coordinator.federation.ranks import grant_rank
from coordinator.federation.state import Measured, Profile, RankPolicy, Rules
from coordinator.manifest import rules_of
from coordinator.planning import MAX_SITES, Site
from worker.measurement import FILE_NAME, read_probe

_GROUP = re.compile(r"([0-9]{1,4})x([0-9]{1,6})")
_SITE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})=([0-9]{1,4})(?::([0-9]{1,12}))?")
_UNKNOWN_EXAMPLES = 1


@dataclass(frozen=True)
class Census:
    """What the command line says of the sites."""

    groups: str = ""  # 8x5,16x3,64x1
    named: tuple[str, ...] = ()  # NAME=RANK or NAME=RANK:EXAMPLES
    probes: tuple[Path, ...] = ()
    examples: int | None = None  # of each whose number is not told

    @property
    def named_ones(self) -> frozenset[str]:
        """Of sites with a name of their own."""
        return frozenset({_name_of(path) for path in self.probes} | {_site(text)[0] for text in self.named})


@dataclass(frozen=True)
class Counted:
    """The sites, and what was taken for granted about them."""

    sites: tuple[Site, ...]
    named: tuple[Site, ...]  # of them, those that the command line names
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    name: str
    profile: Profile
    knows_examples: bool


def sites_of(config: CoordinatorConfig, census: Census) -> Counted:
    """The sites with the ranks that ranks.policy would grant them, in the order given. Raises ConfigError."""
    candidates = list(_candidates(census))
    notes: list[str] = []
    if not candidates:
        candidates = list(_assumed(config, census.examples))
        notes.append(
            f"No census was given: {len(candidates)} sites are assumed, as rounds.min_clients and ranks.levels have "
            "it. Give --sites 8x5,16x3, --site NAME=RANK:EXAMPLES or --probe FILE."
        )
    if len(candidates) > MAX_SITES:
        raise ConfigError(f"the census has {len(candidates)} sites; at most {MAX_SITES} can be planned for")
    if len({candidate.name for candidate in candidates}) != len(candidates):
        raise ConfigError("the census has two sites of one name; --sites calls its own site-1, site-2 and so on")
    if not all(candidate.knows_examples for candidate in candidates):
        notes.append(
            "A site of unknown num_examples counts as the mean of the others: --examples or --site NAME=RANK:EXAMPLES."
        )
    rules = rules_of(config)
    sites = tuple(_granted(rules, each, order) for order, each in enumerate(candidates))
    return Counted(sites, sites[: len(census.named_ones)], tuple(notes))


def _granted(rules: Rules, candidate: _Candidate, order: int) -> Site:
    profile = candidate.profile
    if rules.rank_policy is RankPolicy.HARDWARE and profile.measured is None:
        # The command line stands for the probe that nobody has run yet.
        highest = min(profile.max_rank, rules.global_rank)
        rank = max((level for level in rules.rank_levels if level <= highest), default=highest)
        return Site(candidate.name, rank, "as given; `raflora probe` there decides", profile, candidate.knows_examples)
    grant = grant_rank(rules, candidate.name, profile, order)
    return Site(candidate.name, grant.rank, grant.reason, profile, candidate.knows_examples)


def _candidates(census: Census) -> Iterator[_Candidate]:
    named = {name: (rank, examples) for name, rank, examples in map(_site, census.named)}
    if len(named) != len(census.named):
        raise ConfigError(f"--site: a name stands twice in {', '.join(census.named)}")
    probed = {_name_of(path): path for path in census.probes}
    if len(probed) != len(census.probes):
        raise ConfigError("--probe: two files give the same site's name; put each into a folder named after its site")
    for name, path in probed.items():
        yield _probed(name, path, named.pop(name, None), census.examples)
    for name, (rank, examples) in named.items():
        yield _candidate(name, rank, examples or census.examples)
    number = 0
    for group in filter(None, census.groups.split(",")):
        rank, count = _group(group.strip())
        for _ in range(count):
            number += 1
            yield _candidate(f"site-{number}", rank, census.examples)


def _candidate(name: str, rank: int, examples: int | None) -> _Candidate:
    return _Candidate(name, Profile(rank, examples or _UNKNOWN_EXAMPLES), examples is not None)


def _probed(name: str, path: Path, bounds: tuple[int, int | None] | None, examples: int | None) -> _Candidate:
    probe = read_probe(path)
    if probe is None:
        raise ConfigError(f"--probe: there is no {path.absolute()}; give what `raflora probe` left at a site")
    found = probe.proposal
    if found is None:
        raise ConfigError(f"{path}: the probe found nothing that fits; a smaller model or a larger device is needed")
    rank, told = bounds or (found.lora_rank, None)
    examples = told or examples
    profile = Profile(
        max_rank=rank,
        num_examples=examples or _UNKNOWN_EXAMPLES,
        device=probe.device,
        memory_bytes=probe.memory_bytes,
        measured=Measured(found.line.base_bytes, found.line.bytes_per_rank, found.micro_batch, found.quantization),
        examples_per_second=probe.examples_per_second(rank),
    )
    return _Candidate(name, profile, examples is not None)


def _name_of(path: Path) -> str:
    """Every site's file is called the same, so its folder tells them apart."""
    return path.absolute().parent.name if path.name == FILE_NAME else path.stem


def _group(text: str) -> tuple[int, int]:
    match = _GROUP.fullmatch(text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--sites: {text!r}; RANKxCOUNT is expected, several of them with commas: 8x5,16x3,64x1")
    if int(match[2]) > MAX_SITES:
        raise ConfigError(f"--sites: {text}: at most {MAX_SITES} sites can be planned for")
    return int(match[1]), int(match[2])


def _site(text: str) -> tuple[str, int, int | None]:
    match = _SITE.fullmatch(text)
    if match is None or not int(match[2]) or (match[3] is not None and not int(match[3])):
        raise ConfigError(f"--site: {text!r}; NAME=RANK or NAME=RANK:EXAMPLES is expected, for example clinic=16:4000")
    return match[1], int(match[2]), int(match[3]) if match[3] is not None else None


def _assumed(config: CoordinatorConfig, examples: int | None) -> Iterator[_Candidate]:
    """As many sites as a round needs, one a level at least, each able to train the level or the global rank."""
    levels, number = config.ranks.levels, max(config.rounds.min_clients, len(config.ranks.levels))
    by_level = config.ranks.policy is RankPolicy.HARDWARE
    for place in range(number):
        rank = levels[place % len(levels)] if by_level else config.adapter.global_rank
        yield _candidate(f"site-{place + 1}", rank, examples)
