"""Makes the environment of the rivals, if it is not there: `python -m benchmarks.rivals`, `make bench-rivals`."""

import sys

from benchmarks.rivals.environment import prepare

rivals = prepare(print)
print(", ".join(f"{package} {version}" for package, version in rivals.versions.items()) or "nothing is installed")
sys.exit("\n".join(rivals.complaints) or 0)
