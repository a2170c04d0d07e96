"""When, where and with what something was measured."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np  # loads the BLAS that is asked about
from threadpoolctl import threadpool_info

_PACKAGES = ("grpcio", "protobuf")


def setting() -> dict[str, str]:
    """For a report, in the order in which people read it."""
    blas = (f"{found['internal_api']} {found['version']}" for found in threadpool_info() if found["user_api"] == "blas")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f} before it began",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "numpy": np.__version__,
        **{package: version(package) for package in _PACKAGES},
        "BLAS": ", ".join(dict.fromkeys(blas)),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = [name for name in ("avx2", "avx512f") if any(name in line for line in lines if line.startswith("flags"))]
    return f"{named[0] if named else platform.machine()} ({', '.join(wide) or 'no AVX2'})"
