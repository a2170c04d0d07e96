"""The state folder: an identity that stays, and one worker at a time."""

import socket
import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from worker.identity import client_id_of, enrol_key_of, holding


def test_a_worker_without_a_name_goes_by_its_host() -> None:
    assert client_id_of("ada") == "ada"
    assert client_id_of("") == socket.gethostname()


def test_the_enrolment_key_is_made_once_and_is_secret(tmp_path: Path) -> None:
    key = enrol_key_of(tmp_path / "state")

    assert enrol_key_of(tmp_path / "state") == key
    assert enrol_key_of(tmp_path / "other") != key
    assert stat.S_IMODE((tmp_path / "state" / "enrol-key").stat().st_mode) == 0o600


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "enrol-key").write_text("")
    with pytest.raises(ConfigError, match="enrol-key: not an enrolment key"):
        enrol_key_of(tmp_path)


def test_two_workers_never_share_a_folder(tmp_path: Path) -> None:
    with (
        holding(tmp_path),
        pytest.raises(ConfigError, match="in use by another worker; each needs a folder of its own"),
        holding(tmp_path),
    ):
        pass
    with holding(tmp_path):
        pass  # the first has ended


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"), holding(tmp_path / "file" / "state"):
        pass
