"""The command line starts fast: a verb imports only what it needs."""

import subprocess
import sys

import pytest
from canned_coordinator import Canned, serving

HEAVY = {"torch", "transformers", "peft", "datasets", "sqlalchemy", "accelerate"}
PROBE = """
import sys
from cli.main import main
code = main(sys.argv[1:])
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["status"], ["rounds"], ["clients"], ["health"], ["pause"]])
def test_an_observer_imports_no_torch_and_no_sql(arguments: list[str]) -> None:
    with serving(Canned()) as address:
        ended = subprocess.run(
            [sys.executable, "-c", PROBE, *arguments, "--coordinator", address],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stderr
    imported = set(ended.stdout.splitlines()[-1].split())
    assert "grpc" in imported
    assert not imported & HEAVY
