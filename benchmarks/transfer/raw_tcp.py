"""The floor: the same bytes over a bare TCP connection, received by a process of its own. No gRPC, nothing of ours.

A sender hands the file to the kernel (sendfile), a receiver takes it into one buffer (recv_into). If the bytes are
kept, every piece is hashed (SHA-256) and written, and in the end the file is synced, renamed and its folder synced.
Run as a program it serves one folder: `python -m benchmarks.transfer.raw_tcp FOLDER`; it says its port and then
answers one connection after another until its input ends.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_PIECE_BYTES = 1 << 20
_SECONDS = 300.0  # for any step of it
_NICE = 5  # as the coordinator of the load tests has it


@dataclass(frozen=True)
class Order:
    """What a client wants of the server."""

    verb: str  # "put": the client sends; "get": the server sends the file "served"
    size_bytes: int
    keeps: bool = True  # hash and file at the receiver


class RawServer:
    """The serving process; ends with its context."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        command = ("nice", "-n", str(_NICE), sys.executable, "-m", "benchmarks.transfer.raw_tcp", str(folder))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Of the serving process."""
        return self._process.pid

    def put(self, path: Path) -> None:
        """Sends the file; returns when it is durable there."""
        size_bytes = path.stat().st_size
        with self._connected(Order("put", size_bytes)) as line, path.open("rb") as file:
            line.sendfile(file)
            digest = line.recv(64, socket.MSG_WAITALL)
            assert len(digest) == 64, "the server ended early"

    def get(self, size_bytes: int, target: Path | None) -> None:
        """Takes what is served, into a durable file with its digest or into nothing."""
        with self._connected(Order("get", size_bytes, keeps=target is not None)) as line:
            take(line, size_bytes, target)

    def _connected(self, order: Order) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self._port), timeout=_SECONDS)
        line.sendall(json.dumps(vars(order)).encode() + b"\n")
        return line


def take(line: socket.socket, size_bytes: int, target: Path | None) -> str:
    """Receives so many bytes; the digest if they are kept in a file."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    if target is None:
        left = size_bytes
        while left:
            left -= _some(line, buffer, left)
        return "-" * 64
    part, found = target.with_suffix(".part"), hashlib.sha256()
    with part.open("wb", buffering=0) as file:
        left = size_bytes
        while left:
            taken = buffer[: _some(line, buffer, left)]
            found.update(taken)
            file.write(taken)
            left -= len(taken)
        os.fsync(file.fileno())
    os.replace(part, target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return found.hexdigest()


def _some(line: socket.socket, buffer: memoryview, left: int) -> int:
    taken = line.recv_into(buffer[: min(left, len(buffer))], 0, socket.MSG_WAITALL)
    if not taken:
        raise ConnectionError("the sender ended early")
    return taken


def serve(folder: Path) -> None:
    """Until killed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sys.stdout.write(f"{listening.getsockname()[1]}\n")
        sys.stdout.flush()
        threading.Thread(target=_end_with_input, daemon=True).start()
        while True:
            line, _ = listening.accept()
            line.settimeout(_SECONDS)
            with line:
                _answer(line, folder)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _answer(line: socket.socket, folder: Path) -> None:
    said = b""
    while not said.endswith(b"\n"):
        said += line.recv(1)
    order = Order(**json.loads(said))
    if order.verb == "put":
        line.sendall(take(line, order.size_bytes, folder / "received" if order.keeps else None).encode())
    else:
        with (folder / "served").open("rb") as file:
            line.sendfile(file)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
