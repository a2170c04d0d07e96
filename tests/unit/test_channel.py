"""Which addresses nobody outside this machine can reach, and the options' tempo."""

import json

import pytest
from raflora.v1 import federation_pb2, status_pb2

from common.channel import READ_BYTES, Keepalive, client_options, is_loopback, server_options


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7070", "127.8.8.8:1", "localhost:7070", "localhost", "[::1]:7070", "::1", "unix:/run/raflora"],
)
def test_loopback_is_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "coordinator:7070", "10.0.0.1:7070", "0.0.0.0:7070", "[::]:7070", "[2001:db8::1]:7070", "",
        "127.0.0.1.example.org:7070", "127.example.org:7070", "localhost.example.org:7070", "localhosts:7070",
    ],
)  # fmt: skip
def test_a_name_that_only_begins_like_loopback_is_not(address: str) -> None:
    assert not is_loopback(address)


def test_the_server_always_allows_the_clients_pings() -> None:
    for factor in (1.0, 0.5, 0.01):
        keepalive = Keepalive().scaled(factor)
        allowed = dict(server_options(keepalive))["grpc.http2.min_ping_interval_without_data_ms"]
        assert int(allowed) < int(dict(client_options(keepalive))["grpc.keepalive_time_ms"])


def test_a_silent_connection_keeps_no_more_room_than_a_small_part_of_a_message() -> None:
    # Without it a coordinator of 2,000 connections grew by hundreds of megabytes, over some rounds.
    options = dict(server_options(Keepalive()))
    assert options["grpc.experimental.tcp_max_read_buffer_size"] == READ_BYTES <= 64 << 10


def test_exactly_the_unary_calls_of_workers_and_observers_are_retried() -> None:
    config = json.loads(str(dict(client_options(Keepalive()))["grpc.service_config"]))
    retried = {(n["service"], n["method"]) for entry in config["methodConfig"] for n in entry["name"]}
    services = (
        federation_pb2.DESCRIPTOR.services_by_name["FederationService"],
        status_pb2.DESCRIPTOR.services_by_name["StatusService"],
    )
    unary = {
        (service.full_name, method.name)
        for service in services
        for method in service.methods
        if not method.client_streaming and not method.server_streaming
    }
    assert retried == unary
