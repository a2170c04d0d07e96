"""The best adapter in a whole coordinator without a network: kept from the sweep, served, exported, warned of."""

import asyncio
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from coordinators import SPEC, config_of
from lone_site import KEY, Site, blobs_of, lonely, running
from pydantic import ValidationError
from rounds import ADA, EVERYBODY, after, joins, lost, one_round, started

from common.errors import NoBestAdapter, NothingPublished
from coordinator.aggregation.method import MethodOptions
from coordinator.config import CoordinatorConfig
from coordinator.federation.requests import Join, Outcome, SubmitEvaluation
from coordinator.federation.state import Evaluation, Kind, Profile, RoundRecord, Stopping
from coordinator.manifest import Manifest, check_unchanged
from coordinator.publishing import PublishedAdapter
from coordinator.service import CoordinatorService
from coordinator.servicers.status_view import status_of
from coordinator.stores.journal import MemoryJournal
from coordinator.warnings import evaluation_signs, warnings_of

PAPER = MethodOptions("raflora")
SCORES = (0.9, 0.5, 0.5)


@dataclass
class Exports:
    """What was exported, in order."""

    rounds: asyncio.Queue[int]

    def take(self, published: PublishedAdapter) -> None:
        self.rounds.put_nowait(published.round)


def scored(folder: Path, **changes: object) -> CoordinatorConfig:
    settings = {"rounds__num_rounds": 4, "rounds__evaluate_every": 1, "store__keep_rounds": 1}
    return lonely(folder, **(settings | changes))


async def play(ada: Site, accuracy: float) -> str:
    """One round of Ada's with its evaluation; its adapter's digest."""
    await ada.work()
    task = await ada.fetch()
    assert task.kind is Kind.EVALUATE
    lease = ("ada", task.lease_token, task.number, task.attempt, task.slice.digest)
    submission = SubmitEvaluation(*lease, Evaluation(10, {"accuracy": accuracy}))
    assert await ada.service.intake.submit_evaluation(submission, KEY) is Outcome.ACCEPTED
    return ada.service.engine.state.history[-1].adapter_digest


async def test_the_best_adapter_outlives_the_rounds_that_are_kept_and_an_earlier_best_does_not(tmp_path: Path) -> None:
    config = scored(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        published = [await play(ada, accuracy) for accuracy in (0.25, *SCORES)]
        await ada.service._publisher.sweep()
        kept = ada.service.blobs.digests()
        assert [digest in kept for digest in published] == [False, True, False, True]
        assert ada.service.engine.state.best is not None
        assert ada.service.engine.state.best.adapter_digest == published[1]


async def test_who_asks_too_early_is_told_why_there_is_no_best_adapter(tmp_path: Path) -> None:
    config = scored(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        service = ada.service
        with pytest.raises(NothingPublished, match="round 1 is not finished"):
            await service.published_slice(2, best=True)
        await ada.work()
        await ada.published()
        with pytest.raises(NoBestAdapter, match="1 rounds are published, and none of them is evaluated"):
            await service.published_slice(2, best=True)


async def test_a_slice_of_the_best_adapter_is_served_after_a_sweep_and_stays(tmp_path: Path) -> None:
    config = scored(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        service = ada.service
        for accuracy in SCORES:
            await play(ada, accuracy)
        best, newest = await service.published_slice(2, best=True), await service.published_slice(2)
        assert (best.rank, best.round, newest.round) == (2, 1, 3)
        await service._publisher.sweep()
        assert best.reference.digest in service.blobs.digests()
        assert await service.published_slice(2, best=True) == best
        assert (await service.published_slice(0, best=True)).rank == 8


async def test_the_best_adapter_is_exported_when_it_becomes_the_best_and_once_after_a_start(tmp_path: Path) -> None:
    config, journal, exports = scored(tmp_path), MemoryJournal(), Exports(asyncio.Queue())
    async with running(CoordinatorService(config, journal, blobs_of(config), on_best=exports.take)) as ada:
        for accuracy in (0.25, 0.5):
            await play(ada, accuracy)
            assert await asyncio.wait_for(exports.rounds.get(), 30) == ada.service.engine.state.round
        await play(ada, 0.5)
    async with running(CoordinatorService(config, journal, blobs_of(config), on_best=exports.take)):
        assert await asyncio.wait_for(exports.rounds.get(), 30) == 2
    assert exports.rounds.empty()


async def test_what_is_being_exported_outlives_the_next_best_and_a_sweep(tmp_path: Path) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def export(published: PublishedAdapter) -> None:
        if published.round == 1:
            begun.set()
            assert may_go_on.wait(30)

    config = scored(tmp_path)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config), on_best=export)) as ada:
        service = ada.service
        try:
            first = await play(ada, 0.25)
            assert await asyncio.to_thread(begun.wait, 30)
            await play(ada, 0.5)
            await play(ada, 0.5)
            await service._publisher.sweep()
            assert service.engine.state.best is not None
            assert service.engine.state.best.round == 2
            assert first in service.blobs.digests()
        finally:
            may_go_on.set()


async def test_the_status_names_the_best_round_and_what_is_left_of_the_patience(tmp_path: Path) -> None:
    config = scored(tmp_path, evaluation__patience=2)
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        assert not status_of(ada.service).HasField("best")
        digest = await play(ada, SCORES[0])
        await play(ada, SCORES[1])
        best = status_of(ada.service).best
        assert (best.round, best.digest, best.metric, best.value) == (1, digest, "accuracy", 0.9)
        assert (best.source, best.evaluations_since, best.patience) == ("federated", 1, 2)
        await play(ada, SCORES[2])
        status = status_of(ada.service)
        assert (status.round, status.num_rounds) == (3, 4)
        assert status.explanation == (
            "finished early, after 3 of 4 rounds: no improvement of accuracy for 2 evaluations; best 0.9 in round 1"
        )


# ---------------------------------------------------------------- settings


def test_patience_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"evaluation.patience 3 counts evaluations, but rounds.evaluate_every is 0"
    ):
        config_of(tmp_path, evaluation__patience=3)


def test_what_counts_is_among_the_rules_but_not_frozen(tmp_path: Path) -> None:
    before = config_of(tmp_path)
    after_restart = config_of(
        tmp_path, evaluation={"metric": "eval_loss", "source": "central", "patience": 3, "min_delta": 0.1},
        rounds__evaluate_every=1,
    )  # fmt: skip
    manifest, other = (Manifest.of(c, SPEC, "b" * 64) for c in (before, after_restart))
    assert manifest.digest == other.digest
    check_unchanged(Manifest.from_content(manifest.content), after_restart)
    assert manifest.rules.stopping == Stopping("accuracy")
    assert other.rules.stopping == Stopping("eval_loss", False, True, 0.1, 3)


@pytest.mark.parametrize(
    ("evaluation", "metric", "is_larger_better"),
    [
        ({}, "accuracy", True),
        ({"metric": "perplexity", "goal": "minimize"}, "perplexity", False),
        ({"metric": "token_loss"}, "token_loss", False),
        ({"metric": "token_loss", "goal": "maximize"}, "token_loss", True),
        ({"method": "generation"}, "exact_match", True),
    ],
)
def test_what_counts_follows_from_the_settings(
    tmp_path: Path, evaluation: dict[str, str], metric: str, is_larger_better: bool
) -> None:
    stopping = Manifest.of(config_of(tmp_path, evaluation=evaluation), SPEC, "b" * 64).rules.stopping
    assert (stopping.metric, stopping.is_larger_better) == (metric, is_larger_better)


# ---------------------------------------------------------------- warnings


def evaluated(*evaluations: tuple[str, int, Evaluation]) -> RoundRecord:
    state = after(*one_round(), start=started())
    return replace(state.history[-1], evaluations=evaluations, evaluated_at=9.0)


def test_an_evaluation_that_does_not_count_is_a_warning_as_long_as_it_is_the_newest() -> None:
    rules = {"evaluate_every": 1, "stopping": Stopping("f1")}
    state = started(num_rounds=9, **rules)
    assert evaluation_signs(state) == ()
    record = evaluated(("ada", 2, Evaluation(10, {"accuracy": 0.5})))
    (sign,) = evaluation_signs(replace(state, round=1, history=(record,)))
    assert sign.about == "evaluation.metric 'f1' was not among accuracy"
    assert sign.sentence.startswith(f"{sign.about}: round 1 does not count for the best adapter")
    mended = replace(record, number=2, evaluations=(("ada", 2, Evaluation(10, {"f1": 0.5})),))
    assert evaluation_signs(replace(state, round=2, history=(record, mended))) == ()
    assert evaluation_signs(replace(started(), round=1, history=(record,))) == ()


def test_an_evaluator_that_is_gone_is_not_what_keeps_a_round_from_opening() -> None:
    eve = Join("eve", "key-of-eve", Profile(8, 10, evaluates_only=True))
    state = after(eve, *map(joins, EVERYBODY), start=started(num_rounds=9, min_clients=4))
    assert state.phase == "waiting_for_clients" or state.open is not None
    gone = replace(state, open=None, phase=type(state.phase)("waiting_for_clients"))
    assert warnings_of(after(lost("eve"), start=gone), PAPER) == []
    (warning,) = warnings_of(after(lost(ADA), start=gone), PAPER)
    assert "(ada gone)" in warning
