"""gRPC channels and servers: options that were measured, credentials, retries of unary calls.

Two option names that are widely copied do nothing in this gRPC: min_recv_ping_interval_without_data_ms is
ignored, and keepalive_timeout_ms alone does not notice a frozen peer (ping_timeout_ms does).
tests/integration/test_keepalive.py holds both to account.
"""

import ipaddress
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import grpc
import grpc.aio

from common.errors import ConfigError

MAX_MESSAGE_BYTES = 4 << 20  # gRPC's default; nothing here needs more
MAX_CALLS_PER_CONNECTION = 16
HANDSHAKE_SECONDS = 5.0  # for TLS and HTTP/2's first words; gRPC's own two minutes are a place for whoever is silent
MAX_PENDING_CALLS = 10_000  # that have arrived and wait for the event loop; gRPC ends those beyond, as CANCELLED
WINDOW_BYTES = 1 << 20  # of a stream to the coordinator: what it may have to hold for each upload beside a message
READ_BYTES = 64 << 10  # room that a connection keeps for what it reads next, also while it is silent
REASON_KEY = "raflora-reason"
COMMITTED_BYTES_KEY = "raflora-committed-bytes"

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True)
class Keepalive:
    """How both sides find out that the other is gone."""

    client_ping_seconds: float = 30.0
    server_ping_seconds: float = 60.0
    timeout_seconds: float = 15.0
    # A caller that answers pings but never reads its stream: only the age of its connection ends that.
    connection_seconds: float = 3600.0
    connection_grace_seconds: float = 300.0  # for the calls that are under way then; new ones open a new connection

    def scaled(self, factor: float) -> "Keepalive":
        """The same in another tempo."""
        return replace(
            self,
            client_ping_seconds=self.client_ping_seconds * factor,
            server_ping_seconds=self.server_ping_seconds * factor,
            timeout_seconds=self.timeout_seconds * factor,
            connection_seconds=self.connection_seconds * factor,
            connection_grace_seconds=self.connection_grace_seconds * factor,
        )


@dataclass(frozen=True)
class Tls:
    """Files in PEM form. Clients are asked for a certificate only by a server that has a ca_file."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None

    def read(self) -> "Pem":
        """The files' bytes, as they are now. Raises ConfigError for a file that cannot be read."""
        return Pem(_read(self.ca_file), _read(self.certificate_file), _read(self.key_file))


@dataclass(frozen=True)
class Pem:
    """What stands in those files; None: the system's authorities, or nothing to show."""

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


def client_options(keepalive: Keepalive) -> Options:
    """Options of a worker's or observer's channel."""
    return [
        ("grpc.keepalive_time_ms", _ms(keepalive.client_ping_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.min_reconnect_backoff_ms", 500),
        # Between gRPC's own attempts a call fails at once, so this comes on top of the pauses between our calls.
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Else all channels of a process to one address share a connection and its few calls, and those that wait for
        # work keep those out that bring it. One connection is one participant here, with or without certificates.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_retries", 1),
    ]


def server_options(keepalive: Keepalive, max_connections: int | None = None) -> Options:
    """Options of the coordinator's server; connections beyond so many are closed as soon as they come."""
    most = [] if max_connections is None else [("grpc.max_allowed_incoming_connections", max_connections)]
    return [
        *most,
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_SECONDS)),
        ("grpc.keepalive_time_ms", _ms(keepalive.server_ping_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Strictly below the client's interval, or a worker that trains is thrown out with too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(keepalive.client_ping_seconds / 3)),
        ("grpc.max_connection_idle_ms", 900_000),
        ("grpc.max_connection_age_ms", _ms(keepalive.connection_seconds)),
        ("grpc.max_connection_age_grace_ms", _ms(keepalive.connection_grace_seconds)),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # As it comes it begins to end calls at 1,000: all workers ask at once when a coordinator starts anew.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
        # gRPC's own estimate takes a disk that is behind for a wire that is long, and buffers 20 MB for every upload.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # As it comes the room follows what has ever come at once, and a connection that then waits keeps it for hours.
        ("grpc.experimental.tcp_max_read_buffer_size", READ_BYTES),
        ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
    ]


def client_channel(address: str, tls: Tls | Pem | None, keepalive: Keepalive = Keepalive()) -> grpc.aio.Channel:
    """A channel to a coordinator; without `tls` in the clear. Files are read once, now."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=client_options(keepalive))
    pem = tls.read() if isinstance(tls, Tls) else tls
    credentials = grpc.ssl_channel_credentials(
        root_certificates=pem.authority,
        private_key=pem.key,
        certificate_chain=pem.certificate,
    )
    return grpc.aio.secure_channel(address, credentials, options=client_options(keepalive))


def rotating_server_credentials(papers: Callable[[], Pem], *, asks_for_certificates: bool) -> grpc.ServerCredentials:
    """Credentials that may change between two connections; `papers` is called for each, from gRPC's threads.

    It must be quick and must not raise. Open connections keep what they began with.
    """
    shown = papers()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        now = papers()
        if now == shown:
            return None  # no change
        shown = now
        return _configuration(now)

    # The published types forget that None means "as before".
    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown), cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch), asks_for_certificates
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    if pem.certificate is None or pem.key is None:
        raise ConfigError("tls: the coordinator needs certificate_file and key_file")
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.authority)


def is_loopback(address: str) -> bool:
    """Whether nobody outside this machine can reach the address."""
    if address.startswith("unix:"):
        return True
    host = address if address.count(":") > 1 and "]" not in address else address.rpartition(":")[0] or address
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# Unary calls only: a stream that has begun resumes at its offset in our own code, not from gRPC's retry buffer.
_RETRIED = {
    "raflora.v1.FederationService": (
        "Handshake",
        "Join",
        "PollTask",
        "Heartbeat",
        "BeginUpload",
        "QueryUpload",
        "SubmitUpdate",
        "SubmitEvaluation",
        "FailTask",
        "Leave",
    ),
    "raflora.v1.StatusService": ("GetStatus", "ListRounds", "ListClients"),
}
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, methods in _RETRIED.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
    }
)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {path.absolute()} cannot be read: {error.strerror}") from None
