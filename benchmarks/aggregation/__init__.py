"""How fast, how exact and in how much memory a round is aggregated, through the public entry points.

`python -m benchmarks.aggregation [--only CASE]` prints JSON; `make bench` has it as its first part.
"""

from benchmarks.aggregation.cases import CASES, figures
from benchmarks.aggregation.contenders import raflora
from benchmarks.aggregation.inputs import Case, Inputs, inputs_of

__all__ = ["CASES", "Case", "Inputs", "figures", "inputs_of", "raflora"]
