"""Which numbers of an evaluation a whole coordinator takes, without a network; what it refuses changes nothing."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from lone_site import KEY, blobs_of, lonely, running

from common.errors import InvalidRequest, RafloraError, TooManyExamples
from coordinator.federation.requests import Outcome, SubmitEvaluation
from coordinator.federation.state import Evaluation, Kind
from coordinator.service import CoordinatorService
from coordinator.stores.journal import MemoryJournal

# What worker/trainer tells in updates and evaluations.
OWN = ("train_loss", "micro_batch", "eval_loss", "accuracy", "accuracy_norm", "token_accuracy", "exact_match")
GOOD = Evaluation(10, {**dict.fromkeys(OWN, 1.0), "eval_loss": 12.5, "accuracy": 0.0, "x" * 63: -1e30})


async def answers(folder: Path, *evaluations: Evaluation) -> list[Outcome | RafloraError]:
    """What Ada, who joined with 10 examples where 10 are allowed, is answered in the evaluation of round 1."""
    config = lonely(folder, rounds__num_rounds=2, rounds__evaluate_every=1, limits__max_examples=10)
    found: list[Outcome | RafloraError] = []
    async with running(CoordinatorService(config, MemoryJournal(), blobs_of(config))) as ada:
        await ada.work()
        task = await ada.fetch()
        assert task.kind is Kind.EVALUATE
        lease = ("ada", task.lease_token, task.number, task.attempt, task.slice.digest)
        before = ada.service.engine.state
        for evaluation in evaluations:
            try:
                found.append(await ada.service.intake.submit_evaluation(SubmitEvaluation(*lease, evaluation), KEY))
            except RafloraError as error:
                assert ada.service.engine.state == before
                found.append(error)
    return found


async def test_what_our_own_trainer_tells_is_taken(tmp_path: Path) -> None:
    assert await answers(tmp_path, GOOD) == [Outcome.ACCEPTED]


REFUSED: list[tuple[Mapping[str, float], str]] = [
    *(({name: value}, f"{name} is {value:g}; 0 to 1 is accepted")
      for name in ("accuracy", "accuracy_norm", "exact_match", "token_accuracy") for value in (1.01, -0.01, 1e30)),
    *(({name: 1.0}, "cannot be a metric's name")
      for name in ("", "Accuracy", "f1 ", "federated/f1", "9", "_f1", "a" * 64, "a\n", "a.b", "\u00e4")),
    ({"eval_loss": float("nan")}, "eval_loss is not finite"),
]  # fmt: skip


async def test_what_is_no_share_and_no_name_is_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    *refusals, last = await answers(tmp_path, *(Evaluation(10, metrics) for metrics, _ in REFUSED), GOOD)
    for (metrics, sentence), refusal in zip(REFUSED, refusals, strict=True):
        assert type(refusal) is InvalidRequest, metrics
        assert "client 'ada': " in str(refusal)
        assert sentence in str(refusal)
    assert last is Outcome.ACCEPTED


@pytest.mark.parametrize("num_examples", [11, 1 << 32])
async def test_the_operator_s_limit_bounds_the_weight_of_an_evaluation(tmp_path: Path, num_examples: int) -> None:
    (refusal,) = await answers(tmp_path, Evaluation(num_examples, {"accuracy": 0.5}))
    assert type(refusal) is TooManyExamples
    assert f"num_examples {num_examples}" in str(refusal)
