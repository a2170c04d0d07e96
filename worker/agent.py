"""The worker's loop: shake hands, load, join, then ask for tasks until the federation is over.

Speaks to the coordinator and to the trainer process; never imports torch.
"""

import asyncio
from collections.abc import Callable

import structlog

from common.adapter import AdapterSpec, ModuleShape, TensorShape
from common.codec import Layout, WireDtype
from common.errors import (
    AdapterMismatch,
    BadJoinToken,
    BaseModelMismatch,
    CorruptTransfer,
    Evicted,
    IdentityConflict,
    InvalidRequest,
    LeaseSuperseded,
    NotAllowed,
    NotAuthenticated,
    NotFinite,
    OutOfBounds,
    ProtocolTooOld,
    RafloraError,
    Revoked,
    SpecMismatch,
    StaleRound,
    StaleSlice,
    UnknownBlob,
    UnknownClient,
    UnknownTask,
    UpdateConflict,
    UploadTakenOver,
    WrongOffset,
    WrongRank,
    WrongSize,
)
from worker import egress, forms, policy
from worker.assignment import Assignment, LeaseLost, Means, Terms, record_departure, record_refusal
from worker.measurement import Settled, settle
from worker.messages import Enrolment, RankProfile, Task, Welcome, printable
from worker.supervisor import TaskFailed
from worker.trainer_protocol import Load, Loaded, ModelOrder

LEAVE_SECONDS = 5.0
_SHORTEST_POLL_SECONDS = 1.0  # however fast a coordinator says that there is nothing to do
_WORKER_ERROR = "worker_error"  # nobody foresaw it; its type's name is all that is told
# Whose sentences are this program's own and hold nothing but numbers and names that the coordinator knows, or are
# what the coordinator itself said. Of everything else, which may quote a path or a record, only the word leaves.
_MAY_LEAVE = frozenset(
    {
        "policy_refused",
        "time_limit",
        "diverged",
        "out_of_memory",
        "trainer_died",
        "wrong_method",
        _WORKER_ERROR,
        *(kind.reason for kind in (AdapterMismatch, NotFinite, OutOfBounds, WrongSize, WrongRank)),
        *(kind.reason for kind in (UnknownTask, UnknownBlob, StaleRound, StaleSlice, UpdateConflict)),
        *(kind.reason for kind in (CorruptTransfer, WrongOffset, UploadTakenOver)),
    }
)

# What goes into the list of refusals: the coordinator asked for something, or sent something, that is not taken.
_REFUSED = frozenset(
    {
        "policy_refused",
        "wrong_method",
        *(kind.reason for kind in (InvalidRequest, AdapterMismatch, NotFinite, OutOfBounds, WrongSize, WrongRank)),
        *(kind.reason for kind in (ProtocolTooOld, CorruptTransfer)),
    }
)

# What no retry mends: the worker ends and says why.
FINAL: tuple[type[RafloraError], ...] = (
    *(Evicted, IdentityConflict, BaseModelMismatch, SpecMismatch, ProtocolTooOld),
    *(NotAuthenticated, NotAllowed, Revoked, BadJoinToken),
)
_NOT_OF_ONE_TASK: tuple[type[RafloraError], ...] = (*FINAL, UnknownClient)

log = structlog.get_logger()


class Agent:
    """One worker of one federation."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._said = ""
        self._ledger = egress.Ledger(means.config.state_dir)

    async def run(self) -> None:
        """Works until the federation is over.

        Raises PolicyRefused or TaskFailed if this site cannot take part, and the errors in FINAL.
        """
        forgotten = 0
        while True:
            welcome = await self._means.contact.insist(self._means.client.handshake)
            settled, loaded = await self._load(welcome)
            terms = await self._join(welcome, settled, loaded)
            try:
                await self._serve(terms)
                return
            except UnknownClient as error:
                # The coordinator lost its state, or an operator reset it.
                forgotten += 1
                log.warning("joining again", why=str(error))
                await self._means.contact.pause(forgotten)

    async def leave(self) -> None:
        """Says goodbye, if somebody listens."""
        try:
            await self._means.client.leave(LEAVE_SECONDS)
            log.info("left the federation")
        except RafloraError as error:
            log.info("left without a goodbye", why=str(error))

    async def _load(self, welcome: Welcome) -> tuple[Settled, Loaded]:
        """The settings with a rank, and what the trainer holds once it has loaded what the federation asks for."""
        model = welcome.model
        await self._refuse_unless(lambda: forms.check_welcome(welcome))
        await self._refuse_unless(lambda: policy.check_welcome(self._means.config.policy, welcome))
        settled = settle(self._means.config, welcome)
        config = settled.config
        structlog.contextvars.bind_contextvars(federation=welcome.federation)
        order = ModelOrder(
            task=model.task,
            labels=model.labels,
            target_modules=model.target_modules,
            modules_to_save=model.modules_to_save,
            lora_rank=min(config.rank_in(model.global_rank), model.global_rank),
            seed=model.seed,
        )
        log.info("loading", base_model=model.base_model, task=model.task)
        loaded = await self._means.trainer.load(Load(config.model_dump_json(), order, welcome.federation))
        digest, examples = loaded.base_model_digest, loaded.num_examples
        await self._refuse_unless(lambda: policy.check_base_model(config.policy, digest, "model.path"))
        what = "test" if config.evaluator else "training"
        await self._refuse_unless(lambda: policy.check_examples(config.policy, examples, what))
        return settled.on(loaded), loaded

    async def _join(self, welcome: Welcome, settled: Settled, loaded: Loaded) -> Terms:
        config = settled.config
        spec = AdapterSpec(
            tuple(ModuleShape(*module) for module in loaded.modules),
            tuple(TensorShape(*tensor) for tensor in loaded.tensors),
        )
        profile = RankProfile(
            max_rank=min(config.rank_in(welcome.model.global_rank), spec.largest_rank),
            device=loaded.device,
            memory_bytes=loaded.memory_bytes,
            num_examples=loaded.num_examples,
            examples_per_second=settled.examples_per_second,
            measured=settled.measured,
            evaluates_only=config.evaluator,
            num_eval_examples=loaded.num_test_examples,
        )
        enrolment = Enrolment(welcome.protocol, profile, loaded.base_model_digest, spec)
        await record_departure(self._means, _as_departure(enrolment))
        place = await self._means.contact.insist(lambda: self._means.client.join(enrolment))
        await self._refuse_unless(lambda: forms.check_place(place))
        await self._refuse_unless(lambda: policy.check_manifest(config.policy, place.manifest_digest))
        terms = Terms(
            spec=spec,
            manifest_digest=place.manifest_digest,
            wire_dtype=WireDtype(place.wire_dtype),
            max_rank=profile.max_rank,
            num_examples=profile.num_examples,
            num_test_examples=loaded.num_test_examples,
            heartbeat_seconds=place.heartbeat_seconds,
        )
        size_bytes = Layout(spec, place.lora_rank, terms.wire_dtype).size_bytes
        log.info(
            "joined",
            rank=place.lora_rank,
            why=place.rank_reason,
            examples=profile.num_examples,
            adapter_kb=round(size_bytes / 1000, 1),
            device=loaded.device,
        )
        self._say(place.status_sentence)
        return terms

    async def _serve(self, terms: Terms) -> None:
        """One task after the other. Raises UnknownClient when the coordinator no longer knows this client."""
        contact, clock = self._means.contact, self._means.clock
        failures = 0
        while True:
            asked_at = clock.now()
            polled = await contact.insist(self._means.client.poll_task)
            for task in polled.tasks:
                # Also what was taken back costs a pause: who hands out and takes back at once must not keep us busy.
                failures = 0 if await self._do(task, terms) else failures + 1
            if polled.is_finished:
                log.info("the federation is over", why=polled.status_sentence)
                return
            if failures:
                await contact.pause(failures)
            elif not polled.tasks:
                self._say(polled.status_sentence)
                await clock.sleep(max(0.0, _SHORTEST_POLL_SECONDS - (clock.now() - asked_at)))

    async def _do(self, task: Task, terms: Terms) -> bool:
        """Whether the task was done; otherwise it was no longer wanted, or was given back with a reason."""
        try:
            await self._check_budget(task)
            outcome = await Assignment(self._means, terms, task).carry_out()
        except (LeaseLost, LeaseSuperseded) as error:
            log.info("dropped", why=str(error))
            return False
        except _NOT_OF_ONE_TASK:
            raise
        except TaskFailed as error:
            await self._give_back(task, error.word, str(error))
            return False
        except RafloraError as error:
            await self._give_back(task, error.reason, str(error))
            return False
        except Exception as error:
            # A bug or a full disk must cost a task, not the worker.
            log.exception("unexpected", round=task.round)
            await self._give_back(task, _WORKER_ERROR, type(error).__name__)
            return False
        else:
            log.info("submitted", round=task.round, task=task.kind.value, outcome=outcome.value)
        return True

    async def _give_back(self, task: Task, word: str, message: str) -> None:
        client, contact = self._means.client, self._means.contact
        log.warning("task failed", round=task.round, reason=word, message=message)
        message = printable(message)
        if word in _REFUSED:
            await record_refusal(self._means, egress.Refusal(word, message, task.round, task.attempt))
        told = message if word in _MAY_LEAVE else "the worker's log says more"
        departure = egress.Departure(
            kind="failure",
            round=task.round,
            attempt=task.attempt,
            lora_rank=task.lora_rank,
            words=f"{word}: {told}",
        )
        try:
            await record_departure(self._means, departure)
            await contact.insist(lambda: client.fail_task(task.lease_token, word, told))
        except _NOT_OF_ONE_TASK:
            raise
        except RafloraError as error:
            log.info("the coordinator wants that task no more", why=str(error))

    async def _check_budget(self, task: Task) -> None:
        """Raises PolicyRefused if the site lets no more results leave."""
        site_policy = self._means.config.policy
        if policy.has_budget(site_policy):
            spent = await asyncio.to_thread(self._ledger.spent, self._means.clock.wall_time())
            policy.check_budget(site_policy, task, spent)

    async def _refuse_unless(self, check: Callable[[], None]) -> None:
        """Carries out a check; what it raises is written down first."""
        try:
            check()
        except RafloraError as error:
            await record_refusal(self._means, egress.Refusal(error.reason, printable(str(error))))
            raise

    def _say(self, sentence: str) -> None:
        """Why nothing happens, once."""
        if sentence and sentence != self._said:
            log.info("waiting", why=sentence)
        self._said = sentence


def _as_departure(enrolment: Enrolment) -> egress.Departure:
    profile, spec = enrolment.profile, enrolment.spec
    more = f"; evaluates on {profile.num_eval_examples} examples" if profile.num_eval_examples else ""
    more += "; evaluates only" if profile.evaluates_only else ""
    if (measured := profile.measured) is not None:
        more += (
            f"; measured {measured.base_bytes} bytes and {measured.bytes_per_rank} a rank at micro-batch "
            f"{measured.micro_batch} ({measured.quantization}), {profile.examples_per_second:.3g} examples/s"
        )
    return egress.Departure(
        kind="join",
        digest=enrolment.base_model_digest,
        num_tensors=len(spec.modules) + len(spec.tensors),
        lora_rank=profile.max_rank,
        num_examples=profile.num_examples,
        words=f"device {profile.device}, {profile.memory_bytes} bytes of memory{more}",
    )
