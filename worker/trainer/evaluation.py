"""One evaluation of the live adapter, as the coordinator's plan says: by loss, by generation or by choice.

What is measured leaves as numbers; no prompt, no answer and no choice of this site is logged or reported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import structlog
from torch.utils.data import Subset

from common.errors import InvalidRequest, RafloraError
from worker.config import DataConfig
from worker.trainer.answers import choices_of, substance
from worker.trainer.data import DataError, LocalData, Row
from worker.trainer.generation import Prompted, Writer, generate, log_likelihoods
from worker.trainer.group import ALONE, Group
from worker.trainer.group_training import share_of
from worker.trainer.model import AdaptedModel
from worker.trainer.task import Preparation, longest_input
from worker.trainer.training import Diverged, Report, evaluate
from worker.trainer_protocol import CHOICE, GENERATION, LOSS, EvaluationPlan

log = structlog.get_logger()

_BATCH = 16  # texts at once where the site names no batch_size

Item = TypeVar("Item")


class WrongMethod(RafloraError):
    """This kind of task, this model or these answers cannot be evaluated in this way; the message holds no data."""

    code = "FAILED_PRECONDITION"
    reason = "wrong_method"


@runtime_checkable
class Answering(Protocol):
    """What the preparation of a language model can do besides: tell a record's question from its answer."""

    tokenizer: Any

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that end an answer, as training teaches it."""
        ...

    def prompt(self, row: Row) -> Sequence[int]:
        """The tokens before the answer, as in training. Raises DataError."""
        ...

    def response(self, row: Row) -> str:
        """The answer that the record gives. Raises DataError."""
        ...

    def answer(self, row: Row, text: str) -> Sequence[int]:
        """The tokens of this text as the answer to the record's prompt, without an end of sequence."""
        ...


@dataclass(frozen=True)
class TestData:
    """This site's test data, as read and as prepared."""

    data: LocalData
    preparation: Preparation
    config: DataConfig
    seed: int  # of the order in which `max_examples` counts

    __test__ = False  # for pytest: holds no tests


@dataclass(frozen=True)
class Pace:
    """How many texts are worked on at once, and who hears how far it is."""

    memory_batch: int | None
    report: Report  # what it raises ends the work
    group: Group = ALONE  # who evaluates together; each process does a part, and all get the metrics of the whole

    @property
    def batch(self) -> int:
        """Texts at once."""
        return self.memory_batch or _BATCH


def evaluate_by(plan: EvaluationPlan, model: AdaptedModel, tests: TestData, pace: Pace) -> tuple[int, dict[str, float]]:
    """How many examples were evaluated, and the metrics. The model is as it was.

    Raises WrongMethod, Diverged, DataError, or what `pace.report` raises.
    """
    work = _Work(plan, model, tests, pace)
    if plan.method == LOSS:
        return len(work.chosen(tests.data.test)), work.losses()
    if plan.method not in (GENERATION, CHOICE):
        raise InvalidRequest(f"evaluation method {plan.method!r}: {LOSS}, {GENERATION} or {CHOICE} is expected")
    answering = tests.preparation
    if not isinstance(answering, Answering):
        raise WrongMethod(
            f"evaluation method {plan.method!r} does not fit the task {model.task.name!r}: it needs a language model "
            f"(task causal-lm); set evaluation.method = {LOSS!r}"
        )
    rows = work.chosen(tests.data.test_rows)
    measure = _by_choice if plan.method == CHOICE else _by_generation
    return len(rows), measure(work, answering, rows)


@dataclass(frozen=True)
class _Work:
    """One evaluation."""

    plan: EvaluationPlan
    model: AdaptedModel
    tests: TestData
    pace: Pace

    def chosen(self, items: Sequence[Item]) -> Sequence[Item]:
        """The first `max_examples` in an order that the seed alone decides, so that rounds compare."""
        if not 0 < self.plan.max_examples < len(items):
            return items
        order = np.random.Generator(np.random.PCG64(self.tests.seed)).permutation(len(items))
        # Not a list: images are prepared one by one.
        return Subset(items, sorted(order[: self.plan.max_examples].tolist()))  # type: ignore[arg-type, return-value]

    def losses(self) -> dict[str, float]:
        """The loss on the examples, and what the kind of task measures with it."""
        outcome = evaluate(
            self.model,
            self.chosen(self.tests.data.test),
            collator=self.tests.preparation.collator,
            memory_batch=self.pace.memory_batch,
            report=self.pace.report,
            group=self.pace.group,
        )
        return dict(outcome.metrics)


def _by_generation(work: _Work, answering: Answering, rows: Sequence[Row]) -> dict[str, float]:
    """`exact_match` beside the losses, which cost little and tell of a model that diverged before it babbles."""
    plan, longest = work.plan, longest_input(work.model.base)
    if plan.max_new_tokens >= longest:
        raise WrongMethod(
            f"evaluation of {plan.max_new_tokens} new tokens: this model reads and writes at most {longest} in all; "
            "lower evaluation.max_new_tokens"
        )
    mine, share = share_of(rows, work.pace.group)
    expected = [substance(plan.match, answering.response(row)) for row in mine]
    for row, number in zip(mine, expected, strict=True):
        if number is None:
            # The operator's setting is at fault, so the operator is told, but not which record of the site's shows it.
            log.warning("a response without a number", where=row.where, match=plan.match)
            raise WrongMethod(
                f"evaluation.match = {plan.match!r} compares numbers, but a response of this site's test data holds "
                'none; set evaluation.match = "exact", which compares texts'
            )
    metrics = work.losses()
    said = generate(
        work.model,
        [answering.prompt(row) for row in mine],
        writer=Writer(answering.tokenizer, plan.max_new_tokens, answering.ends),
        batch=work.pace.batch,
        report=work.pace.report,
    )
    right = [substance(plan.match, text) == wanted for text, wanted in zip(said, expected, strict=True)]
    return metrics | {"exact_match": float(np.mean(share.of_all(right)))}


def _by_choice(work: _Work, answering: Answering, rows: Sequence[Row]) -> dict[str, float]:
    """As lm-eval's acc and acc_norm: `accuracy` by the probability of a whole answer, `accuracy_norm` by character."""
    mine, share = share_of(rows, work.pace.group)
    every = [choices_of(row, work.tests.config) for row in mine]
    given = [
        _prompted(answering, row, text) for row, choices in zip(mine, every, strict=True) for text in choices.texts
    ]
    likelihoods = log_likelihoods(work.model, given, batch=work.pace.batch, report=work.pace.report)
    if not all(map(math.isfinite, likelihoods)):
        raise Diverged("the likelihood of an answer is no finite number")
    places = accumulate((len(choices.texts) for choices in every), initial=0)
    right = []
    for choices, (start, end) in zip(every, pairwise(places), strict=True):
        whole = np.array(likelihoods[start:end])
        by_character = whole / [len(text) for text in choices.texts]
        right.append([np.argmax(found) == choices.right for found in (whole, by_character)])
    accuracy, accuracy_norm = np.mean(share.of_all(right), axis=0)
    return {"accuracy": float(accuracy), "accuracy_norm": float(accuracy_norm)}


def _prompted(answering: Answering, row: Row, text: str) -> Prompted:
    answer = answering.answer(row, text)
    if not answer:
        raise DataError(f"{row.where}: the choice {text!r:.60} holds nothing that the tokenizer knows")
    return Prompted(answering.prompt(row), answer)
