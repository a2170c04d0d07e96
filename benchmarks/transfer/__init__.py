"""What bytes and rounds cost: through the real worker client and a real coordinator, beside bare TCP.

python -m benchmarks.transfer [--only PART] [--repetitions N] [--format json]
"""

from benchmarks.transfer.parts import figures

__all__ = ["figures"]
