"""`python -m worker.trainer`: the trainer process."""

import os
import sys

from worker.trainer.process import main

if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: it would wait for the lock of the input, which the reading thread holds.
    os._exit(status)
