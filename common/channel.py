"""gRPC channels and servers: options that were measured, credentials, retries of unary calls.

Two option names that are widely copied do nothing in this gRPC: min_recv_ping_interval_without_data_ms is
ignored, and keepalive_timeout_ms alone does not notice a frozen peer (ping_timeout_ms does).
tests/integration/test_keepalive.py holds both to account.
"""

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio

from common.errors import ConfigError

MAX_MESSAGE_BYTES = 4 << 20  # gRPC's default; nothing here needs more
MAX_CALLS_PER_CONNECTION = 16
REASON_KEY = "raflora-reason"
COMMITTED_BYTES_KEY = "raflora-committed-bytes"

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True)
class Keepalive:
    """How both sides find out that the other is gone."""

    client_ping_seconds: float = 30.0
    server_ping_seconds: float = 60.0
    timeout_seconds: float = 15.0

    def scaled(self, factor: float) -> "Keepalive":
        """The same in another tempo."""
        return replace(
            self,
            client_ping_seconds=self.client_ping_seconds * factor,
            server_ping_seconds=self.server_ping_seconds * factor,
            timeout_seconds=self.timeout_seconds * factor,
        )


@dataclass(frozen=True)
class Tls:
    """Files in PEM form. Clients are asked for a certificate only by a server that has a ca_file."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None


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
        ("grpc.max_reconnect_backoff_ms", 30_000),
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_retries", 1),
    ]


def server_options(keepalive: Keepalive) -> Options:
    """Options of the coordinator's server."""
    return [
        ("grpc.keepalive_time_ms", _ms(keepalive.server_ping_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _ms(keepalive.timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Strictly below the client's interval, or a worker that trains is thrown out with too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(keepalive.client_ping_seconds / 3)),
        ("grpc.max_connection_idle_ms", 900_000),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),  # a second coordinator on the same port must fail, not share it
    ]


def client_channel(address: str, tls: Tls | None, keepalive: Keepalive = Keepalive()) -> grpc.aio.Channel:
    """A channel to a coordinator; without `tls` in the clear."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=client_options(keepalive))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.certificate_file),
    )
    return grpc.aio.secure_channel(address, credentials, options=client_options(keepalive))


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """The coordinator's credentials; with a ca_file, clients must show a certificate of that authority."""
    certificate, key = _read(tls.certificate_file), _read(tls.key_file)
    if certificate is None or key is None:
        raise ConfigError("tls: the coordinator needs certificate_file and key_file")
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=_read(tls.ca_file),
        require_client_auth=tls.ca_file is not None,
    )


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
        raise ConfigError(f"tls: {path} cannot be read: {error.strerror}") from None
