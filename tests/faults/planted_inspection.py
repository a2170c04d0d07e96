"""The inspection's process with a check that does not survive: `python planted_inspection.py NAME`."""

import os
import signal
import sys
import time

from coordinator.inspection import Inspection, serve


def _abort(_: Inspection) -> tuple[float, ...]:
    os.abort()


def _loop(_: Inspection) -> tuple[float, ...]:
    while True:
        pass


def _stop(_: Inspection) -> tuple[float, ...]:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)
    return ()


def _hog(_: Inspection) -> tuple[float, ...]:
    return (float(len(bytearray(1 << 40))),)


def _leave(_: Inspection) -> tuple[float, ...]:
    os._exit(3)


def _bug(_: Inspection) -> tuple[float, ...]:
    return (1.0 / 0.0,)


def _garbage(_: Inspection) -> tuple[float, ...]:
    sys.stdout.buffer.write(b"\xff no JSON\n")
    return ()


def _first_name(inspection: Inspection) -> tuple[float, ...]:
    """Survives, unless the update is bob's."""
    return _abort(inspection) if "bob" in inspection.whose else ()


if __name__ == "__main__":
    serve(globals()[f"_{sys.argv[1]}"])
