"""Starts processes in milliseconds: imports everything once and forks a child for every order.

    python -m faults.nursery

Orders come as JSON lines on standard input, what happened goes as JSON lines to standard output. A child that ended is
reported with its exit status (negative: the signal). Nothing here decides anything. Without an input it kills all and
ends. gRPC is imported, but not in use before the fork, so a child starts it as a fresh process would.
"""

import gc
import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from faults.roles import ROLES, Order


def main() -> None:
    """Serves orders until the input ends."""
    nursery = _Nursery()
    gc.freeze()  # so that a child's collector does not copy what it has in common with the others
    os.set_blocking(0, False)
    waiting = b""
    while True:
        nursery.reap()
        if not nursery.wait():
            continue
        try:
            got = os.read(0, 1 << 16)
        except BlockingIOError:
            continue
        if not got:
            nursery.kill_all()
            return
        *lines, waiting = (waiting + got).split(b"\n")
        for line in lines:
            nursery.obey(json.loads(line))


class _Nursery:
    def __init__(self) -> None:
        self._children: dict[int, tuple[str, int]] = {}  # by pidfd: key and pid
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)

    def wait(self) -> bool:
        """Until a child ends or an order comes; whether an order may have come."""
        return any(key.fd == 0 for key, _ in self._selector.select())

    def obey(self, order: dict[str, Any]) -> None:
        if "signal" in order:
            for fd, (key, _) in self._children.items():
                if key == order["key"]:
                    signal.pidfd_send_signal(fd, order["signal"])
            return
        pid = os.fork()
        if pid == 0:
            self._forget()
            _live(Order(**order))
        fd = os.pidfd_open(pid)
        self._children[fd] = (order["key"], pid)
        self._selector.register(fd, selectors.EVENT_READ)

    def reap(self) -> None:
        for fd, (key, pid) in list(self._children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._selector.unregister(fd)
                os.close(fd)
                del self._children[fd]
                _say({"what": "ended", "key": key, "status": os.waitstatus_to_exitcode(status)})

    def kill_all(self) -> None:
        for fd, (_, pid) in self._children.items():
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _forget(self) -> None:
        self._selector.close()
        for fd in self._children:
            os.close(fd)


def _live(order: Order) -> None:
    """The child's whole life."""
    told = os.dup(1)
    log = os.open(Path(order.folder) / f"{order.key}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    status = 1
    try:
        ROLES[order.role](order, lambda what: _tell(told, order.key, what))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell(descriptor: int, key: str, what: str) -> None:
    os.write(descriptor, json.dumps({"what": what, "key": key}).encode() + b"\n")


def _say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
