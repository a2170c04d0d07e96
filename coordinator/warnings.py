"""What an operator should look at: sentences that follow from the state alone.

Pure functions; nothing here logs, sends or decides anything. docs/operations.md says what to do about each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.aggregation.method import MethodOptions
from coordinator.aggregation.report import RankPartition, RoundReport
from coordinator.config import CoordinatorConfig
from coordinator.federation.requests import DIVERGED
from coordinator.federation.scores import reason_not_counted
from coordinator.federation.state import Phase, RankPolicy, RoundRecord, State
from coordinator.merging import report_from_json

LONG = 3  # rounds in which a partition lacks clients before that is worth a warning
SPAN = 10  # rounds over which a norm is compared, and that a federation is given to find its first directions
_SHOWN = 3  # names in a sentence
GROWTH = 2.0  # of the norm over SPAN rounds; healthy runs show 1.3 to 1.6, diverging ones 3 and more
# Here the owners of a rank index decide it among themselves, however few they are.
_OWNERS_DECIDE = frozenset({"raflora", "rb-lora", "replication"})
_WEIGHT_FLOOR = "method raflora and an aggregation.weight_floor (0.3, say)"
_HAS_DIVERGED = "the federation paused itself for good: found a new one with a lower training.learning_rate"


@dataclass(frozen=True)
class Sign:
    """Something in the finished rounds that will not mend itself."""

    about: str  # stays the same from round to round while it lasts
    sentence: str  # what is seen, and what can be done


def warnings_of(state: State, options: MethodOptions) -> list[str]:
    """All that is worth a look now, as sentences."""
    warnings = []
    rules = state.rules
    if rules is not None and state.clients and state.phase is Phase.WAITING_FOR_CLIENTS and not state.is_paused:
        gone = [c.client_id for c in state.clients.values() if not c.is_active and not c.profile.evaluates_only]
        if gone and len(state.training_clients) < rules.min_clients:
            warnings.append(
                f"too few clients are left ({', '.join(gone[:3])} gone): start the coordinator again with a smaller "
                "rounds.min_clients, or let another worker join"
            )
    if state.is_paused and state.pause_reason:
        # Why stands in the explanation of the state.
        diverged = state.pause_reason.startswith(DIVERGED)
        warnings.append(_HAS_DIVERGED if diverged else "the federation paused itself")
    signs = (*signs_of(state.history, options), *evaluation_signs(state))
    return [*warnings, *_unmeasured(state), *(sign.sentence for sign in signs)]


def _unmeasured(state: State) -> Iterator[str]:
    """Who gets the smallest level only because nobody has measured what would fit."""
    if state.rules is None or state.rules.rank_policy is not RankPolicy.HARDWARE:
        return
    names = [
        client.client_id
        for client in state.active_clients
        if client.profile.measured is None and not client.rank_is_set and not client.profile.evaluates_only
    ]
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        yield (
            f"not measured: {', '.join(names[:_SHOWN])}{more}; ranks.policy hardware gives the smallest level until "
            "`raflora probe` has run there and the worker has started again"
        )


def founding_warnings(config: CoordinatorConfig, *, is_founded: bool) -> tuple[str, ...]:
    """What a federation whose callers are known leaves to the worker that happens to join first."""
    is_open = config.adapter.spec is None and not config.model.base_model_digest
    if is_founded or not is_open or config.server.identity is None:
        return ()
    return (
        "the first worker to join decides which weights and layers all others must have: set adapter.spec or "
        "model.base_model_digest, as `raflora spec` prints it",
    )


def signs_of(history: Sequence[RoundRecord], options: MethodOptions) -> tuple[Sign, ...]:
    """What the finished rounds, oldest first, say about the coming ones."""
    if not history:
        return ()
    return (*_divergence(history, options), *_lone_owner(history, options), *_nobody(history))


def evaluation_signs(state: State) -> tuple[Sign, ...]:
    """Evaluations that take place and count for nothing."""
    rules = state.rules
    evaluated = state.newest_evaluated if rules is not None and rules.evaluate_every else None
    if rules is None or evaluated is None or not (why := reason_not_counted(evaluated, rules.stopping)):
        return ()
    return (
        Sign(
            why,
            f"{why}: round {evaluated.number} does not count for the best adapter, nor for evaluation.patience; "
            "[evaluation] may be corrected with a restart (docs/best-adapter.md)",
        ),
    )


def uncovered_rounds(history: Sequence[RoundRecord]) -> Mapping[tuple[int, int], int]:
    """Rounds since somebody last trained each of the newest round's partitions, by (low, high)."""
    if not history:
        return {}
    return {(p.low, p.high): _rounds_with_at_most(0, p, history) for p in _report(history[-1]).partitions}


def runs_away(norms: Sequence[float], losses: Sequence[float]) -> bool:
    """Whether the last of these rounds ends a run-away: a norm that explodes over ten rounds while the loss rises.

    Either alone is normal life: early rounds, or a hard cohort. Both lists have a number a round, from the first on.
    """
    if len(norms) < 2 * SPAN:
        return False
    earlier, later = _halves(losses)
    return norms[-1] > GROWTH * norms[-1 - SPAN] > 0.0 and later > earlier


def _halves(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss of the first and of the second half of the last ten rounds."""
    last = losses[-SPAN:]
    return _mean(last[: SPAN // 2]), _mean(last[SPAN // 2 :])


def _divergence(history: Sequence[RoundRecord], options: MethodOptions) -> Iterator[Sign]:
    # Counted from the end: of a long history only what the rule looks at is read.
    seen = history[-2 * SPAN :]
    norms, losses = [_report(record).norm for record in seen], [_train_loss(record) for record in seen]
    if not runs_away(norms, losses):
        return
    first, last = history[-1 - SPAN], history[-1]
    earlier, later = _halves(losses)
    about = "the global adapter seems to diverge"
    floor = f", or with {_WEIGHT_FLOOR}" if _gives_a_lone_owner_all(options) else ""
    yield Sign(
        about,
        f"{about}: rounds {first.number} to {last.number} took its norm from {norms[-1 - SPAN]:.3g} to "
        f"{norms[-1]:.3g}, the training loss from {earlier:.3g} to {later:.3g}; found a new federation with a lower "
        f"training.learning_rate that decays{floor}",
    )


def _lone_owner(history: Sequence[RoundRecord], options: MethodOptions) -> Iterator[Sign]:
    """The highest directions are one client's, and nothing bounds what it puts there."""
    if not _gives_a_lone_owner_all(options) or any(len(record.contributions) < 2 for record in history[-LONG:]):
        return
    lone = [
        partition
        for partition in _report(history[-1]).partitions
        if _rounds_with_at_most(1, partition, history) >= LONG > _rounds_with_at_most(0, partition, history)
    ]
    if not lone:
        return
    # Who owns an index owns all below it, so the partitions that lack clients follow each other.
    low, high = lone[0].low, lone[-1].high
    yield Sign(
        f"one client alone trains {_ranks(low, high)}",
        f"{_ranks(low, high)} had at most one client in each of the last {LONG} rounds, whose noise goes into the "
        f"adapter whole: let more clients of rank {high} take part, or found the next federation with {_WEIGHT_FLOOR}",
    )


def _nobody(history: Sequence[RoundRecord]) -> Iterator[Sign]:
    for (low, high), rounds in uncovered_rounds(history).items():
        if rounds >= LONG:
            about = f"{_ranks(low, high)} were trained by nobody"
            yield Sign(about, f"{about} for {rounds} rounds")


def _gives_a_lone_owner_all(options: MethodOptions) -> bool:
    if options.name != "raflora":
        return options.name in _OWNERS_DECIDE
    match options.shrinkage:
        case "weight-floor":
            return options.weight_floor == 0.0
        case "effective-owners":
            return options.kappa == 0.0
        case _:
            return False


def _rounds_with_at_most(owners: int, partition: RankPartition, history: Sequence[RoundRecord]) -> int:
    """How many of the newest rounds, without a gap, had no more owners of the partition than this."""
    rounds = 0
    for record in reversed(history):
        if sum(contribution.rank >= partition.high for contribution in record.contributions) > owners:
            break
        rounds += 1
    return rounds


def _ranks(low: int, high: int) -> str:
    return f"ranks {low + 1}-{high}" if high > low + 1 else f"rank {high}"


def _report(record: RoundRecord) -> RoundReport:
    return report_from_json(record.report_json)[0]


def _train_loss(record: RoundRecord) -> float:
    """The clients' mean, weighted by num_examples; NaN if nobody told: it compares as neither more nor less."""
    told = [c.update for c in record.contributions if "train_loss" in c.update.metrics]
    examples = sum(update.num_examples for update in told)
    return sum(u.metrics["train_loss"] * u.num_examples for u in told) / examples if examples else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
