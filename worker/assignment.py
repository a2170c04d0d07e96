"""One task from its slice to its submission, under a lease that a heartbeat keeps.

The work and the heartbeat are two tasks of one event loop; whichever ends first ends the other.
"""

import asyncio
import hashlib
import math
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from common.adapter import AdapterSpec
from common.codec import Layout, WireDtype, check_file
from common.errors import AdapterMismatch, RafloraError, UnknownTask
from common.failpoints import reach
from common.trackers import Trackers
from worker import egress, forms, uploads
from worker.client import CoordinatorClient
from worker.config import WorkerConfig
from worker.contact import Clock, Contact, may_pass
from worker.downloads import Slices
from worker.messages import Blob, Evaluation, Outcome, Progress, Task, TaskKind, Update
from worker.policy import check_size, check_task
from worker.supervisor import TaskFailed, TrainerProcess
from worker.tracking import Course
from worker.trainer_protocol import Evaluate, ProgressMade, Train

HEARTBEAT_JITTER = 0.2
_SHORTEST_HEARTBEAT_SECONDS = 0.1
_LONGEST_HEARTBEAT_SECONDS = 3600.0

Result = TypeVar("Result")

log = structlog.get_logger()


class LeaseLost(RafloraError):
    """The coordinator took the task back; nothing is owed any more."""

    reason = "lease_lost"


@dataclass(frozen=True)
class Means:
    """What a worker works with."""

    config: WorkerConfig
    client: CoordinatorClient
    trainer: TrainerProcess
    contact: Contact
    clock: Clock
    course: Course = field(default_factory=lambda: Course(Trackers(())))

    @property
    def slices(self) -> Slices:
        """The slices on disk."""
        return Slices(self.config.state_dir / "slices", self.client, self.contact)


@dataclass(frozen=True)
class Terms:
    """On what this client has joined."""

    spec: AdapterSpec
    manifest_digest: str
    wire_dtype: WireDtype
    max_rank: int
    num_examples: int
    num_test_examples: int
    heartbeat_seconds: float


class Assignment:
    """One task in the hands of this worker."""

    def __init__(self, means: Means, terms: Terms, task: Task) -> None:
        self._means = means
        self._terms = terms
        self._task = task
        self._layout = Layout(terms.spec, task.lora_rank, terms.wire_dtype)
        self._progress = Progress("downloading")
        self._has_turned = asyncio.Event()  # to another activity since the last heartbeat

    async def carry_out(self) -> Outcome:
        """Does the task and commits its result.

        Raises PolicyRefused, LeaseLost, TaskFailed, TrainerDied, or what the coordinator found wrong.
        """
        forms.check_task(self._task)
        check_task(
            self._means.config.policy,
            self._task,
            max_rank=self._terms.max_rank,
            num_examples=self._terms.num_examples,
            num_test_examples=self._terms.num_test_examples,
            evaluates_only=self._means.config.evaluator,
        )
        if self._task.manifest_digest != self._terms.manifest_digest:
            raise AdapterMismatch(
                f"round {self._task.round}: a task of the manifest {self._task.manifest_digest[:12]}, but this worker "
                f"joined {self._terms.manifest_digest[:12]}"
            )
        if self._task.adapter.size_bytes != self._layout.size_bytes:
            raise AdapterMismatch(
                f"round {self._task.round}: the slice has {self._task.adapter.size_bytes} bytes, but rank "
                f"{self._task.lora_rank} in {self._terms.wire_dtype} is exactly {self._layout.size_bytes}"
            )
        check_size(self._means.config.policy, self._task, self._layout.size_bytes)
        client, contact = self._means.client, self._means.contact
        # The heartbeat ends before the submission: the lease ends with it, and that must not look like a loss.
        if self._task.kind is TaskKind.EVALUATE:
            evaluation = await self._under_lease(self._evaluate())
            reach("evaluation.submitting")
            outcome = await contact.insist(lambda: client.submit_evaluation(evaluation))
            reach("evaluation.submitted")
            return outcome
        update = await self._under_lease(self._train())
        reach("update.submitting")
        outcome = await contact.insist(lambda: client.submit_update(update))
        reach("update.submitted")
        return outcome

    async def _train(self) -> Update:
        config, task = self._means.config, self._task
        slice_path = await self._fetch()
        update_path = (config.state_dir / "update.safetensors").absolute()
        self._turn_to(Progress("training"))
        log.info("training", round=task.round, rank=task.lora_rank, examples=self._terms.num_examples)
        order = Train(
            slice_path=str(slice_path.absolute()),
            update_path=str(update_path),
            lora_rank=task.lora_rank,
            scaling=task.scaling,
            wire_dtype=self._terms.wire_dtype.value,
            plan=task.plan,
        )
        reach("task.training")
        trained = await self._means.trainer.train(order, self._note)
        reach("task.trained")
        metrics = _finite(trained.metrics)
        counted = {"seconds": trained.seconds, "examples": float(trained.num_examples)}
        self._means.course.done(task, metrics, counted)
        metrics = self._may_leave(metrics)
        await asyncio.to_thread(check_file, update_path, self._layout, "own update")
        blob = await asyncio.to_thread(_blob_of, update_path)
        self._turn_to(replace(self._progress, activity="uploading"))
        await self._report("update", blob, trained.num_examples, metrics)
        upload = uploads.Upload(update_path, blob, task.lease_token)
        await self._in_time(uploads.send(upload, self._means.client, self._means.contact), "upload")
        log.info(
            "trained",
            round=task.round,
            rank=task.lora_rank,
            seconds=round(trained.seconds, 1),
            sent_kb=round(blob.size_bytes / 1000, 1),
            **{name: round(value, 4) for name, value in metrics.items()},
        )
        return Update(task, blob, trained.num_examples, metrics, trained.seconds)

    async def _evaluate(self) -> Evaluation:
        task = self._task
        slice_path = await self._fetch()
        self._turn_to(Progress("evaluating"))
        order = Evaluate(
            slice_path=str(slice_path.absolute()),
            lora_rank=task.lora_rank,
            scaling=task.scaling,
            wire_dtype=self._terms.wire_dtype.value,
            plan=task.evaluation,
        )
        evaluated = await self._means.trainer.evaluate(order, self._note)
        metrics = _finite(evaluated.metrics)
        self._means.course.done(task, metrics, {"examples": float(evaluated.num_examples)})
        await self._report("evaluation", Blob(task.adapter.digest, 0), evaluated.num_examples, metrics)
        log.info("evaluated", round=task.round, **{name: round(value, 4) for name, value in metrics.items()})
        return Evaluation(task, evaluated.num_examples, metrics)

    async def _fetch(self) -> Path:
        """The task's slice on this disk."""
        return await self._in_time(self._means.slices.fetch(self._task.adapter), "download")

    async def _in_time(self, transfer: Coroutine[Any, Any, Result], what: str) -> Result:
        """The transfer's result. Raises TaskFailed: who trickles must not hold this worker for ever."""
        limit_seconds = self._means.config.policy.max_task_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                return await transfer
        except TimeoutError:
            raise TaskFailed("time_limit", f"{what} took longer than {limit_seconds:g} s") from None

    def _may_leave(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return metrics if self._means.config.policy.may_send_metrics else {}

    async def _report(self, kind: str, blob: Blob, num_examples: int, metrics: Mapping[str, float]) -> None:
        departure = egress.Departure(
            kind=kind,
            round=self._task.round,
            attempt=self._task.attempt,
            digest=blob.digest,
            size_bytes=blob.size_bytes,
            num_tensors=len(self._layout.shapes) if blob.size_bytes else 0,
            dtype=self._terms.wire_dtype.value,
            lora_rank=self._task.lora_rank,
            num_examples=num_examples,
            metrics=metrics,
        )
        await record_departure(self._means, departure)

    def _turn_to(self, progress: Progress) -> None:
        self._progress = progress
        self._has_turned.set()

    def _note(self, made: ProgressMade) -> None:
        train_loss = made.train_loss if self._means.config.policy.may_send_metrics else 0.0
        self._progress = Progress(made.activity, made.step, made.total_steps, train_loss)
        self._means.course.at(self._task, replace(self._progress, train_loss=made.train_loss))

    async def _under_lease(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The work's result. Raises LeaseLost, with the work dropped, when the coordinator wants it no more."""
        working = asyncio.create_task(work)
        beating = asyncio.create_task(self._keep_lease())
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            beating.result()
            raise LeaseLost(f"round {self._task.round}: the coordinator took the task back")
        finally:
            working.cancel()
            beating.cancel()
            await asyncio.gather(working, beating, return_exceptions=True)

    async def _keep_lease(self) -> None:
        """Beats at once, at every new activity and between by interval; returns when the coordinator says stop.

        While it is out of reach the work goes on.
        """
        client, contact = self._means.client, self._means.contact
        while True:
            self._has_turned.clear()
            try:
                goes_on = await client.heartbeat(self._task.lease_token, self._progress)
            except UnknownTask:
                return
            except RafloraError as error:
                if not may_pass(error):
                    raise
                contact.lost(error)
            else:
                contact.made()
                if not goes_on:
                    return
            await self._until_next_beat()

    async def _until_next_beat(self) -> None:
        clock = self._means.clock
        pause_seconds = heartbeat_pause_seconds(self._terms.heartbeat_seconds, clock.chance())
        waiting = (
            asyncio.ensure_future(clock.sleep(pause_seconds)),
            asyncio.ensure_future(self._has_turned.wait()),
        )
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def record_departure(means: Means, departure: egress.Departure) -> None:
    """Writes down, durably, what is about to leave."""
    time = datetime.fromtimestamp(means.clock.wall_time(), UTC).isoformat(timespec="seconds")
    await asyncio.to_thread(egress.record, means.config.state_dir, departure, time=time)


async def record_refusal(means: Means, refusal: egress.Refusal) -> None:
    """Writes down, durably, what is not done."""
    time = datetime.fromtimestamp(means.clock.wall_time(), UTC).isoformat(timespec="seconds")
    await asyncio.to_thread(egress.record_refusal, means.config.state_dir, refusal, time=time)


def heartbeat_pause_seconds(heartbeat_seconds: float, chance: float) -> float:
    """The pause before the next heartbeat: spread out, so that a thousand workers do not beat as one."""
    within = min(max(heartbeat_seconds, _SHORTEST_HEARTBEAT_SECONDS), _LONGEST_HEARTBEAT_SECONDS)
    return within * (1 + HEARTBEAT_JITTER * (2 * chance - 1))


def _finite(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """The metrics themselves. Raises TaskFailed if one of them is no number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TaskFailed("diverged", f"the trainer reports {name} = {value}")
    return metrics


def _blob_of(path: Path) -> Blob:
    with path.open("rb") as file:
        return Blob(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
