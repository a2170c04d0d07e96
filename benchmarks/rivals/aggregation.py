"""Our aggregation of one module beside that of packages that others ship, on the same factors and in turn."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.aggregation import Case, Inputs, inputs_of, raflora
from benchmarks.interleaved import Figure, Goal, Turn, cpu_ratio, timed
from benchmarks.programs import Program, ProgramFailed, take_turns
from benchmarks.report import NOT_MEASURED
from benchmarks.rivals.environment import Rivals, prepare

PART = "rivals"
_TURN_SECONDS = 300.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_SCRIPT = Path(__file__).with_name("aggregators.py")
CLIENTS = 50
CASES = {"768x768": Case(768, 768, CLIENTS), "1024x3072": Case(1024, 3072, CLIENTS)}
_EXACT = "CPU seconds of theirs over ours; theirs is as exact as ours"
_INEXACT = (
    "CPU seconds of theirs over ours; theirs averages lora_A and lora_B apart, which is not the average of the "
    "updates, and needs them padded to one rank (not counted)"
)


@dataclass(frozen=True)
class Rival:
    """One function of one package."""

    contender: str  # as aggregators.py names it
    label: str
    packages: tuple[str, ...]
    note: str
    goal: Goal | None = None


@dataclass(frozen=True)
class Trial:
    """One of them on one cohort."""

    rival: Rival
    case: str
    inputs: Inputs
    repetitions: int


RIVALS = (
    Rival("chorus-fedex", "chorus-fl, FedEx-LoRA", ("chorus-fl", "torch"), _EXACT),
    Rival("nvflare-accumulator", "NVIDIA FLARE, weighted accumulator", ("nvflare",), _INEXACT),
    Rival("flower-aggregate", "Flower, FedAvg", ("flwr",), _INEXACT),
    Rival("flower-aggregate-inplace", "Flower, FedAvg in place with decoding", ("flwr",), _INEXACT),
)


def figures(progress: Callable[[str], None], only: str | None, repetitions: int) -> list[Figure]:
    """One figure a rival and case; a case is a shape."""
    rivals = prepare(progress)
    cases = {name: case for name, case in CASES.items() if only in {None, name}}
    found = []
    for name, case in cases.items():
        inputs = inputs_of(case)
        for rival in RIVALS:
            trial = Trial(rival, name, inputs, repetitions)
            progress(f"{rival.label}, {name}")
            found.append(_figure(rivals, trial))
    return found


def _figure(rivals: Rivals, trial: Trial) -> Figure:
    rival = trial.rival
    figure = Figure(PART, f"{rival.label}, {trial.case}, {CLIENTS} clients", NOT_MEASURED, "x", rival.goal, rival.note)
    if why := rivals.why_not(*rival.packages):
        return replace(figure, note=why)
    try:
        ours, theirs = _turns(rivals, trial)
    except ProgramFailed as error:
        return replace(figure, note=str(error))
    return replace(figure, value=cpu_ratio(theirs, ours))


def _turns(rivals: Rivals, trial: Trial) -> tuple[list[Turn], list[Turn]]:
    """Ours and theirs, in turn. Raises ProgramFailed."""
    with tempfile.TemporaryDirectory(prefix="raflora-rivals-") as folder, threadpool_limits(limits=1):
        file = Path(folder) / "factors.npz"
        _write(trial.inputs, file)
        command = (str(rivals.python), str(_SCRIPT), str(file))
        with Program(command, Path(folder) / "rivals.log", environment=_ONE_THREAD) as theirs:
            turns = take_turns(
                {
                    "ours": lambda: timed(lambda: raflora(trial.inputs)),
                    "theirs": lambda: Turn(**theirs.ask(trial.rival.contender, _TURN_SECONDS)),
                },
                trial.repetitions,
            )
    return turns["ours"], turns["theirs"]


def _write(inputs: Inputs, file: Path) -> None:
    arrays: dict[str, Any] = {f"A{k}": update.lora_A for k, update in enumerate(inputs.updates)}
    arrays |= {f"B{k}": update.lora_B for k, update in enumerate(inputs.updates)}
    np.savez(file, allow_pickle=False, num_examples=np.array(inputs.num_examples), **arrays)
