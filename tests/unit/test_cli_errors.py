"""Errors as exit codes and sentences."""

import pytest

from cli.connection import Connection
from cli.errors import ExitCode, Failed, Refused, exit_code_of, sentence_of
from common.channel import Tls
from common.errors import ConfigError, CorruptTransfer, NothingPublished, RafloraError, StaleRound, Unavailable
from common.settings import coordinator_address


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), ExitCode.USAGE),
        (Unavailable("x"), ExitCode.UNREACHABLE),
        (StaleRound("x"), ExitCode.REFUSED),
        (Refused("x"), ExitCode.REFUSED),
        (CorruptTransfer("x"), ExitCode.FAILED),
        (Failed("x"), ExitCode.FAILED),
        (RafloraError("x"), ExitCode.FAILED),
    ],
)
def test_exit_codes_are_stable(error: RafloraError, code: ExitCode) -> None:
    assert exit_code_of(error) == code


def test_a_sentence_says_what_to_do_next() -> None:
    assert sentence_of(NothingPublished("no round is done")) == (
        "no round is done; `raflora status` says what the federation waits for"
    )
    assert sentence_of(Failed("no")) == "no"


def test_the_address_comes_from_the_flag_then_the_environment_then_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAFLORA_COORDINATOR", "hub:7070")
    assert Connection(coordinator="here:1").address == "here:1"
    assert Connection().address == "hub:7070"
    assert coordinator_address({}) == "127.0.0.1:7070"


def test_an_address_without_a_port_is_refused() -> None:
    with pytest.raises(ConfigError, match="'hub': expected HOST:PORT"):
        _ = Connection(coordinator="hub").address


def test_only_this_machine_is_spoken_to_in_the_clear_unless_told() -> None:
    assert Connection(coordinator="127.0.0.1:1").tls is None
    assert Connection(coordinator="hub:1", insecure=True).tls is None
    assert Connection(coordinator="hub:1").tls == Tls()


def test_a_certificate_needs_its_key(tmp_path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        _ = Connection(certificate_file=tmp_path).tls
    with pytest.raises(ConfigError, match="--insecure means no TLS"):
        _ = Connection(insecure=True, ca_file=tmp_path).tls
