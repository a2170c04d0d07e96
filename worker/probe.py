"""Why a coordinator cannot be reached, in words: each step of a connection on its own, from the name to HTTP/2.

Opens a connection, says hello and closes it; sends no request. gRPC tells these causes apart only in part: a server
of gRPC that does not like a client's certificate closes the connection without a word.
"""

import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from common.channel import Pem, Tls
from common.errors import ConfigError, NotAuthenticated
from common.moments import moment
from worker.certificates import Description, describe

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's, with empty settings
_SETTINGS_FRAME = 4
_TLS_RECORDS = (0x15, 0x16)  # an alert, a handshake
_EXPIRED, _NOT_YET = 10, 9
_OTHER_AUTHORITY = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
_FEW_NAMES = 5


class Step(StrEnum):
    """How far a connection came."""

    ADDRESS = "address"
    NAME = "name"
    TCP = "tcp"
    TLS = "tls"
    HTTP2 = "http2"
    DONE = "done"


@dataclass(frozen=True)
class Probed:
    """What a connection met."""

    failed: Step  # DONE: nothing failed
    cause: str  # a sentence; empty if nothing failed
    addresses: tuple[str, ...] = ()  # that the name stands for
    server: Description | None = None  # the certificate that the server showed
    seconds: float = 0.0  # that the TCP connection took


def host_and_port(address: str) -> tuple[str, int]:
    """HOST:PORT, or [V6]:PORT, in two. Raises ConfigError."""
    if "/" in address.removeprefix("dns:///"):
        raise ConfigError(f"address {address!r}: HOST:PORT alone, without http:// and without a path")
    host, _, port = address.rpartition(":")
    host = host.removeprefix("dns:///").removeprefix("dns:")
    if host.count(":") and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"address {address!r}: an IPv6 address is written [::1]:7070")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {address!r}: expected HOST:PORT, for example coordinator.example.org:7070")
    return host.strip("[]"), int(port)


def probe(address: str, tls: Tls | Pem | None, timeout_seconds: float, now: float | None = None) -> Probed:
    """Goes all the way to HTTP/2 and tells where it ended; no step takes longer than the timeout.

    Blocks; name lookup has the system's own limit. `now` is this machine's clock, in unix seconds.
    """
    clock = time.time() if now is None else now
    if address.startswith("unix:"):
        return Probed(Step.DONE, "")
    try:
        host, port = host_and_port(address)
    except ConfigError as error:
        return Probed(Step.ADDRESS, str(error))
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        return Probed(Step.NAME, f"the name {host} cannot be resolved: {why}")
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    try:
        began = time.monotonic()
        with socket.create_connection((host, port), timeout_seconds) as connection:
            took = time.monotonic() - began
            connection.settimeout(timeout_seconds)
            if tls is None:
                failed, cause, server = *_in_the_clear(connection, host, port, timeout_seconds), None
            else:
                failed, cause, server = _over_tls(connection, host, port, _Tls(tls, timeout_seconds, clock))
    except OSError as error:
        return Probed(Step.TCP, _no_connection(error, address, timeout_seconds), addresses)
    return Probed(failed, cause, addresses, server, took)


@dataclass(frozen=True)
class _Tls:
    files: Tls | Pem
    timeout_seconds: float
    now: float

    @property
    def pem(self) -> Pem:
        return self.files.read() if isinstance(self.files, Tls) else self.files


def _over_tls(connection: socket.socket, host: str, port: int, how: _Tls) -> tuple[Step, str, Description | None]:
    try:
        context = _context(how.files)
    except (ConfigError, OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
        return Step.TLS, f"the certificate files cannot be used: {error}", None
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            shown = secured.getpeercert(binary_form=True)
            server = describe(shown) if shown else None
            failed, cause = _hello(secured, "TLS")
            if failed is Step.HTTP2 and cause.endswith(_CLOSED):
                return Step.TLS, _why_not_welcome(how.pem, how.now), server
            return failed, cause, server
    except ssl.SSLCertVerificationError as error:
        server = _shown(host, port, how.timeout_seconds)
        return Step.TLS, _why_not_trusted(error, server, host, how.now), server
    except ssl.SSLError as error:
        return Step.TLS, _why_no_tls(error), None
    except TimeoutError:
        return Step.TLS, f"connected, but no TLS answer within {how.timeout_seconds:g} s; is it a coordinator?", None
    except OSError:
        return Step.TLS, "the connection was closed during the TLS handshake; does the coordinator speak TLS?", None


_CLOSED = "closed the connection"
THEY_SPEAK_TLS = (
    "it speaks TLS, but this side speaks in the clear: set coordinator.join_token_file (the operator has the token), "
    "or [coordinator.tls]; a person says --identity FOLDER"
)


def _in_the_clear(connection: socket.socket, host: str, port: int, timeout_seconds: float) -> tuple[Step, str]:
    failed, cause = _hello(connection, "in the clear")
    # A gRPC server with TLS does not complain about a hello in the clear; it closes.
    if cause.endswith(_CLOSED) and _shown(host, port, timeout_seconds) is not None:
        return failed, THEY_SPEAK_TLS
    return failed, cause


def _hello(connection: socket.socket, how: str) -> tuple[Step, str]:
    """Whether the other side speaks HTTP/2, as every gRPC server does."""
    try:
        connection.sendall(_HELLO)
        answer = connection.recv(64)
    except TimeoutError:
        return Step.HTTP2, f"connected ({how}), but nothing answers; is it a coordinator?"
    except OSError:
        answer = b""
    if len(answer) >= 9 and answer[3] == _SETTINGS_FRAME:
        return Step.DONE, ""
    if not answer:
        return Step.HTTP2, f"connected ({how}), and the other side {_CLOSED}"
    if answer.startswith(b"HTTP/1"):
        return Step.HTTP2, f"connected ({how}), but a web server answers (HTTP/1), not a coordinator"
    if answer[0] in _TLS_RECORDS and how != "TLS":
        return Step.HTTP2, THEY_SPEAK_TLS
    return Step.HTTP2, f"connected ({how}), but what answers is no gRPC server"


def _context(files: Tls | Pem) -> ssl.SSLContext:
    pem = files.read() if isinstance(files, Tls) else files
    context = ssl.create_default_context(cadata=pem.authority.decode("ascii") if pem.authority else None)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # gRPC is not that strict, and this must not say more than it
    context.set_alpn_protocols(["h2"])
    if isinstance(files, Tls) and files.certificate_file is not None:
        context.load_cert_chain(files.certificate_file, files.key_file, password=lambda: "")
    elif isinstance(files, Pem) and pem.certificate and pem.key:
        # The library takes files only; this folder is for its owner's eyes, and gone at once.
        with TemporaryDirectory() as folder:
            chain = Path(folder) / "chain.pem"
            chain.touch(mode=0o600)
            chain.write_bytes(pem.key + b"\n" + pem.certificate)
            context.load_cert_chain(chain, password=lambda: "")
    return context


def _shown(host: str, port: int, timeout_seconds: float) -> Description | None:
    """The certificate that a server shows to somebody who trusts nobody; nothing is sent to it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError, ConfigError), socket.create_connection((host, port), timeout_seconds) as connection:
        connection.settimeout(timeout_seconds)
        with context.wrap_socket(connection) as secured:
            shown = secured.getpeercert(binary_form=True)
            return describe(shown) if shown else None
    return None


def _why_not_trusted(error: ssl.SSLCertVerificationError, server: Description | None, host: str, now: float) -> str:
    validity = f" ({server.validity(now)})" if server else ""
    if error.verify_code == _EXPIRED:
        return f"the coordinator's certificate has expired, or this machine's clock is wrong{validity}"
    if error.verify_code == _NOT_YET:
        return f"the coordinator's certificate is not valid yet: one of the two clocks is wrong{validity}"
    if error.verify_code in _OTHER_NAME:
        names = ", ".join(server.names[:_FEW_NAMES]) if server else ""
        return (
            f"the coordinator's certificate is for {names or 'no host at all'}, not for {host}: use one of its names "
            "as the address, or let the operator add this one (server.identity.names)"
        )
    if error.verify_code in _OTHER_AUTHORITY:
        issuer = f" (it is of {server.issuer!r})" if server else ""
        return (
            f"the coordinator's certificate is of another authority than the one that this side trusts{issuer}: "
            "is it the right coordinator, and the right ca_file or join token?"
        )
    return f"the coordinator's certificate is not trusted: {error.verify_message}{validity}"


def _why_no_tls(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"}:
        return "it does not speak TLS: a coordinator in the clear, or another program, listens on this port"
    if "EOF" in reason:
        return "the connection was closed during the TLS handshake; does the coordinator speak TLS?"
    return f"the TLS handshake failed: {reason.lower().replace('_', ' ')}"


def _why_not_welcome(pem: Pem, now: float) -> str:
    """The handshake was fine for us, and then the server closed: it did not like what we showed it."""
    if pem.certificate is None:
        return "the coordinator wants to see a certificate, and this side shows none: a join token or certificate files"
    try:
        mine = describe(pem.certificate)
    except (ConfigError, NotAuthenticated):
        return "the coordinator does not accept this side's certificate, which cannot be read"
    if now > mine.not_after:
        return f"this side's certificate has expired ({mine.validity(now)})"
    if now < mine.not_before:
        return f"this side's certificate is not valid yet: one of the two clocks is wrong ({mine.validity(now)})"
    return (
        f"the coordinator does not accept this side's certificate of the authority {mine.issuer!r} "
        f"(good until {moment(mine.not_after)}): it is of another authority, or the coordinator's clock is wrong"
    )


def _no_connection(error: OSError, address: str, timeout_seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return (
            f"{address} does not answer within {timeout_seconds:g} s: a firewall drops the packets, "
            "or the machine is off"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"{address} refuses the connection: the machine is there, but nothing listens on this port"
    return f"{address} cannot be connected to: {error.strerror or error}"
