"""Libraries that talk while they are imported are quiet before that: looked at where it happens, in a fresh process."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]
_WATCH = """
import importlib.abc, logging, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            print(logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING), flush=True)
        return None
sys.meta_path.insert(0, Watch())
import {module}
import peft
"""


@pytest.mark.parametrize("module", ["benchmarks.worker_step", "simulation.check_adapter"])
def test_bitsandbytes_is_quiet_before_it_is_imported(module: str) -> None:
    """Both import torch and transformers themselves, and the worker's trainer after those."""
    pytest.importorskip("bitsandbytes")
    code = _WATCH.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"False"}
    assert "bitsandbytes" not in done.stderr
