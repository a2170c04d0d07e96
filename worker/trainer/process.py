"""The trainer process: holds the base model across rounds and does what its agent asks, one request at a time.

    python -m worker.trainer

Requests come as lines on standard input, answers go as lines to what was standard output; everything that
libraries print goes to standard error. It never imports grpc, never speaks to the network about a task, drops a
task at its next step when it is told to stop, and ends at once when its input ends: an agent that is gone wants
nothing any more.
"""

import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from pydantic import ValidationError

from common import codec
from common.adapter import Adapter
from common.errors import ConfigError, InvalidRequest, RafloraError
from common.failpoints import reach
from common.logs import set_up_logs
from worker.config import WorkerConfig
from worker.identity import client_id_of
from worker.trainer.fitting import MicroBatch, free_memory, is_out_of_memory, loaded
from worker.trainer.quiet import silence_libraries
from worker.trainer_protocol import (
    MAX_LINE_BYTES,
    SOCKET_OPTION,
    Answer,
    DryRun,
    DryRunDone,
    Evaluate,
    Evaluated,
    Failed,
    Load,
    Loaded,
    ModelOrder,
    ProgressMade,
    Request,
    Stop,
    Train,
    Trained,
    request_from_line,
    to_line,
)

if TYPE_CHECKING:
    from worker.trainer.data import LocalData
    from worker.trainer.dry_run import Bench
    from worker.trainer.group import Group
    from worker.trainer.model import AdaptedModel
    from worker.trainer.task import Preparation
    from worker.trainer.training import Outcome

MAX_WAITING_REQUESTS = 4  # an agent asks one thing at a time; more waiting is a mistake of ours
PROGRESS_SECONDS = 0.2  # between two lines of progress

Say = Callable[[Answer], None]
Given = TypeVar("Given")
Result = TypeVar("Result")


class Stopped(RafloraError):
    """The agent no longer wants this task."""

    reason = "stopped"


@dataclass(frozen=True)
class _Session:
    """What one Load made: kept until the next Load or the end."""

    config: WorkerConfig
    model: "AdaptedModel"
    preparation: "Preparation"
    data: "LocalData"
    seed: int  # the federation's
    training: MicroBatch
    evaluating: MicroBatch


def main() -> int:
    """Serves requests until the input ends; exit status 1 if something happened that nobody foresaw."""
    # Ctrl-C in a terminal reaches the whole process group; the agent decides when its trainer ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SOCKET_OPTION in sys.argv[:-1]:
        from worker.trainer.member import serve  # noqa: PLC0415 # only a group needs torch to speak

        return serve(sys.argv[-1], lambda say, stopping, group: _Trainer(say, stopping, group).answer)
    answers = _keep_stdout_for_answers()
    requests: queue.Queue[bytes] = queue.Queue(maxsize=MAX_WAITING_REQUESTS)
    stopping = threading.Event()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests, stopping), daemon=True).start()

    def say(answer: Answer) -> None:
        try:
            answers.write(to_line(answer))
        except BrokenPipeError:
            os._exit(0)

    trainer = _Trainer(say, stopping)
    while True:
        answer = trainer.answer(requests.get())
        say(answer)
        if isinstance(answer, Failed) and answer.fatal:
            return 1


class _Trainer:
    """Does one request after the other."""

    def __init__(self, say: Say, stopping: threading.Event, group: "Group | None" = None) -> None:
        self._say = say
        self._stopping = stopping
        self._group = group  # None: this process is alone
        self._session: _Session | None = None
        self._bench: tuple[str, ModelOrder, Bench] | None = None  # what a dry run loaded, and by which words

    def answer(self, line: bytes) -> Answer:
        """The last answer to a request; progress is said on the way. Everything that goes wrong is a Failed."""
        try:
            return self._in_step(self._do)(request_from_line(line))
        except RafloraError as error:
            # Without the others a process of a group can do nothing more.
            return Failed(error.reason, str(error), fatal=getattr(error, "is_the_end", False))
        except Exception as error:
            if not is_out_of_memory(error):
                traceback.print_exc()
                # Only the kind goes on: what an unforeseen error says may quote a file, a path or a record.
                return Failed("trainer_died", f"{type(error).__name__}; the worker's log says more", fatal=True)
            print(f"{type(error).__name__}: {error}".partition("\n")[0], file=sys.stderr)
            failed = Failed(
                "out_of_memory", f"{type(error).__name__}; a smaller batch_size or rank may help, the log says more"
            )
        # Only here: the error held the frames, and they what filled the memory.
        free_memory()
        return failed

    def _do(self, request: Request) -> Answer:
        match request:
            case Load():
                return self._load(request)
            case Train():
                return self._train(request)
            case Evaluate():
                return self._evaluate(request)
            case DryRun():
                return self._dry_run(request)
            case Stop():
                raise InvalidRequest("trainer: Stop is no request of its own")

    @property
    def _size(self) -> int:
        return 1 if self._group is None else self._group.size

    def _in_step(self, work: Callable[[Given], Result]) -> Callable[[Given], Result]:
        """The same work; in a group it ends in every process if it ends in one."""
        group = self._group
        return work if group is None else lambda given: group.together(lambda: work(given), _word_of)

    def _load(self, request: Load) -> Loaded:
        config = self._on_own_device(self._begin_anew(request.config_json, request.federation))
        from worker.trainer.data import load_data  # noqa: PLC0415 # seconds of imports, after the protocol is up
        from worker.trainer.model import load_model  # noqa: PLC0415

        model = loaded(
            lambda: load_model(config.model, request.order, over=self._sharded_over(config)),
            lora_rank=request.order.lora_rank,
            device=config.model.device,
        )
        preparation = model.task.prepare(model.folder, model.base, model.labels, config.data)
        wanted = config.data.model_copy(update={"train": ""}) if config.evaluator else config.data
        data = load_data(wanted, preparation, seed=request.order.seed, offline=config.model.offline)
        limits = MicroBatch(config.batch_size), MicroBatch()
        self._session = _Session(config, model, preparation, data, request.order.seed, *limits)
        # The Trainer collects garbage after every round; what stays for ever need not be looked at each time.
        gc.collect()
        gc.freeze()
        return Loaded(
            base_model_digest=model.base_model_digest,
            modules=tuple((m.name, m.out_features, m.in_features) for m in model.spec.modules),
            tensors=tuple((t.name, t.shape) for t in model.spec.tensors),
            num_examples=len(data.test) if config.evaluator else data.num_examples,
            device=str(model.device),
            memory_bytes=_memory_bytes(model),
            num_test_examples=len(data.test),
        )

    def _on_own_device(self, config: WorkerConfig) -> WorkerConfig:
        """The settings for this process of a group."""
        if self._group is None:
            return config
        from worker.trainer.group import own_device  # noqa: PLC0415

        device = own_device(config.model.device, self._group)
        return config.model_copy(update={"model": config.model.model_copy(update={"device": device})})

    def _sharded_over(self, config: WorkerConfig) -> "Group | None":
        """The group whose processes each keep a part of the base; None: this one keeps it whole."""
        is_asked = self._group is not None and (config.launch.shard_base or self._group.is_to_shard)
        return self._group if is_asked else None

    def _begin_anew(self, config_json: str, federation: str = "") -> WorkerConfig:
        """Lets go of what is loaded and takes these settings."""
        self._session = self._bench = None
        if self._group is not None:
            self._group.accompany = None  # it holds the model
        gc.unfreeze()
        free_memory()
        config = _config_from(config_json)
        set_up_logs(config.log_format, config.log_level, **log_context(config, federation))
        _set_up_libraries(config)
        return config

    def _dry_run(self, request: DryRun) -> DryRunDone:
        from worker.trainer.dry_run import load_bench, measure  # noqa: PLC0415

        if self._bench is None or self._bench[:2] != (request.config_json, request.order):
            config = self._begin_anew(request.config_json)
            self._bench = request.config_json, request.order, load_bench(config, request.order)
        bench = self._bench[2]
        step = measure(bench, request, _Progress(self._say, "measuring", self._stopping))
        return DryRunDone(
            peak_bytes=step.peak_bytes,
            seconds_per_step=step.seconds,
            base_model_digest=bench.model.base_model_digest,
            largest_rank=bench.model.spec.largest_rank,
            device=str(bench.model.device),
            memory_bytes=_memory_bytes(bench.model),
        )

    def _train(self, request: Train) -> Trained:
        from worker.trainer.group import ALONE  # noqa: PLC0415
        from worker.trainer.model import read_adapter  # noqa: PLC0415
        from worker.trainer.training import train  # noqa: PLC0415

        session = self._session_for(request)
        if session.config.evaluator:
            raise InvalidRequest("trainer: Train, but this worker is an evaluator and holds no training data")
        progress = _Progress(self._say, "training", self._stopping)

        def from_the_slice(micro_batch: int) -> "Outcome":
            self._put_slice(request)  # anew, for what ran out of memory has trained a part of it
            return train(
                session.model,
                session.data.train,
                request.plan,
                collator=session.preparation.collator,
                memory_batch=micro_batch,
                report=progress,
                group=self._group or ALONE,
            )

        outcome, micro_batch = session.training.fit(
            self._in_step(from_the_slice),
            batch_size=max(1, request.plan.batch_size // self._size),  # train refuses what is below
            doing=f"training at LoRA rank {request.lora_rank}",
            device=str(session.model.device),
        )
        content = codec.encode(read_adapter(session.model), codec.WireDtype(request.wire_dtype))
        reach("result.writing")
        if self._group is None or self._group.is_first:
            Path(request.update_path).write_bytes(content)
        reach("result.written")
        metrics = {**outcome.metrics, "micro_batch": float(micro_batch)}
        return Trained(session.data.num_examples, outcome.seconds, metrics)

    def _evaluate(self, request: Evaluate) -> Evaluated:
        from worker.trainer.evaluation import Pace, TestData, evaluate_by  # noqa: PLC0415
        from worker.trainer.group import ALONE  # noqa: PLC0415

        session = self._put_slice(request)
        tests = TestData(session.data, session.preparation, session.config.data, session.seed)
        progress = _Progress(self._say, "evaluating", self._stopping)

        def at_once(micro_batch: int) -> tuple[int, dict[str, float]]:
            # Until memory runs out each kind of evaluation knows best how many.
            limit = micro_batch if session.evaluating.at_most else session.config.batch_size
            return evaluate_by(request.plan, session.model, tests, Pace(limit, progress, self._group or ALONE))

        (num_examples, metrics), _ = session.evaluating.fit(
            self._in_step(at_once),
            batch_size=Pace(session.config.batch_size, progress).batch,
            doing=f"evaluating at LoRA rank {request.lora_rank}",
            device=str(session.model.device),
        )
        return Evaluated(num_examples, metrics)

    def _put_slice(self, request: Train | Evaluate) -> _Session:
        """Makes the live adapter the one in the request's file."""
        from worker.trainer.model import write_adapter  # noqa: PLC0415

        session = self._session_for(request)
        write_adapter(session.model, _read_slice(request, session.model), scaling=request.scaling)
        return session

    def _session_for(self, request: Train | Evaluate) -> _Session:
        if self._session is None:
            raise InvalidRequest(f"trainer: {type(request).__name__} before Load")
        return self._session


class _Progress:
    """Says how far the work is, but not at every step of a tiny model. Raises Stopped if nobody wants it any more."""

    def __init__(self, say: Say, activity: str, stopping: threading.Event) -> None:
        self._say = say
        self._activity = activity
        self._stopping = stopping
        self._said_at = float("-inf")

    def __call__(self, step: int, total_steps: int, train_loss: float) -> None:
        if self._stopping.is_set():
            raise Stopped(f"{self._activity} was stopped at step {step} of {total_steps}")
        now = time.monotonic()
        if step < total_steps and now - self._said_at < PROGRESS_SECONDS:
            return
        self._said_at = now
        self._say(ProgressMade(self._activity, step, total_steps, train_loss))


def _word_of(error: Exception) -> str:
    """What the other processes of a group hear of it."""
    if is_out_of_memory(error):
        return "out_of_memory"
    return error.reason if isinstance(error, RafloraError) else "failed"


def log_context(config: WorkerConfig, federation: str) -> dict[str, str]:
    """What stands in every line of the trainer's log, as in the agent's."""
    named = {"federation": federation} if federation else {}
    return {"role": "trainer", "client": client_id_of(config.name), **named}


def _keep_stdout_for_answers() -> BinaryIO:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return answers


def _read_requests(source: BinaryIO, requests: "queue.Queue[bytes]", stopping: threading.Event) -> None:
    stop = to_line(Stop())
    while line := source.readline(MAX_LINE_BYTES + 1):
        if line == stop:
            stopping.set()
            continue
        # A request follows the answer to the last one, so a stop from before, which came too late, is not meant.
        stopping.clear()
        requests.put(line)
    # Not sys.exit: the main thread may be hours deep in a training step loop, and nothing is left to tidy.
    os._exit(0)


def _config_from(text: str) -> WorkerConfig:
    try:
        return WorkerConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"trainer: the worker's settings cannot be read: {error}") from None


def _set_up_libraries(config: WorkerConfig) -> None:
    """Threads as configured; no chatter; no network if the site says so."""
    import torch  # noqa: PLC0415
    from huggingface_hub import constants  # noqa: PLC0415

    if config.threads:
        torch.set_num_threads(config.threads)
    if config.model.offline:
        constants.HF_HUB_OFFLINE = True
    silence_libraries()


def _read_slice(request: Train | Evaluate, model: "AdaptedModel") -> Adapter:
    layout = codec.Layout(model.spec, request.lora_rank, codec.WireDtype(request.wire_dtype))
    path = Path(request.slice_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"trainer: the slice {path.name} cannot be read: {error.strerror}") from None
    return codec.decode(content, layout, whose=f"the slice {path.name}")


def _memory_bytes(model: "AdaptedModel") -> int:
    if model.device.type == "cuda":
        import torch  # noqa: PLC0415

        return int(torch.cuda.get_device_properties(model.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
