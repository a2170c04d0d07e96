"""One state folder has one coordinator."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import StateInUse
from coordinator.stores.lock import lock_state_folder


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
