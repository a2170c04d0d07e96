"""The order of every write, as the kernel saw it: `kill -9` never tests fsync, because the page cache outlives us.

A federation of one client runs with its coordinator under strace. For each submission that was answered, the calls
that make it durable must be there, on the right files and in this order. A failpoint's trace marks the answers.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.kills import TESTS, Setting, process_environment, write_settings
from faults.roles import Order
from faults.schedule import COORDINATOR

SECONDS = 90.0
CLIENT = "site-1"
_TRACED = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,linkat,sendmsg"
_LINE = re.compile(r"(?P<thread>\d+) +(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>")
_SUBMISSION_ANSWERED = "update.answering"

# What must come before the answer, in this order: the call, and what its arguments must say.
DURABLE = (
    ("the bytes are written", r"write", r"/uploads/[^>]*\.part>"),
    ("the file is synced", r"fsync", r"/uploads/[^>]*\.part>"),
    ("the file gets its name", r"rename\w*", r"\.part\", .*/uploads/[0-9a-f]{64}/[0-9a-f]{64}\""),
    ("the folder is synced", r"fsync", r"/uploads/[0-9a-f]{64}>"),
    ("the blob gets its name", r"link\w*", r"/uploads/.*, .*/blobs/[0-9a-f]{2}/[0-9a-f]{64}\""),
    ("the blob's folder is synced", r"fsync", r"/blobs/[0-9a-f]{2}>"),
    ("the event is written", r"pwrite64", r"/journal\.sqlite-wal>"),
    ("the event is synced", r"fdatasync|fsync", r"/journal\.sqlite-wal>"),
)


@dataclass(frozen=True)
class Call:
    """A system call that has returned."""

    name: str
    arguments: str


def traced(folder: Path, bug: str = "") -> list[Call]:
    """The coordinator's calls in a federation of one client and two rounds."""
    write_settings(folder, Setting(rounds=2, ranks=(8,), evaluate_every=0))
    out = folder / "strace"
    orders = [
        Order(COORDINATOR, "coordinator", str(folder), f"trace={folder / 'steps'}", bug),
        Order(CLIENT, "worker", str(folder), ""),
    ]
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "64", "-e", f"trace={_TRACED}", "-o", str(out)]
    coordinator = _start(command, orders[0], folder)
    worker = _start([], orders[1], folder)
    try:
        if worker.wait(SECONDS) != 0:
            raise RuntimeError(f"the worker ended: {(folder / f'{CLIENT}.log').read_text()}")
    finally:
        worker.kill()
        _end(coordinator)
    return list(calls_of(out.read_text(errors="replace").splitlines()))


def order_breaches(calls: Sequence[Call], submissions: int) -> list[str]:
    """What was missing, or came too late, before an answer."""
    found: list[str] = []
    begin = answers = 0
    for index, call in enumerate(calls):
        if call.name == "write" and f" {_SUBMISSION_ANSWERED}" in call.arguments:
            answers += 1
            missing = _first_missing(calls[begin:index])
            if missing:
                found.append(f"answer {answers} was given before {missing}")
            if not any(call.name == "sendmsg" for call in calls[index:]):
                found.append(f"answer {answers} was never sent")
            begin = index
    if answers != submissions:
        found.append(f"{answers} submissions were answered, expected {submissions}")
    return found


def calls_of(lines: Iterable[str]) -> Iterator[Call]:
    """The calls of strace's output, each at the line on which it returned."""
    waiting: dict[str, str] = {}  # by thread
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        thread, rest = match["thread"], match["rest"]
        if rest.endswith("<unfinished ...>"):
            waiting[thread] = rest
            continue
        if _RESUMED.match(rest):
            rest = waiting.pop(thread, "")
        call = _CALL.match(rest)
        if call is not None:
            yield Call(call["name"], call["arguments"])


def _first_missing(calls: Sequence[Call]) -> str:
    """The first condition that these calls do not fulfil after all those before it; empty: none."""
    left = iter(calls)
    for said, name, arguments in DURABLE:
        if not any(re.fullmatch(name, call.name) and re.search(arguments, call.arguments) for call in left):
            return said
    return ""


def _start(prefix: Sequence[str], order: Order, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{order.key}.log").open("ab") as log:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "faults.roles", json.dumps(asdict(order))],
            cwd=TESTS,
            env=process_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(traced_process: subprocess.Popen[bytes]) -> None:
    """Ends the traced one; strace ends with it. Nobody of its session is left, also if strace died first."""
    try:
        children = Path(f"/proc/{traced_process.pid}/task/{traced_process.pid}/children")
        for child in children.read_text().split() if children.exists() else []:
            os.kill(int(child), signal.SIGTERM)
        traced_process.wait(SECONDS)
    finally:
        with suppress(ProcessLookupError):  # as it should be
            os.killpg(traced_process.pid, signal.SIGKILL)
        traced_process.wait(SECONDS)
