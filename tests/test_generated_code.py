"""The committed protobuf code is what proto/generate.py makes of the .proto files today."""

import os
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parent.parent / "proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def _generated(root: Path) -> dict[str, bytes]:
    paths = [path for pattern in GENERATED for path in root.rglob(pattern)]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    # protoc finds its plug-in on the PATH: the one beside this Python, whether or not its environment is active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, str(PROTO / "generate.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PATH": path})
    committed, fresh = _generated(PROTO), _generated(tmp_path)
    assert fresh, "proto/generate.py wrote nothing"
    differing = sorted(name for name in committed | fresh if committed.get(name) != fresh.get(name))
    assert not differing, f"`make proto` would change {', '.join(differing)}"
