"""What a round costs beside Flower's: `python -m benchmarks --only rounds`; cases are empty, 10mb, 50mb and idle."""

from benchmarks.rounds.parts import figures

__all__ = ["figures"]
