"""What a run shows, in sentences, the unflattering first: where raFLoRA loses, what diverged, what it costs. Pure.

Every sentence is computed from the rows of this very experiment; nothing is claimed beyond them. A difference counts
as clear where Student's 95 % interval of the differences, paired by seed, leaves out zero; at least three seeds. Only
arms of one setting are compared. Plain raFLoRA and the best of its variants are spoken of; the rest is detail.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from simulation.report.stages import by_setting, have_one_rate
from simulation.report.summary import (
    MIN_SEEDS,
    ArmSummary,
    Difference,
    Spread,
    difference,
    difference_at_rank,
    rivals_of,
)
from simulation.schedule import SAME, Choice

OURS = "raflora"
SAME_BYTES = 1.05  # a download up to so many times another's is called as large
FEW_ROUNDS = 3
NO_GAP_POINTS = 1.0  # between all at the smallest and all at the largest rank: nothing for ranks to gain
HEADLINES_OF_A_KIND = 3  # sentences about single arms that did not finish; more are details


@dataclass(frozen=True)
class Finding:
    """One sentence, and whether it speaks against raFLoRA or against trusting the numbers."""

    sentence: str
    is_against: bool
    is_detail: bool = False  # for who wants to know everything


def findings_of(summaries: Sequence[ArmSummary], choices: Sequence[Choice] = ()) -> tuple[Finding, ...]:
    """Of one stage's arms, those that speak against first; of each kind the details last."""
    found = [*_lost(summaries), *_ran_away(summaries)]
    for of_setting in by_setting(summaries).values():
        found += _of_ours(of_setting)
        found += _about_ranks([each for each in of_setting if each.is_reference and each.accuracy.n])
    found += [*_about_rounds(summaries), *_about_trust(summaries), *_about_tuning(summaries, choices)]
    return tuple(sorted(found, key=lambda finding: (not finding.is_against, finding.is_detail)))


def best_and_worst(summaries: Sequence[ArmSummary]) -> Mapping[str, tuple[str, str]]:
    """Of one setting's arms of several ranks those that lead and trail; whoever ties, or lost a run, leads nowhere."""
    rivals = rivals_of(summaries)
    measures: Mapping[str, Callable[[ArmSummary], float]] = {
        "accuracy": lambda each: -each.accuracy.mean,
        "own ranks": lambda each: -each.own_ranks.mean,
        "effective rank": lambda each: -each.effective_rank.mean,
        "download": lambda each: each.download_bytes,
    }
    found = {}
    for name, measure in measures.items():
        ordered = sorted((each for each in rivals if math.isfinite(measure(each))), key=measure)
        if len(ordered) < 2 or measure(ordered[0]) == measure(ordered[1]):
            continue
        gap = difference(ordered[0], ordered[1])
        told_apart = {"accuracy": gap.is_clear, "own ranks": gap.at_own_ranks.is_clear}
        if not told_apart.get(name, True):
            continue
        found[name] = (ordered[0].arm, ordered[-1].arm)
    return found


def _of_ours(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    """Of the arms of one setting; only those of equal level are rivals."""
    measured = [each for each in summaries if each.accuracy.n]
    for level in sorted({each.level for each in measured}):
        peers = [each for each in measured if each.level == level]
        ours = [each for each in peers if each.method == OURS]
        if not ours:
            continue
        plain = next((each for each in ours if each.census.is_plain), ours[0])
        variants = sorted((each for each in ours if each is not plain), key=lambda each: -each.accuracy.mean)
        others = [each for each in peers if each.method != OURS]
        for arm in (plain, *variants):
            is_spoken_of = arm in (plain, *variants[:1])
            for finding in (*_against_rivals(arm, others), *_by_rank(arm, others)):
                # Of the best variant what speaks against it is enough; the rest is close to what plain raFLoRA shows.
                is_shown = arm is plain or (is_spoken_of and finding.is_against)
                yield replace(finding, is_detail=not is_shown)
        if variants:
            yield _best_variant(plain, variants[0])
        if not level:
            for reference in (each for each in measured if each.is_reference):
                yield from _against_reference(plain, reference)


def _against_rivals(arm: ArmSummary, rivals: Sequence[ArmSummary]) -> Iterator[Finding]:
    """One sentence a verdict, each with all the rivals that it is about."""
    against = [(rival, difference(rival, arm)) for rival in rivals]
    unpaired = [rival.arm for rival, found in against if not found.difference.n]
    if unpaired:
        yield Finding(f"No seed finished by both {arm.arm} and {_listed(unpaired)}: no comparison.", True)
    against = [(rival, found) for rival, found in against if found.difference.n]
    above = [pair for pair in against if pair[1].is_clear and pair[1].difference.mean > 0]
    below = [pair for pair in against if pair[1].is_clear and pair[1].difference.mean < 0]
    level = [pair for pair in against if not pair[1].is_clear]
    if above:
        yield Finding(f"Above {arm.arm}: {_named(arm, above)}.", True)
    if level:
        yield Finding(f"Not told apart from {arm.arm}: {_named(arm, level)}.", True)
    if below:
        yield Finding(f"Below {arm.arm}: {_named(arm, below)}.", False)
    yield from _at_own_ranks(arm, [found for _, found in against])


def _named(arm: ArmSummary, pairs: Iterable[tuple[ArmSummary, Difference]]) -> str:
    ordered = sorted(pairs, key=lambda pair: -pair[1].difference.mean)
    return "; ".join(
        f"{rival.arm} ({_points(found.difference)}{_wins(found)}{_cost(rival, arm)})" for rival, found in ordered
    )


def _wins(found: Difference) -> str:
    return "" if found.is_clear else f", higher in {found.wins} of {_seeds(found.difference.n)}"


def _at_own_ranks(arm: ArmSummary, found: Sequence[Difference]) -> Iterator[Finding]:
    """The mean over all clients of what each receives: what a federation of unequal clients gets."""
    known = sorted((each for each in found if each.at_own_ranks.n), key=lambda each: -each.at_own_ranks.mean)
    verdicts = {
        f"above {arm.arm}": [each for each in known if each.at_own_ranks.is_clear and each.at_own_ranks.mean > 0],
        f"not told apart from {arm.arm}": [each for each in known if not each.at_own_ranks.is_clear],
        f"below {arm.arm}": [each for each in known if each.at_own_ranks.is_clear and each.at_own_ranks.mean < 0],
    }
    said = [
        f"{verdict}: {', '.join(f'{each.arm} ({_points(each.at_own_ranks)})' for each in those)}"
        for verdict, those in verdicts.items()
        if those
    ]
    if said and not arm.is_reference:
        is_against = any(not each.at_own_ranks.is_clear or each.at_own_ranks.mean > 0 for each in known)
        yield Finding(f"At the clients' own ranks, {'; '.join(said)}.", is_against)


def _by_rank(arm: ArmSummary, rivals: Sequence[ArmSummary]) -> Iterator[Finding]:
    """The client ranks whose slice is clearly better under a rival."""
    said = []
    for rank, ours in arm.accuracy_at_rank.items():
        gaps = {rival.arm: difference_at_rank(rival, arm, rank) for rival in rivals}
        better = [f"{name} ({_points(gap)})" for name, gap in gaps.items() if gap.is_clear and gap.mean > 0]
        if better and rank != arm.global_rank:
            said.append(f"at rank {rank} ({100 * ours.mean:.1f} %) {', '.join(better)}")
    if said:
        yield Finding(f"Slices clearly more accurate than {arm.arm}'s: {'; '.join(said)}.", True)


def _best_variant(plain: ArmSummary, variant: ArmSummary) -> Finding:
    found = difference(variant, plain)
    gap = f"{_points(found.difference)}{'' if found.is_clear else ', not told apart'}"
    if found.at_own_ranks.n:
        certain = "" if found.at_own_ranks.is_clear else ", not told apart"
        gap += f"; at the clients' own ranks {_points(found.at_own_ranks)}{certain}"
    return Finding(f"The most accurate variant of {plain.arm} is {variant.arm} ({gap}).", False)


def _against_reference(arm: ArmSummary, reference: ArmSummary) -> Iterator[Finding]:
    gap = difference(reference, arm).difference
    if not gap.n:
        return
    what = f"{reference.arm} (everybody at rank {reference.global_rank})"
    is_low = reference.global_rank <= arm.smallest_rank
    amount = f"{abs(100 * gap.mean):.1f} points"
    if not gap.is_clear:
        yield Finding(f"{what} and {arm.arm} are not told apart by {_seeds(gap.n)} ({_points(gap)}).", is_low)
    elif gap.mean > 0 and is_low:
        yield Finding(f"{what} reaches {amount} more than {arm.arm}: here mixed ranks gain nothing.", True)
    elif gap.mean > 0:
        yield Finding(f"{what} reaches {amount} more than {arm.arm}: the price of clients that cannot pay it.", False)
    elif is_low:
        yield Finding(f"{arm.arm} is {amount} above {what}: the higher ranks contribute.", False)
    else:
        yield Finding(f"{arm.arm} is {amount} above {what}.", False)


def _lost(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    for index, each in enumerate(each for each in summaries if each.lost):
        of = f"{len(each.lost)} of {len(each.lost) + each.finished} runs"
        yield Finding(
            f"{each.arm}: {of} did not finish at learning rate {each.learning_rate:g} ({each.decay}): "
            f"{each.lost[0]}. The means leave them out.",
            True,
            index >= HEADLINES_OF_A_KIND,
        )


def _ran_away(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    for index, each in enumerate(each for each in summaries if each.running_away):
        yield Finding(
            f"{each.arm}: in {each.running_away} of {each.finished} finished runs the norm of the global update "
            f"kept doubling while the loss rose: learning rate {each.learning_rate:g} ({each.decay}) is too high "
            "for it.",
            True,
            index >= HEADLINES_OF_A_KIND,
        )


def _about_ranks(references: Sequence[ArmSummary]) -> Iterator[Finding]:
    """Whether rank matters at all on this data."""
    if len(references) < 2:
        return
    low = min(references, key=lambda each: each.global_rank)
    high = max(references, key=lambda each: each.global_rank)
    gap = difference(high, low).difference
    if low.global_rank == high.global_rank or not gap.n:
        return
    if gap.is_within(NO_GAP_POINTS / 100):
        yield Finding(
            f"Everybody at rank {high.global_rank} is only {_points(gap)} from everybody at rank "
            f"{low.global_rank}: rank hardly matters on this data, so no method can gain by keeping it.",
            True,
        )
    elif gap.is_clear and gap.mean < 0:
        yield Finding(
            f"Everybody at rank {high.global_rank} is {-100 * gap.mean:.1f} points below everybody at rank "
            f"{low.global_rank}: on this data, at this rate, a larger rank does harm.",
            True,
        )


def _about_rounds(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    mixed = [each for each in summaries if not each.is_reference]
    if not mixed:
        yield Finding(
            "Every arm has clients of one rank only: there is no rank to lose, and raFLoRA equals FlexLoRA.", True
        )
    few = []
    for of_setting in by_setting(mixed).values():
        # An arm that diverged early says nothing about how long the others went on.
        if max(each.rounds for each in of_setting) <= FEW_ROUNDS:
            few += [each for each in of_setting]
    if few:
        rounds = max(each.rounds for each in few)
        whose = "" if len(few) == len(mixed) else f" ({_listed([each.arm for each in few])})"
        number = "one round" if rounds == 1 else f"{rounds} rounds"
        yield Finding(f"Only {number}{whose}: the collapse that raFLoRA prevents takes more to show.", True)


def _about_trust(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    seeds = max((each.accuracy.n for each in summaries), default=0)
    if seeds < MIN_SEEDS:
        number = _seeds(seeds) if seeds else "no seed"
        yield Finding(f"{number[0].upper()}{number[1:]} only: no difference here can be called clear.", True)


def _about_tuning(summaries: Sequence[ArmSummary], choices: Sequence[Choice]) -> Iterator[Finding]:
    if len(summaries) > 1 and summaries[0].stage == SAME:
        if have_one_rate(summaries):
            sentence = "No rate was chosen here: one for everybody suits some arms better than others."
        else:
            sentence = "No rate was chosen here: each is what the settings say, and suits some arms better than others."
        yield Finding(sentence, True)
    edge = [f"{each.arm} ({each.learning_rate:g})" for each in choices if each.at_the_edge]
    if edge:
        yield Finding(f"Chosen at the edge of the grid, so a wider one might do better: {_listed(edge)}.", True)
    lost = [each.arm for each in choices if math.isinf(each.validation_accuracy)]
    if lost:
        yield Finding(f"At every rate of the grid a tuning run did not finish: {_listed(lost)}.", True)


def _cost(rival: ArmSummary, arm: ArmSummary) -> str:
    """The rival's download in terms of the arm's, where they differ."""
    if not (rival.download_bytes > 0 and arm.download_bytes > 0):
        return ""
    ratio = rival.download_bytes / arm.download_bytes
    if ratio > SAME_BYTES:
        return f", at {ratio:.1f} times its download"
    if ratio < 1 / SAME_BYTES:
        return f", at {ratio:.0%} of its download"
    return ""


def _points(gap: Spread) -> str:
    return f"{100 * gap.mean:+.1f} points"


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
