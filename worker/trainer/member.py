"""One process of a group: process 0 speaks to the agent over its socket, the others do what it hands out.

A lone trainer's loop is in worker/trainer/process.py; this is the same for a group. It ends with its group: when the
agent is gone, when the launcher is gone, and when process 0 is gone.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

from common.errors import RafloraError
from common.settings import Launched, take_launch
from worker.trainer.group import Group, StopWatch, join_group
from worker.trainer_protocol import MAX_LINE_BYTES, Answer, Failed, Stop, to_line

_LAST_WORDS_SECONDS = 5.0  # in which process 0 can say why, before a launcher ends it because another one ended

Say = Callable[[Answer], None]
Work = Callable[[bytes], Answer]
Worker = Callable[[Say, threading.Event, Group], Work]


def serve(socket_path: str, worker: Worker) -> int:
    """Works until the group ends; the exit status. `worker` makes what answers a request."""
    launched = take_launch()
    stopping = threading.Event()
    if launched.rank == 0:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(socket_path)
            return _first(agent, launched, worker, stopping)
    try:
        group, watch = join_group(launched, stopping)
    except RafloraError as error:
        print(f"trainer: process {launched.rank}: {error}", file=sys.stderr)
        threading.Event().wait(_LAST_WORDS_SECONDS)
        return 1
    threading.Thread(target=watch.listen, daemon=True).start()
    work = worker(_unheard, stopping, group)
    while True:
        line = group.next_request()
        watch.began()
        answer = group.conclude(work(line))
        if isinstance(answer, Failed) and answer.fatal:
            group.give_up(answer)
            threading.Event().wait(_LAST_WORDS_SECONDS)
            return 1


def _first(agent: socket.socket, launched: Launched, worker: Worker, stopping: threading.Event) -> int:
    lines, saying = agent.makefile("rb"), threading.Lock()

    def say(answer: Answer) -> None:
        try:
            with saying:
                agent.sendall(to_line(answer))
        except OSError:
            os._exit(1)  # not 0: the launcher is to end the others

    try:
        group, watch = join_group(launched, stopping)
    except RafloraError as error:
        lines.readline(MAX_LINE_BYTES + 1)
        say(Failed(error.reason, str(error), fatal=True))
        return 1
    requests = _Requests(lines, watch, stopping)
    threading.Thread(target=watch.await_end, args=(say,), daemon=True).start()
    work = worker(say, stopping, group)
    while True:
        line = requests.next()
        group.hand_out(line)
        answer = _concluded(group, work(line))
        say(answer)
        if isinstance(answer, Failed) and answer.fatal:
            return 1


def _concluded(group: Group, answer: Answer) -> Answer:
    try:
        return group.conclude(answer)
    except RafloraError as error:
        return Failed(error.reason, str(error), fatal=True)


class _Requests:
    """What comes from the agent: stops go out at once, requests one by one. The agent's end ends the process."""

    def __init__(self, lines: BinaryIO, watch: StopWatch, stopping: threading.Event) -> None:
        self._lines = lines
        self._watch = watch
        self._stopping = stopping
        self._arrived = threading.Semaphore(0)
        self._waiting: list[bytes] = []  # one at most, for the agent waits for the answer
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> bytes:
        """The next request, whenever it comes."""
        self._arrived.acquire()
        return self._waiting.pop()

    def _read(self) -> None:
        stop, number = to_line(Stop()), 0
        while line := self._lines.readline(MAX_LINE_BYTES + 1):
            if line == stop:
                self._stopping.set()
                self._watch.say(number)
                continue
            # A request follows the answer to the last one, so a stop from before, which came too late, is not meant.
            number += 1
            self._stopping.clear()
            self._waiting.append(line)
            self._arrived.release()
        os._exit(1)


def _unheard(_: Answer) -> None:
    """Progress is told by process 0 alone."""
