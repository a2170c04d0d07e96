"""Regenerates the committed protobuf code: python proto/generate.py [OUT]. Needs the dev group."""

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Writes every generated file under `out`, which mirrors the folder proto/."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("raflora/v1/*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--proto_path={PROTO}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).with_name('protoc-gen-mypy_grpc')}",
            f"--mypy_grpc_out={out}",
            *files,
        ],
        check=True,
        cwd=PROTO,
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO)
