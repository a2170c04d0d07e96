"""The processes of a group as one: process 0 hands out what the agent asks, all do it in step, all end together.

They meet in torch's store and agree by one small collective before anything that could wait for a process that is no
longer coming: whether somebody was told to stop, ran out of memory or failed. Nothing is pickled, and no library is
told that there is a group: each process looks to transformers like one that is alone (docs/decisions/0015).
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch
from torch import distributed

from common.errors import ConfigError, RafloraError
from common.settings import Launched
from worker.trainer_protocol import Answer, Failed, Loaded, answer_from_line, to_line

MAX_APART_SECONDS = 1800.0  # the slowest process behind the fastest; longer, and it will not come any more
_LOOK_SECONDS = 0.02  # between two looks for the next request or an answer
_POLL_SECONDS = 0.2  # for a stop
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h

_MEMORY, _STOPPED, _FAILED = "out_of_memory", "stopped", "failed"
_FORWARD = "forward"  # what a process says that is about to make a forward pass of a sharded base
_WORDS = (_STOPPED, _MEMORY, _FAILED, _FORWARD)
_END = "end"  # the key under which a process says why it ends the group
_IS_TOLD = "is_told_to_the_group"

_C10D: Any = distributed  # it exports its stores, but not to a type checker

Result = TypeVar("Result")


class GroupBroken(RafloraError):
    """A process of the group ended or hangs; the group is of no use any more."""

    reason = "trainer_died"
    is_the_end: ClassVar[bool] = True


class NoMemoryWithinPass(GroupBroken):
    """Memory ran out while the others wait for this process's part of a layer."""

    reason = "out_of_memory"


class FailedElsewhere(RafloraError):
    """Another process of the group could not go on, so this one does not either."""

    reason = "elsewhere"


class StoppedElsewhere(FailedElsewhere):
    """Another process of the group was told to stop first."""

    reason = _STOPPED


class NoMemoryElsewhere(MemoryError):
    """Another process of the group ran out of memory; what helps there must be done here too."""


class Group:
    """This process's place in its group. A group of one never communicates."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.is_to_shard = False  # the launcher says that the base is to be sharded
        self.accompany: Callable[[], None] | None = None  # of a sharded base: gathers what a forward pass gathers
        self._store = store  # main thread only: a store's client serves one thread at a time
        self._number = 0  # of the request at hand

    @property
    def is_first(self) -> bool:
        """Whether this process speaks to the agent and writes results."""
        return self.rank == 0

    def together(self, work: Callable[[], Result], word_of: Callable[[Exception], str]) -> Result:
        """Does what all processes do at the same time; if one fails, all do.

        Raises what the work raises, or else FailedElsewhere, NoMemoryElsewhere or GroupBroken.
        """
        try:
            result = work()
        except (FailedElsewhere, NoMemoryElsewhere, GroupBroken):
            raise  # all know
        except Exception as error:
            if not getattr(error, _IS_TOLD, False):
                setattr(error, _IS_TOLD, True)  # work within work: the others hear of one error once
                self._check_nobody_waits(error, word_of(error))
                self._tell(word_of(error), 0)
            raise
        self.agree()
        return result

    def agree(self, amount: int = 0) -> int:
        """The sum of every process's amount, once all are here and well. Raises as `together`."""
        while True:
            told = self._told_well("", amount)
            if not told[_FORWARD] or self.accompany is None:
                return told[""]
            # Others still compute, and a layer is gathered by all or by nobody.
            self.accompany()

    def agree_to_pass(self) -> None:
        """Before a forward pass of a sharded base: the others make one too, or accompany it. Raises as `together`."""
        self._told_well(_FORWARD, 0)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the processes, in place; comes after an agreement."""
        if self.size > 1:
            _kept(lambda: distributed.all_reduce(tensor))

    def gather_rows(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The rows of all processes in their order, whatever their number; other axes are padded with -100.

        Booleans and numbers only. Raises as `together`.
        """
        if self.size == 1:
            return rows
        self.agree()
        axes = max(rows.ndim, 1)
        shapes = torch.zeros(self.size, axes, dtype=torch.int64)
        shapes[self.rank] = torch.tensor(rows.shape)
        self.add_up(shapes)
        widest = shapes.max(dim=0).values.tolist()
        padded = np.full(widest, -100, dtype=rows.dtype) if rows.dtype != bool else np.zeros(widest, dtype=bool)
        padded[tuple(slice(0, length) for length in rows.shape)] = rows
        mine = torch.from_numpy(np.ascontiguousarray(padded).view(np.uint8).reshape(-1))
        everybodys = [torch.empty_like(mine) for _ in range(self.size)]
        _kept(lambda: distributed.all_gather(everybodys, mine))
        parts = [other.numpy().view(rows.dtype).reshape(widest) for other in everybodys]
        return np.concatenate([part[: int(shapes[who, 0])] for who, part in enumerate(parts)])

    def hand_out(self, line: bytes) -> None:
        """Process 0 gives everybody the next request."""
        self._number += 1
        self._store.set(f"request/{self._number}", line)

    def next_request(self) -> bytes:
        """The next request, whenever it comes; ends the process when the group has ended."""
        self._number += 1
        return _waited_for(self._store, f"request/{self._number}")

    def conclude(self, answer: Answer) -> Answer:
        """Process 0: what the whole group answers, once everybody is done. The others only say how it went there."""
        self._store.set(f"answer/{self._number}/{self.rank}", to_line(answer))
        if not self.is_first:
            return answer
        if isinstance(answer, Failed) and answer.fatal:
            return answer  # the others may wait for this process where they answer nothing
        answers = [answer, *(self._answer_of(rank) for rank in range(1, self.size))]
        # Of many that failed the one to tell of is the one that was not merely told to.
        failed = [(rank, one) for rank, one in enumerate(answers) if isinstance(one, Failed)]
        if failed:
            rank, first = min(failed, key=lambda one: _is_hearsay(one[1]))
            said = first.message if first.reason == _STOPPED else f"process {rank} of {self.size}: {first.message}"
            return Failed(first.reason, said, fatal=any(one.fatal for _, one in failed))
        if isinstance(answer, Loaded):
            return _same_everywhere(answer, answers)
        return answer

    def check_devices(self, device: torch.device) -> None:
        """Raises ConfigError if two processes would share a GPU."""
        if self.size == 1 or device.type != "cuda":
            return
        unique = str(torch.cuda.get_device_properties(device).uuid)
        mine = f"{socket.gethostname()} {unique}".encode()
        self._store.set(f"device/{self._number}/{self.rank}", mine)
        keys = [f"device/{self._number}/{rank}" for rank in range(self.size)]
        taken = [_waited_for(self._store, key, MAX_APART_SECONDS) for key in keys]
        others = [rank for rank, one in enumerate(taken) if one == mine and rank != self.rank]
        if others:
            raise ConfigError(
                f"launch: processes {self.rank} and {others[0]} of {self.size} would share a GPU; torch sees "
                f"{torch.cuda.device_count()} here. Launch as many processes on a machine as it has GPUs, or look "
                "at CUDA_VISIBLE_DEVICES"
            )

    def give_up(self, failed: Failed) -> None:
        """Another process than 0 says why it ends, though process 0 may wait for it where it hears no answer."""
        said = Failed(failed.reason, f"process {self.rank} of {self.size}: {failed.message}", fatal=True)
        self._store.set(_END, to_line(said))

    def _answer_of(self, rank: int) -> Answer:
        return answer_from_line(_waited_for(self._store, f"answer/{self._number}/{rank}", MAX_APART_SECONDS))

    def _check_nobody_waits(self, error: Exception, word: str) -> None:
        """Raises GroupBroken if the error may have come in the middle of a pass, where others wait for a layer."""
        # What has a name of ours is raised between passes, where all agree on what comes next.
        if self.accompany is None or isinstance(error, RafloraError):
            return
        traceback.print_exception(error)
        if word == _MEMORY:
            raise NoMemoryWithinPass(
                f"{type(error).__name__}; with a sharded base the group ends with it: set batch_size in worker.toml, "
                "half of what it was, or model.gradient_checkpointing = true"
            ) from None
        raise GroupBroken(f"{type(error).__name__}; the worker's log says more") from None

    def _told_well(self, word: str, amount: int) -> dict[str, int]:
        told = self._tell(word, amount)
        if told[_STOPPED]:
            raise StoppedElsewhere("another process of the group was stopped")
        if told[_MEMORY]:
            raise NoMemoryElsewhere("another process of the group")
        if told[_FAILED]:
            raise FailedElsewhere("another process of the group failed")
        return told

    def _tell(self, word: str, amount: int) -> dict[str, int]:
        """How many processes said which word, and under "" the sum of the amounts."""
        if self.size == 1:
            return {**dict.fromkeys(_WORDS, 0), "": amount}
        known = word if word in _WORDS else _FAILED
        told = torch.tensor([*(int(bool(word) and known == each) for each in _WORDS), amount], dtype=torch.int64)
        _kept(lambda: distributed.all_reduce(told))
        return dict(zip((*_WORDS, ""), told.tolist(), strict=True))


ALONE = Group()


class StopWatch:
    """Process 0 says when the request at hand is to be dropped; the others hear it. Ends a process without a group."""

    def __init__(self, group: Group, store: Any, stopping: threading.Event) -> None:
        self._group = group
        self._store = store  # of this thread's own
        self._stopping = stopping
        self._lock = threading.Lock()
        self._asking = threading.Lock()  # two threads of process 0 use the store
        self._number = 0

    def began(self) -> None:
        """Another request is at hand; a stop that was meant for the last one is none for this."""
        with self._lock:
            self._number += 1
            self._stopping.clear()

    def say(self, number: int) -> None:
        """Process 0: drop that request, the one that was read as so maniest."""
        with self._asking:
            self._store.set("stop", str(number))

    def await_end(self, say: Callable[[Answer], None]) -> NoReturn:
        """Process 0, in a thread of its own: passes on why another process ended the group, and ends."""
        pause = threading.Event()
        while True:
            pause.wait(_POLL_SECONDS)
            try:
                with self._asking:
                    line = self._store.get(_END) if self._store.check([_END]) else b""
            except RuntimeError:
                _end("the group has ended")
            if line:
                say(answer_from_line(bytes(line)))
                _end("another process of the group gave up")

    def listen(self) -> NoReturn:
        """In a thread of its own, for as long as the process lives."""
        pause = threading.Event()
        while True:
            pause.wait(_POLL_SECONDS)
            try:
                number = int(self._store.get("stop")) if self._store.check(["stop"]) else 0
            except (RuntimeError, ValueError):
                _end("the group has ended")
            with self._lock:
                if number == self._number and number:
                    self._stopping.set()


def join_group(launched: Launched, stopping: threading.Event) -> tuple[Group, StopWatch]:
    """Meets the other processes. Raises ConfigError, or GroupBroken if they do not come."""
    if launched.is_foreign:
        raise ConfigError(
            "launch: accelerate was told to leave the model to DeepSpeed or Megatron; use multi-GPU, or FSDP"
        )
    _end_with_launcher()

    def store(*, serves: bool) -> Any:
        return _C10D.TCPStore(
            launched.host,
            launched.port,
            is_master=serves,
            timeout=timedelta(seconds=MAX_APART_SECONDS),
            wait_for_workers=False,
            multi_tenant=serves,
        )

    def meet() -> tuple[Any, Any]:
        own = store(serves=launched.rank == 0 and not launched.has_store)
        distributed.init_process_group(
            backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=_C10D.PrefixStore("raflora/collectives", own),
            rank=launched.rank,
            world_size=launched.size,
            timeout=timedelta(seconds=MAX_APART_SECONDS),
        )
        return own, store(serves=False)

    own, watched = _kept(meet)
    group = Group(launched.rank, launched.size, launched.local_rank, _C10D.PrefixStore("raflora/requests", own))
    group.is_to_shard = launched.is_sharded
    return group, StopWatch(group, _C10D.PrefixStore("raflora/requests", watched), stopping)


def own_device(wanted: str, group: Group) -> str:
    """The device of this process of a group, of what the site wants. Raises ConfigError."""
    if group.size == 1:
        return wanted
    if wanted not in {"auto", "cuda", "cpu"}:
        raise ConfigError(
            f'model.device {wanted!r}: a group takes a GPU for each process; use "auto" or "cuda", and '
            "CUDA_VISIBLE_DEVICES if it must not take all"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu" if wanted == "auto" else wanted
    # Where a scheduler shows each process its own GPU only, that is number 0 everywhere.
    device = f"cuda:{group.local_rank % torch.cuda.device_count()}"
    group.check_devices(torch.device(device))
    return device


def _is_hearsay(failed: Failed) -> bool:
    return failed.reason == FailedElsewhere.reason or NoMemoryElsewhere.__name__ in failed.message


def _same_everywhere(first: Loaded, answers: Sequence[Answer]) -> Answer:
    """The answer to Load, if all have loaded the same."""
    for rank, other in enumerate(answers):
        if not isinstance(other, Loaded) or other.base_model_digest != first.base_model_digest:
            return Failed("model_error", f"process {rank} has loaded another base model than process 0", fatal=True)
        if (other.modules, other.tensors, other.num_examples) != (first.modules, first.tensors, first.num_examples):
            return Failed("data_error", f"process {rank} has other layers or examples than process 0", fatal=True)
    return first


def _kept(work: Callable[[], Result]) -> Result:
    """Does what needs all processes. Raises GroupBroken."""
    try:
        return work()
    except RuntimeError as error:  # torch's own kinds of it included
        if isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"group: {error}".partition("\n")[0], file=sys.stderr)
        raise GroupBroken("a process of the group ended or did not come; the worker's log says more") from None


def _waited_for(store: Any, key: str, limit_seconds: float = float("inf")) -> bytes:
    """A key's value, however long it takes; ends the process when the store, and so the group, has ended."""
    # Not the store's own wait: with a limit short enough to notice an end it would warn in the log every time.
    pause, began = threading.Event(), time.monotonic()
    try:
        while not store.check([key]):
            if time.monotonic() - began > limit_seconds:
                raise GroupBroken(f"a process of the group did not come within {limit_seconds:g} s")
            pause.wait(_LOOK_SECONDS)
        return bytes(store.get(key))
    except RuntimeError:
        _end("the group has ended")


def _end(why: str) -> NoReturn:
    print(f"trainer: {why}", file=sys.stderr, flush=True)
    os._exit(1)  # not 0: a launcher ends the others of a process that failed


def _end_with_launcher() -> None:
    """The kernel ends this process with the one that started it, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
