"""What a status means to a worker. The details are texts that gRPC 1.85 really wrote."""

from pathlib import Path

import pytest

from common.channel import Tls
from common.errors import (
    ConfigError,
    IdentityConflict,
    ProtocolTooOld,
    RafloraError,
    TooBusy,
    Unavailable,
    WrongOffset,
)
from worker.client import tls_of
from worker.config import CoordinatorAddress, TlsConfig
from worker.wire_errors import meaning_of

ADDRESS = "10.0.0.5:7070"


def test_a_reason_from_the_coordinator_is_its_class_again() -> None:
    error = meaning_of("ALREADY_EXISTS", "another worker is ada", {"raflora-reason": "identity_conflict"}, ADDRESS)
    assert (type(error), str(error)) == (IdentityConflict, "another worker is ada")


def test_a_reason_that_this_version_does_not_know_is_still_an_error() -> None:
    error = meaning_of("ABORTED", "something new", {"raflora-reason": "from_the_future"}, ADDRESS)
    assert type(error) is RafloraError


@pytest.mark.parametrize(("text", "committed_bytes"), [("4096", 4096), ("-1", 0), ("many", 0)])
def test_a_wrong_offset_carries_the_right_one(text: str, committed_bytes: int) -> None:
    trailing = {"raflora-reason": "wrong_offset", "raflora-committed-bytes": text}
    error = meaning_of("OUT_OF_RANGE", "byte 7", trailing, ADDRESS)
    assert isinstance(error, WrongOffset)
    assert error.committed_bytes == committed_bytes


@pytest.mark.parametrize(
    ("code", "details", "words"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: Connection refused",
            "connection refused",
        ),
        (
            "UNAVAILABLE",
            "errors resolving no-such-host.invalid:7070: [field:hostname lookup error:address lookup failed for "
            "no-such-host.invalid:7070: Domain name not found]",
            "name not resolved",
        ),
        ("UNAVAILABLE", "Socket closed", "connection closed"),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", "connection reset"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "no answer in time"),
        ("CANCELLED", "CANCELLED", "CANCELLED"),
        (
            "INTERNAL",
            "Internal error from Core",
            "Internal error from Core",
        ),  # gRPC on this side, of a call reset early
    ],
)
def test_silence_is_told_in_plain_words(code: str, details: str, words: str) -> None:
    error = meaning_of(code, details, {}, ADDRESS)
    assert (type(error), str(error)) == (Unavailable, f"coordinator 10.0.0.5:7070 cannot be reached: {words}")


def test_a_failed_tls_handshake_keeps_the_cause() -> None:
    details = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.5:7070: Tls handshake failed "
        "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED"
    )
    error = str(meaning_of("UNAVAILABLE", details, {}, ADDRESS))
    assert error.startswith("coordinator 10.0.0.5:7070 cannot be reached: TLS handshake failed (")
    assert error.endswith("CERTIFICATE_VERIFY_FAILED)")


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "UNKNOWN", "INTERNAL"])
def test_a_proxy_that_breaks_off_is_silence_too(code: str) -> None:
    assert type(meaning_of(code, "Received http2 header with status: 404", {}, ADDRESS)) is Unavailable


def test_a_server_that_is_no_coordinator_is_not_tried_again() -> None:
    assert type(meaning_of("UNIMPLEMENTED", "Method not found!", {}, ADDRESS)) is ProtocolTooOld


def test_other_statuses_keep_their_name() -> None:
    assert type(meaning_of("RESOURCE_EXHAUSTED", "too many streams", {}, ADDRESS)) is TooBusy
    error = meaning_of("UNKNOWN", "Unexpected <class 'KeyError'>", {}, ADDRESS)
    assert (type(error), str(error)) == (
        RafloraError,
        "coordinator 10.0.0.5:7070 answered UNKNOWN: Unexpected <class 'KeyError'>",
    )


def test_in_the_clear_only_on_this_machine_or_on_demand() -> None:
    assert tls_of(CoordinatorAddress(address="127.0.0.1:7070")) is None
    assert tls_of(CoordinatorAddress(address=ADDRESS, insecure=True)) is None
    tls = TlsConfig(ca_file=Path("ca.pem"))
    assert tls_of(CoordinatorAddress(address=ADDRESS, tls=tls)) == Tls(ca_file=Path("ca.pem"))
    with pytest.raises(ConfigError, match=r"10\.0\.0\.5:7070 is not on this machine"):
        tls_of(CoordinatorAddress(address=ADDRESS))
