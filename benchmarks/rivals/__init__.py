"""Other systems' own code, measured beside ours: installed in an environment of its own, spoken to over pipes."""

from benchmarks.rivals.aggregation import figures

__all__ = ["figures"]
