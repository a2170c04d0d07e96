"""Freezes the wire: python proto/release.py writes raflora/v1/released.binpb, which tests/test_wire.py holds the
.proto files against. Run it when a version is released, never to silence that test. Needs the dev group.
"""

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parent
RELEASED = PROTO / "raflora/v1/released.binpb"


def release() -> None:
    """Writes the descriptor set of every .proto file."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("raflora/v1/*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}"]
    subprocess.run([*command, f"--descriptor_set_out={RELEASED}", *files], check=True, cwd=PROTO)


if __name__ == "__main__":
    release()
