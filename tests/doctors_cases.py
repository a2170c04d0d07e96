"""What the doctor is shown: programs that are no coordinator, identity folders."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.channel import Pem
from common.identity_folder import IdentityFolder


@contextmanager
def listening(answer: bytes | None, *, reads: bool = True, backlog: int = 8) -> Iterator[str]:
    """A program that is no coordinator: says this to everybody, None: nothing at all; closes the connection then."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in held:
            connection.close()


def identity(folder: Path, pem: Pem) -> IdentityFolder:
    kept = IdentityFolder(folder)
    for name, content in (("ca.pem", pem.authority), ("key.pem", pem.key), ("certificate.pem", pem.certificate)):
        kept.write(name, content or b"")
    return kept
