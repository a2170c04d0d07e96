"""One state folder has one coordinator, and belongs to one federation."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError, StateInUse
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.lock import lock_state_folder
from coordinator.stores.owner import OWNER_FILE, Owner, claim_state_folder

DIGITS = Owner("digits", "")


def test_a_second_coordinator_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with (
        lock_state_folder(tmp_path / "state"),
        pytest.raises(StateInUse, match=rf"state: another coordinator \(process {os.getpid()}\)"),
    ):
        lock_state_folder(tmp_path / "state")


def test_the_folder_is_free_after_a_release(tmp_path: Path) -> None:
    first = lock_state_folder(tmp_path)
    first.release()
    first.release()
    lock_state_folder(tmp_path).release()


def test_a_killed_coordinator_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, signal; from pathlib import Path; from coordinator.stores import lock_state_folder\n"
        "held = lock_state_folder(Path(sys.argv[1])); print('held', flush=True); signal.pause()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateInUse, match=f"process {holder.pid}"):
            lock_state_folder(tmp_path)
        holder.send_signal(signal.SIGKILL)
    lock_state_folder(tmp_path).release()


def test_a_state_folder_is_nobody_else_s_to_read(tmp_path: Path) -> None:
    lock_state_folder(tmp_path / "new" / "state").release()
    assert (tmp_path / "new" / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("other", [Owner("letters", ""), Owner("digits", "postgresql://host/name")])
def test_blobs_of_another_federation_are_refused(tmp_path: Path, other: Owner) -> None:
    blobs = FileBlobs(tmp_path / "blobs")
    claim_state_folder(tmp_path, DIGITS, blobs)
    digest = blobs.put(b"the adapter of digits")
    with pytest.raises(ConfigError, match=r"the adapters of federation 'digits' .* give this one another state_dir"):
        claim_state_folder(tmp_path, other, blobs)
    claim_state_folder(tmp_path, DIGITS, blobs)
    assert blobs.digests() == {digest}


def test_a_folder_without_blobs_changes_hands(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path / "blobs")
    claim_state_folder(tmp_path, Owner("typo", ""), blobs)
    claim_state_folder(tmp_path, DIGITS, blobs)
    assert b"digits" in (tmp_path / OWNER_FILE).read_bytes()
