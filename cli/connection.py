"""How a verb reaches the coordinator: the flags that all of them share, the channel, errors from the wire.

Only observers and operators come this way; a worker has a client of its own.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import grpc.aio
from cyclopts import Parameter
from cyclopts.types import PositiveFloat

from cli.errors import Refused
from common.channel import REASON_KEY, Tls, client_channel, is_loopback
from common.errors import ConfigError, NotAllowed, RafloraError, Unavailable
from common.identity_folder import IdentityFolder
from common.settings import coordinator_address, identity_folder
from worker.wire_errors import meaning_of

# What a server says that does not offer the service, or not to us; no reason of ours stands beside it.
_REFUSALS = frozenset(
    {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
)

Request = TypeVar("Request")
Message = TypeVar("Message")


@Parameter(name="*")
@dataclass(frozen=True)
class Connection:
    """How to reach the coordinator."""

    coordinator: str | None = None
    """HOST:PORT; unset: the variable RAFLORA_COORDINATOR, else what the identity says, else 127.0.0.1:7070."""
    identity: Path | None = None
    """A folder of `raflora init` or `raflora access add`: who you are; unset: the variable RAFLORA_IDENTITY."""
    insecure: bool = False
    """Speak in the clear to an address outside this machine (a private network, a tunnel)."""
    ca_file: Path | None = None
    """PEM: the authority that signed the coordinator's certificate; unset: the system's."""
    certificate_file: Path | None = None
    """PEM: your certificate, if the coordinator asks for one."""
    key_file: Path | None = None
    """PEM: the key of that certificate."""
    timeout_seconds: Annotated[PositiveFloat, Parameter(name="--timeout")] = 10.0
    """Seconds to wait for an answer."""

    @property
    def address(self) -> str:
        """The coordinator's HOST:PORT. Raises ConfigError if it has no port."""
        identity = self.shown_identity
        address = self.coordinator or coordinator_address(otherwise=identity.address if identity else "")
        if not address.rpartition(":")[2].isdigit() and not address.startswith("unix:"):
            raise ConfigError(f"coordinator {address!r}: expected HOST:PORT, for example 127.0.0.1:7070")
        return address

    @property
    def shown_identity(self) -> IdentityFolder | None:
        """The folder that says who we are; flags that name files, or no TLS, are stronger than the variable."""
        if self.identity is not None:
            return _identity_at(self.identity)
        if self.insecure or Tls(self.ca_file, self.certificate_file, self.key_file) != Tls():
            return None
        folder = identity_folder()
        return _identity_at(folder) if folder else None

    @property
    def tls(self) -> Tls | None:
        """The files, or None for a connection in the clear. Raises ConfigError if the flags contradict each other."""
        tls = Tls(self.ca_file, self.certificate_file, self.key_file)
        if self.identity is not None and (self.insecure or tls != Tls()):
            raise ConfigError("--identity has the certificates of TLS in it; leave --insecure and the files out")
        identity = self.shown_identity
        if identity is not None:
            identity.check()
            return identity.tls
        if (self.certificate_file is None) != (self.key_file is None):
            raise ConfigError("--certificate-file and --key-file belong together; give both or none")
        if self.insecure and tls != Tls():
            raise ConfigError("--insecure means no TLS; leave it or the certificate files out")
        if tls == Tls() and (self.insecure or is_loopback(self.address)):
            return None
        return tls


@asynccontextmanager
async def reach(connection: Connection) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the coordinator; what goes wrong on it comes out as a RafloraError."""
    async with client_channel(connection.address, connection.tls) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            raise await _explained(error, connection) from None


async def _explained(error: grpc.aio.AioRpcError, connection: Connection) -> RafloraError:
    """The typed error behind a status; if nobody answered, with what a look at each step of the connection found."""
    meant = error_of(error, connection)
    if error.code() is not grpc.StatusCode.UNAVAILABLE or not isinstance(meant, Unavailable):
        return meant
    from worker.probe import Step, probe  # noqa: PLC0415 - cryptography is slow to load, and this seldom needed

    found = await asyncio.to_thread(probe, connection.address, connection.tls, min(3.0, connection.timeout_seconds))
    if found.failed in {Step.TLS, Step.HTTP2}:
        return Unavailable(f"coordinator {connection.address} cannot be reached: {found.cause}")
    return meant


def error_of(error: grpc.aio.AioRpcError, connection: Connection) -> RafloraError:
    """The typed error behind a status."""
    trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    details = error.details() or "no details"
    if REASON_KEY not in trailing and error.code() in _REFUSALS:
        return Refused(f"coordinator {connection.address} answered {error.code().name}: {details}")
    meant = meaning_of(error.code().name, details, trailing, connection.address)
    if isinstance(meant, NotAllowed):
        return NotAllowed(f"{meant}; `raflora access add` makes an identity that may: show it with --identity FOLDER")
    return meant


async def messages_of(
    call: grpc.aio.UnaryStreamCall[Request, Message], connection: Connection, *, silence_seconds: float = 0.0
) -> AsyncGenerator[Message, None]:
    """A stream's messages; close it (aclosing) to end the call.

    Raises Unavailable if the first takes longer than the timeout or a later one longer than `silence_seconds`
    (at least the timeout), else what the call's status means.
    """
    messages = aiter(call)
    patience_seconds = connection.timeout_seconds
    try:
        while True:
            try:
                message = await asyncio.wait_for(anext(messages), patience_seconds)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _silent(connection) from None
            except grpc.aio.AioRpcError as error:
                raise await _explained(error, connection) from None
            yield message
            patience_seconds = max(silence_seconds, connection.timeout_seconds)
    finally:
        call.cancel()


def _identity_at(path: Path) -> IdentityFolder:
    """The folder itself; of a worker's state_dir the identity in it."""
    inside = IdentityFolder(path / "identity")
    return inside if inside.is_complete else IdentityFolder(path)


def _silent(connection: Connection) -> Unavailable:
    """The error for a coordinator that takes the call and says nothing."""
    return Unavailable(
        f"coordinator {connection.address} cannot be reached: no answer within {connection.timeout_seconds:g} s"
    )
