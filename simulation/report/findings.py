"""What a run shows, in sentences, the unflattering first: where raFLoRA loses, what diverged, what it costs. Pure.

Every sentence is computed from the rows of this very experiment; nothing is claimed beyond them. A difference counts
as clear only beyond two standard errors over at least three seeds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from simulation.report.summary import ArmSummary, Difference, differences
from simulation.schedule import SAME, Choice

OURS = "raflora"
SAME_BYTES = 1.05  # a download up to so many times another's is called as large
FEW_ROUNDS = 3
NO_GAP_POINTS = 1.0  # between all at the smallest and all at the largest rank: nothing for ranks to gain


@dataclass(frozen=True)
class Finding:
    """One sentence, and whether it speaks against raFLoRA or against trusting the numbers."""

    sentence: str
    is_against: bool


def findings_of(summaries: Sequence[ArmSummary], choices: Sequence[Choice] = ()) -> tuple[Finding, ...]:
    """Of one stage's arms, those that speak against first."""
    found = [
        *_diverged(summaries),
        *_ran_away(summaries),
        *_of_ours(summaries),
        *_about_the_setting(summaries),
        *_about_tuning(summaries, choices),
    ]
    return tuple(sorted(found, key=lambda finding: not finding.is_against))


def _of_ours(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    ours = [each for each in summaries if each.method == OURS and not each.is_reference and each.accuracy.n]
    for arm in ours:
        against = {found.arm: found for found in differences(summaries, arm.arm)}
        for other in summaries:
            if other.arm == arm.arm or not other.accuracy.n:
                continue
            if other.is_reference:
                yield from _against_reference(arm, other, against[other.arm])
            elif other.method != OURS:
                yield from _against_rival(arm, other, against[other.arm])


def _against_rival(arm: ArmSummary, rival: ArmSummary, found: Difference) -> Iterator[Finding]:
    seeds = found.difference.n
    if not seeds:
        yield Finding(f"{arm.arm} and {rival.arm} share no finished seed: they cannot be compared.", True)
        return
    gap = 100 * found.difference.mean
    cost = _cost(rival, arm)
    above = f"{found.wins} of {seeds} seeds"
    if gap > 0 and found.is_clear:
        yield Finding(f"{rival.arm} is above {arm.arm} by {gap:.1f} points ({above}){cost}.", True)
    elif not found.is_clear and (gap > 0 or abs(gap) < NO_GAP_POINTS):
        yield Finding(
            f"{rival.arm} and {arm.arm} are not told apart by {_seeds(seeds)}: {gap:+.1f} points, "
            f"higher in {above}{cost}.",
            True,
        )
    elif not found.is_clear:
        yield Finding(
            f"{rival.arm} is below {arm.arm} by {-gap:.1f} points, but {_seeds(seeds)} cannot make that certain.", False
        )
    else:
        yield Finding(
            f"{rival.arm} is below {arm.arm} by {-gap:.1f} points in the mean of {_seeds(seeds)}{cost}.", False
        )
    yield from _by_rank(arm, rival)


def _by_rank(arm: ArmSummary, rival: ArmSummary) -> Iterator[Finding]:
    """The client ranks whose slice does better under the rival."""
    lost = []
    for rank, ours in arm.accuracy_at_rank.items():
        theirs = rival.accuracy_at_rank.get(rank)
        if theirs and ours.n and theirs.n and theirs.mean > ours.mean and rank != arm.global_rank:
            lost.append(f"rank {rank} ({100 * theirs.mean:.1f} against {100 * ours.mean:.1f} %)")
    if lost:
        yield Finding(
            f"Clients at {_listed(lost)} receive a more accurate slice from {rival.arm} than from {arm.arm}.", True
        )


def _against_reference(arm: ArmSummary, reference: ArmSummary, found: Difference) -> Iterator[Finding]:
    if not found.difference.n:
        return
    gap = 100 * found.difference.mean
    what = f"{reference.arm} (everybody at rank {reference.global_rank})"
    if reference.global_rank <= arm.smallest_rank and gap >= 0:
        yield Finding(f"{what} reaches {gap:.1f} points more than {arm.arm}: here mixed ranks gain nothing.", True)
    elif reference.global_rank <= arm.smallest_rank:
        yield Finding(f"{arm.arm} is {-gap:.1f} points above {what}: the higher ranks contribute.", False)
    elif gap > 0:
        yield Finding(
            f"{what} reaches {gap:.1f} points more than {arm.arm}: the price of clients that cannot afford it.", False
        )


def _diverged(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    for each in summaries:
        if each.diverged:
            of = f"{len(each.diverged)} of {len(each.diverged) + each.finished} runs"
            yield Finding(
                f"{each.arm}: {of} did not finish at learning rate {each.learning_rate:g} ({each.decay}): "
                f"{each.diverged[0]}. The means leave them out.",
                True,
            )


def _ran_away(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    for each in summaries:
        if each.running_away:
            yield Finding(
                f"{each.arm}: in {each.running_away} of {each.finished} finished runs the norm of the global update "
                f"kept doubling while the loss rose: learning rate {each.learning_rate:g} ({each.decay}) is too high "
                "for it.",
                True,
            )


def _about_the_setting(summaries: Sequence[ArmSummary]) -> Iterator[Finding]:
    references = [each for each in summaries if each.is_reference and each.accuracy.n]
    mixed = [each for each in summaries if not each.is_reference]
    if not mixed:
        yield Finding(
            "Every arm has clients of one rank only: there is no rank to lose, and raFLoRA equals FlexLoRA.", True
        )
    elif mixed[0].rounds <= FEW_ROUNDS:
        yield Finding(f"Only {mixed[0].rounds} rounds: the collapse that raFLoRA prevents takes more to show.", True)
    if len(references) > 1:
        low, high = min(references, key=_rank), max(references, key=_rank)
        gap = 100 * (high.accuracy.mean - low.accuracy.mean)
        if low.global_rank < high.global_rank and gap < NO_GAP_POINTS:
            yield Finding(
                f"Everybody at rank {high.global_rank} is only {gap:+.1f} points from everybody at rank "
                f"{low.global_rank}: rank hardly matters on this data, so no method can gain by keeping it.",
                True,
            )
    seeds = max((each.accuracy.n for each in summaries), default=0)
    if seeds < 3:
        yield Finding(
            f"{_seeds(seeds)[0].upper()}{_seeds(seeds)[1:]} only: no difference here can be called certain.", True
        )


def _about_tuning(summaries: Sequence[ArmSummary], choices: Sequence[Choice]) -> Iterator[Finding]:
    if len(summaries) > 1 and summaries[0].stage == SAME:
        yield Finding("No rate was chosen here: one for everybody suits some arms better than others.", True)
    edge = [f"{each.arm} ({each.learning_rate:g})" for each in choices if each.at_the_edge]
    if edge:
        yield Finding(f"Chosen at the edge of the grid, so a wider one might do better: {_listed(edge)}.", True)
    if any(math.isinf(each.validation_accuracy) for each in choices):
        lost = [each.arm for each in choices if math.isinf(each.validation_accuracy)]
        yield Finding(f"At every rate of the grid a tuning run diverged: {_listed(lost)}.", True)


def _cost(rival: ArmSummary, arm: ArmSummary) -> str:
    """The rival's download in terms of the arm's."""
    if not (rival.download_bytes > 0 and arm.download_bytes > 0):
        return ""
    ratio = rival.download_bytes / arm.download_bytes
    if ratio > SAME_BYTES:
        return f", at {ratio:.1f} times its download"
    if ratio < 1 / SAME_BYTES:
        return f", at {ratio:.0%} of its download"
    return ", for the same download"


def _rank(summary: ArmSummary) -> int:
    return summary.global_rank


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def best_and_worst(summaries: Sequence[ArmSummary]) -> Mapping[str, tuple[str, str]]:
    """The arms that lead and trail in accuracy, energy kept and download, among those of several ranks.

    An arm of which a run diverged leads nowhere.
    """
    rivals = [each for each in summaries if not each.is_reference and each.accuracy.n and not each.diverged]
    if len(rivals) < 2:
        return {}
    measures: Mapping[str, Callable[[ArmSummary], float]] = {
        "accuracy": lambda each: -each.accuracy.mean,
        "effective rank": lambda each: -each.effective_rank.mean,
        "download": lambda each: each.download_bytes,
    }
    found = {}
    for name, measure in measures.items():
        best, worst = min(rivals, key=measure), max(rivals, key=measure)
        if measure(best) < measure(worst):
            found[name] = (best.arm, worst.arm)
    return found
